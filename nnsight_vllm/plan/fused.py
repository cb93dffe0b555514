"""Sites where a program does nothing but edit whole rows by tables, or nothing but collect: append the site's rows, or one of
them, to lists that go home.

All that happens there is known before the forward starts, so nobody runs it operation by operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnsight_vllm.graph.nodes import Arg, Const, Node, Op, Read, Ref
from nnsight_vllm.plan.edits import FULL, PRODUCTS, Edit
from nnsight_vllm.plan.instructions import At, End, Instruction, IterNext, Jump, Run


@dataclass(frozen=True)
class RowSave:
    """An append to the list that is saved under `name`. `row`: the parameter with the row's number; None: all rows."""

    node: int
    row: int | None
    name: str


@dataclass(frozen=True)
class FusedSite:
    """All that a program does at a site, in order: `edits`, by their nodes, or `saves`. Then it goes on at `stop`.

    `num_operations`: how many of the program's operations that is. `free`: the values that end there.
    """

    site: str
    edits: tuple[int, ...]
    saves: tuple[RowSave, ...]
    num_operations: int
    stop: int
    free: tuple[int, ...]


def find_fused(
    code: Sequence[Instruction], edits: Mapping[int, Edit], streams: Mapping[int, str]
) -> dict[int, FusedSite]:
    """Fused sites by the place in the program where a request waits for the site."""
    found = {}
    for start, at in enumerate(code):
        if isinstance(at, At) and at.site is not None:
            scan, stop = _Scan(at.site, edits, streams), start + 1
            while isinstance(run := code[stop], Run) and scan.covers(run):
                stop += 1
            if scan.is_fused and _leaves_site(code, stop, at.site):
                found[start] = scan.fused(stop)
    return found


class _Scan:
    """What a program did at a site so far. `_rows`: values that are the site, or a row of it by its parameter."""

    def __init__(self, site: str, edits: Mapping[int, Edit], streams: Mapping[int, str]) -> None:
        self._site = site
        self._known_edits = edits
        self._streams = streams
        self._rows: dict[int, int | None] = {}
        self._constants: set[int] = set()
        self._made: set[int] = set()
        self._free: list[int] = []
        self._edits: list[int] = []
        self._saves: list[RowSave] = []
        self._num_operations = 0

    def covers(self, run: Run) -> bool:
        """Whether a fused site may do this too."""
        self._made.add(run.node.id)
        self._free += run.free
        self._num_operations += isinstance(run.node, Op)
        return self._covers(run.node)

    @property
    def is_fused(self) -> bool:
        """One of both, no row picked that nobody saves (it may be missing), and nothing left for later."""
        is_one = bool(self._edits) is not bool(self._saves)
        picked = {row for row in self._rows.values() if row is not None}
        return is_one and picked <= {save.row for save in self._saves} and self._made <= set(self._free)

    def fused(self, stop: int) -> FusedSite:
        num = len(self._edits) or self._num_operations
        return FusedSite(self._site, tuple(self._edits), tuple(self._saves), num, stop, tuple(self._free))

    def _covers(self, node: Node) -> bool:
        match node:
            case Read() if node.site == self._site:
                self._rows[node.id] = None
            case Const():
                self._constants.add(node.id)
            case Op(name="py.getitem", args=[target, key]) if self._is_whole(target) and key == FULL:
                self._rows[node.id] = None
            case Op(name="py.getitem", args=[target, Ref(id=key)]) if self._is_whole(target) and key < 0:
                self._rows[node.id] = key
            case Op(name="py.append", args=[Ref(id=to), Ref(id=item)]) if to in self._streams and item in self._rows:
                self._saves.append(RowSave(node.id, self._rows[item], self._streams[to]))
            case Op() if node.id in self._known_edits and node.writes == self._site and self._is_whole(node.args[0]):
                self._edits.append(node.id)
            case Op() if self._is_product(node):  # part of the edit, since nothing else may see it
                pass
            case _:
                return False
        return True

    def _is_whole(self, arg: Arg) -> bool:
        return isinstance(arg, Ref) and arg.id in self._rows and self._rows[arg.id] is None

    def _is_product(self, node: Op) -> bool:
        """Whether it's a vector times a number: that never fails, so it needn't be run where its result is in a line."""
        if node.name not in PRODUCTS or len(node.args) != 2 or node.kwargs:
            return False
        return any(
            isinstance(one, Ref) and one.id in self._constants and isinstance(other, Ref) and other.id < 0
            for one, other in (node.args, reversed(node.args))
        )


def _leaves_site(code: Sequence[Instruction], stop: int, site: str) -> bool:
    """Whether a program that goes on here surely has no more to do at the site."""
    match code[stop]:
        case At() as at:
            return at.site not in (site, None)  # one that waits for an iteration may be there already
        case Jump(target=target):
            return isinstance(code[target], IterNext)
        case _:
            return isinstance(code[stop], End)
