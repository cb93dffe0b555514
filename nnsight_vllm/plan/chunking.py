"""May a graph's prompt come in chunks, and what does it do with each?

What a graph does in iteration 0 falls into three:

    rows   done for every chunk: reads, operations row by row, edits of all rows or of known ones
    sent   values of rows that go home or into a container: every chunk keeps its own, and the last one joins them
    rest   done once, in the chunk with the prompt's last row: that row's values, logits, tokens, later iterations

A graph that has anything else, such as a mean over rows, needs its prompt in one, and `Unchunked` says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from nnsight_vllm.graph.check import operands, refs
from nnsight_vllm.graph.copying import Copier, ids_of
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Export,
    Graph,
    Import,
    Iterations,
    Log,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Stop,
    Write,
)
from nnsight_vllm.graph.ops import MAY_CHANGE, RANDOM, changes_container, is_inplace
from nnsight_vllm.graph.text import render
from nnsight_vllm.graph.walk import blocks_of, nodes_of
from nnsight_vllm.plan.chunks import Chunked, ChunkSave
from nnsight_vllm.plan.kinds import (
    CONTAINERS,
    NUMBER,
    Kinds,
    Of,
    RowRange,
    ValueKind,
    fits,
    is_counted_from_the_end,
    is_drawn,
)
from nnsight_vllm.plan.rows import Kind, is_fresh, rule_of

_SEVERAL = frozenset(["topk", "sort", "max", "min"])


@dataclass(frozen=True)
class Unchunked:
    """The prompt must be computed in one step. `reason`: a half-sentence."""

    reason: str


class _NeedsOneStep(Exception):
    pass


def chunking_of(
    graph: Graph, trailing: Callable[[str], int], rank: Callable[[str], int], num_rows: int
) -> Chunked | Unchunked:
    """For a prompt of `num_rows` tokens; the others are those of `Kinds`."""
    fresh = itertools.count(1 + max(ids_of(graph.body), default=0))
    nodes = list(_peeled(graph.body.nodes, fresh))
    chunker = _Chunker(trailing, rank, num_rows, fresh)
    try:
        for node in nodes:
            chunker.node(node)
    except _NeedsOneStep as error:
        return Unchunked(str(error))
    return Chunked(tuple(nodes), chunker.rows, chunker.sent, chunker.indexed, num_rows)


def _peeled(nodes: Iterable[Node], fresh: Iterator[int]) -> Iterator[Node]:
    """Blocks that begin with iteration 0, with that one written out before the others."""
    for node in nodes:
        if not isinstance(node, Iterations) or node.start != 0:
            yield node
            continue
        is_once = node.stop is not None and node.stop <= node.step
        ids = {} if is_once else {id: next(fresh) for id in ids_of(node.body)}
        yield from Copier(ids, {node.index: 0}, at=0).block(node.body).nodes
        if not is_once:
            yield Iterations(node.id, node.step, node.stop, node.step, node.index, node.body)


class _Chunker(Kinds):
    """Runs a graph on kinds. Raises `_NeedsOneStep`."""

    def __init__(
        self, trailing: Callable[[str], int], rank: Callable[[str], int], num_rows: int, fresh: Iterator[int]
    ) -> None:
        super().__init__(trailing, rank, num_rows)
        self.rows: dict[int, RowRange | None] = {}
        self.sent: dict[int, list[ChunkSave]] = {}
        self.indexed: dict[int, RowRange] = {}
        self._fresh = fresh
        self._several: dict[int, ValueKind] = {}  # operations with several results, and the kind of each of them
        self._depth = 0  # of branches and loops
        self._is_past = False  # iteration 0 is over

    def node(self, node: Node) -> None:
        match node:
            case Read():
                self._values[node.id] = self._read(node)
            case Write():
                self._write(node)
            case Const():
                self._values[node.id] = self._done(node, ValueKind(Of.CONSTANT, self._rank(node.digest)))
            case Op():
                self._values[node.id] = self._op(node)
            case Call():
                self._values[node.id] = self._call(node)
            case Save() | Export():
                self._send(node, [node.value])
            case Import():
                self._is_past |= node.iteration != 0
                self._values[node.id] = ValueKind(Of.MIXED, is_own=True)
            case Log() | Stop():
                self._rest(node)
            case Cond() | Loop():
                self._branch(node)
            case Iterations():
                self._later(node)
            case _:
                raise _NeedsOneStep(f"{render(Graph(Block([node])))} isn't known to do without the other rows")

    # -- sites -------------------------------------------------------------------------------------------------------

    def _read(self, node: Read) -> ValueKind:
        if is_drawn(node.site) or node.iteration != 0:
            self._is_past |= node.iteration != 0
            return ValueKind(Of.MIXED, is_late=True)
        return self._done(node, ValueKind(Of.ROWS, self._trailing(node.site), needs=0))

    def _write(self, node: Write) -> None:
        if is_drawn(node.site) or node.iteration != 0:
            self._is_past |= node.iteration != 0
            self._rest(node)
            return
        target = ValueKind(Of.ROWS, self._trailing(node.site), needs=0)
        if not fits(self.value(node.value), target):
            raise _NeedsOneStep(f"{node.site} is assigned a value that isn't made row by row")
        self._edit(node, target)

    # -- operations --------------------------------------------------------------------------------------------------

    def _op(self, node: Op) -> ValueKind:
        target = self.value(node.args[0]) if node.args else NUMBER
        if node.name in CONTAINERS or (changes_container(node.name) and target.is_own and target.of is Of.MIXED):
            self._send(node, operands(node))
            return ValueKind(Of.MIXED, is_own=True)
        if "out" in node.kwargs:
            raise _NeedsOneStep(f"{node.name} with out= isn't followed")
        if node.writes is not None or is_inplace(node.name) or (node.name in MAY_CHANGE and len(operands(node)) > 1):
            return self._change(node, target)
        found = self._computed_rows(node, target)
        if found is None:
            self._rest(node)
            used = [id for arg in operands(node) for id in refs(arg)]
            is_late = bool(used) and all(self._values[id].is_late for id in used if id in self._values)
            return ValueKind(Of.MIXED, is_own=is_fresh(node.name), is_late=is_late)
        self._number(node, target, found)
        return self._done(node, replace(found, is_own=is_fresh(node.name)))

    def _computed_rows(self, node: Op, target: ValueKind) -> ValueKind | None:
        """The kind of what is made row by row, or of constants."""
        name = node.name.partition(".")[2]
        if node.name in RANDOM:
            return None
        first = node.args[0] if node.args else None
        if isinstance(first, Ref) and first.id in self._several:
            return self._several[first.id] if _takes_one(node) else None
        if node.name == "nn.linear" and len(node.args) > 1 and not node.kwargs:
            is_plain = all(self.value(arg).of is Of.CONSTANT for arg in node.args[1:])
            return target if is_plain and target.is_rows and target.dims == 1 else None
        if name in _SEVERAL and rule_of(node.name).kind is Kind.LAST and self._dimension(node) == -1:
            if target.is_rows and target.dims >= 1:
                self._several[node.id] = target
                return target
            return None
        return self.computed(node)

    @staticmethod
    def _dimension(node: Op) -> Arg:
        rule = rule_of(node.name)
        return node.kwargs.get("dim", node.args[rule.dim] if len(node.args) > rule.dim else rule.default)

    def _call(self, node: Call) -> ValueKind:
        value = self.value(node.args[0]) if len(node.args) == 1 else NUMBER
        if value.is_rows and value.dims == 1:  # every module that can be called works on each row
            return self._done(node, replace(value, is_own=True))
        self._rest(node)
        return ValueKind(Of.MIXED, is_late=any(self.value(arg).is_late for arg in node.args))

    def _change(self, node: Op, base: ValueKind) -> ValueKind:
        """In place, on a site or on a value."""
        others: list[Arg] = [*node.args[1:], *node.kwargs.values()]
        is_known = rule_of(node.name).kind is Kind.POINTWISE or node.name.startswith("edit.")
        target = base
        if node.name == "py.setitem" and base.is_rows and len(node.args) == 3:
            part = self.part(base, node.args[1])
            target, others, is_known = part or ValueKind(Of.MIXED), [node.args[2]], part is not None
        if not base.is_rows:
            return self._change_other(node, base)
        if self.is_last(base.part) or self.is_last(target.part):
            self._rest(node, others)
            self._number(node, base, target)
            return base
        if node.name.startswith("edit."):  # its matrices act on each row
            others = [arg for arg in others if self.value(arg).of is not Of.CONSTANT]
        if not is_known or not all(fits(self.value(arg), target) for arg in others):
            raise _NeedsOneStep(f"{node.name} changes rows by values that aren't made row by row")
        self._number(node, base, target)
        self._edit(node, target)
        return target if node.name != "py.setitem" else base

    def _change_other(self, node: Op, target: ValueKind) -> ValueKind:
        """What isn't rows: done once, unless it's a constant, which all chunks may use."""
        if target.of is Of.CONSTANT:
            if node.name in RANDOM or any(self.value(arg).of is not Of.CONSTANT for arg in operands(node)):
                raise _NeedsOneStep(f"{node.name} changes a constant by other values")
            return self._edit(node, target)
        if node.writes is None and not (target.is_own or target.is_late):
            raise _NeedsOneStep(f"{node.name} changes a value that may be part of another one")
        self._rest(node)
        return target

    def takes_columns(self, item: Arg) -> bool:
        value = self.value(item) if isinstance(item, Ref) else NUMBER
        return value.of is Of.CONSTANT and value.dims == 1

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _branch(self, node: Cond | Loop) -> None:
        self._rest(node)
        outer = [*node.outs, *([node.item, *node.carried] if isinstance(node, Loop) else [])]
        self._values.update(dict.fromkeys(outer, ValueKind(Of.MIXED)))
        self._depth += 1
        for block in blocks_of(node):
            for inner in block.nodes:
                self.node(inner)
            self._rest(node, block.yields)
        self._depth -= 1

    def _later(self, node: Iterations) -> None:
        self._is_past = True
        for inner in nodes_of(node.body):
            self._rest(inner)
            for block in blocks_of(inner):
                self._rest(inner, block.yields)
        self._values.update(dict.fromkeys(ids_of(node.body), ValueKind(Of.MIXED, is_own=True, is_late=True)))

    # -- the three ---------------------------------------------------------------------------------------------------

    def _done(self, node: Node, value: ValueKind) -> ValueKind:
        """Done for every chunk, where it's of rows that may be in any; remembered outside of branches only."""
        if self._depth == 0 and not self.is_last(value.part) and value.of is not Of.MIXED:
            self.rows[node.id] = value.part
        return value

    def _edit(self, node: Node, target: ValueKind) -> ValueKind:
        if self._depth:
            raise _NeedsOneStep("rows are edited in a branch or a loop")
        return self._done(node, target)

    def _send(self, node: Node, args: Iterable[Arg]) -> None:
        for id in dict.fromkeys(id for arg in args for id in refs(arg) if self._is_of_rows(id)):
            value = self._values[id]
            if self._depth or self._is_past or id in self._several:
                raise _NeedsOneStep("rows are kept in a branch or a loop, after the prompt, or several results at once")
            at, joined, kept = next(self._fresh), next(self._fresh), next(self._fresh)
            self.sent.setdefault(node.id, []).append(ChunkSave(f"{at:064x}", id, value.part, at, joined, kept))

    def _rest(self, node: Node, args: Iterable[Arg] | None = None) -> None:
        """Done once: it may look at the last row, but at no other one."""
        used = operands(node) if args is None else args
        if any(self._is_of_rows(id) for arg in used for id in refs(arg)):
            what = node.name if isinstance(node, Op) else type(node).__name__.lower()
            raise _NeedsOneStep(f"{what} takes rows of the prompt together")

    def _is_of_rows(self, id: int) -> bool:
        value = self._values.get(id, NUMBER)
        return value.is_rows and not self.is_last(value.part)

    def _number(self, node: Op, base: ValueKind, found: ValueKind) -> None:
        """Remember an index whose rows have other numbers in a chunk."""
        if base.of is not Of.ROWS or found.part is None or node.name not in {"py.getitem", "py.setitem"}:
            return
        if not is_counted_from_the_end(node.args[1]):
            if self._depth:
                raise _NeedsOneStep("rows are chosen by their numbers in a branch or a loop")
            self.indexed[node.id] = found.part


def _takes_one(node: Op) -> bool:
    """Whether it takes one of several results by its name or number."""
    if node.name == "py.attr":
        return True
    return node.name == "py.getitem" and type(node.args[1]) is int
