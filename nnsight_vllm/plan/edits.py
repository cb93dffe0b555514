"""Which operations of a program are edits that a table knows, and the sites where a program does nothing else.

An edit's values must be parameters of the request, so that its line can be in the table before the forward starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnsight_vllm.graph.nodes import Arg, Const, Op, Read, Ref, Slice
from nnsight_vllm.kernels.columns import COLUMNS
from nnsight_vllm.plan.instructions import At, End, Instruction, IterNext, Jump, Run

ADDS = {"py.iadd": 1, "tensor.add_": 1, "py.isub": -1, "tensor.sub_": -1}
"""In-place operations that add to their target, and the sign of what they add: to a site's addend, where it has one."""

PREFIX = "edit."
_SCALES = frozenset(["py.imul", "tensor.mul_"])
_PRODUCTS = frozenset(["py.mul", "tensor.mul", "torch.mul"])
_FULL = Slice()


@dataclass(frozen=True)
class Edit:
    """`values`: the parameter of each column of the operation, a negative id; None: one. `sign`: of the coefficient.

    `zero`: a parameter that must be zero for it to be this edit.
    """

    operation: str
    values: tuple[int | None, ...] = ()
    sign: int = 1
    zero: int | None = None


@dataclass(frozen=True)
class Visit:
    """All that a program does at a site: `edits`, by the nodes' ids, in order. Then it goes on at `stop`."""

    site: str
    edits: tuple[int, ...]
    stop: int
    free: tuple[int, ...]

    @property
    def num_operations(self) -> int:
        return len(self.edits)


def find_edits(code: Sequence[Instruction], copied: frozenset[int]) -> dict[int, Edit]:
    """Edits by the id of their node."""
    nodes = {run.node.id: run.node for run in code if isinstance(run, Run)}
    found = {}
    for node in nodes.values():
        if isinstance(node, Op) and (edit := _Finder(nodes, copied).edit(node)) is not None:
            found[node.id] = edit
    return found


def find_visits(code: Sequence[Instruction], edits: Mapping[int, Edit]) -> dict[int, Visit]:
    """Visits by the place in the program where a request waits for the site."""
    found = {}
    for start, at in enumerate(code):
        if isinstance(at, At) and at.site is not None:
            visit = _visit(code, start, at.site, edits)
            if visit is not None:
                found[start] = visit
    return found


def _visit(code: Sequence[Instruction], start: int, site: str, edits: Mapping[int, Edit]) -> Visit | None:
    whole: set[int] = set()  # values that are the site itself
    constants: set[int] = set()
    made: set[int] = set()
    done: list[int] = []
    free: list[int] = []
    stop = start + 1
    while isinstance(run := code[stop], Run):
        node = run.node
        made.add(node.id)
        free += run.free
        stop += 1
        match node:
            case Read() if node.site == site:
                whole.add(node.id)
            case Op() if node.id in edits and node.writes == site and _is_one(node.args[0], whole):
                done.append(node.id)
            case Op(name="py.getitem") if _is_one(node.args[0], whole) and node.args[1] == _FULL:
                whole.add(node.id)
            case Const():
                constants.add(node.id)
            case Op() if _is_product(node, constants):  # part of the edit, since nothing else may see it
                pass
            case _:
                return None
    is_all = bool(done) and leaves_site(code, stop, site) and made <= set(free)
    return Visit(site, tuple(done), stop, tuple(free)) if is_all else None


def leaves_site(code: Sequence[Instruction], stop: int, site: str) -> bool:
    """Whether a program that goes on here surely has no more to do at the site."""
    match code[stop]:
        case At() as at:
            return at.site not in (site, None)  # one that waits for an iteration may be there already
        case Jump(target=target):
            return isinstance(code[target], IterNext)
        case _:
            return isinstance(code[stop], End)


def _is_one(arg: Arg, ids: set[int]) -> bool:
    return isinstance(arg, Ref) and arg.id in ids


def _is_product(node: Op, constants: set[int]) -> bool:
    """Whether it's a vector times a number: that never fails, so it needn't be run where its result is in a line."""
    if node.name not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return False
    return any(
        _is_one(one, constants) and isinstance(other, Ref) and other.id < 0
        for one, other in (node.args, reversed(node.args))
    )


class _Finder:
    def __init__(self, nodes: Mapping[int, object], copied: frozenset[int]) -> None:
        self._nodes = nodes
        self._copied = copied

    def edit(self, node: Op) -> Edit | None:
        name, rest = node.name, node.args[1:]
        if node.kwargs or not node.args or not isinstance(node.args[0], Ref):
            return None
        if name.startswith(PREFIX):
            return self._named(name.removeprefix(PREFIX).removesuffix("_"), rest)
        if name == "tensor.zero_" and not rest:
            return Edit("ablate")
        if name == "py.setitem" and rest[:1] == [_FULL] and len(rest) == 2:
            return self._replaced(rest[1])
        if len(rest) != 1:
            return None
        if name in ADDS:
            return self._added(rest[0], ADDS[name])
        if name in _SCALES and (number := self._number(rest[0])) is not None:
            return Edit("scale", (number,))
        return self._replaced(rest[0]) if name == "tensor.copy_" else None

    def _named(self, operation: str, rest: list[Arg]) -> Edit | None:
        if len(rest) != len(COLUMNS.get(operation, ())):
            return None
        values = []
        for column, arg in zip(COLUMNS[operation], rest, strict=True):
            value = self._vector(arg) if column.shape else self._number(arg)
            if value is None:
                return None
            values.append(value)
        return Edit(operation, tuple(values))

    def _added(self, arg: Arg, sign: int) -> Edit | None:
        vector, coefficient = self._vector(arg), None
        product = self._nodes.get(arg.id) if isinstance(arg, Ref) else None
        if vector is not None:
            return Edit("add", (vector, None), sign)
        if isinstance(product, Op) and product.name in _PRODUCTS and len(product.args) == 2 and not product.kwargs:
            for one, other in (product.args, reversed(product.args)):
                vector, coefficient = self._vector(one), self._number(other)
                if vector is not None and coefficient is not None:
                    return Edit("add", (vector, coefficient), sign)
        return None

    def _replaced(self, arg: Arg) -> Edit | None:
        vector = self._vector(arg)
        if vector is not None:
            return Edit("replace", (vector,))
        number = self._number(arg)
        return None if number is None else Edit("ablate", zero=number)

    def _vector(self, arg: Arg) -> int | None:
        """The parameter behind a constant that is as it was sent."""
        node = self._nodes.get(arg.id) if isinstance(arg, Ref) else None
        is_plain = isinstance(node, Const) and node.id not in self._copied and node.digest.startswith("-")
        return int(node.digest) if is_plain and isinstance(node, Const) else None

    @staticmethod
    def _number(arg: Arg) -> int | None:
        return arg.id if isinstance(arg, Ref) and arg.id < 0 else None
