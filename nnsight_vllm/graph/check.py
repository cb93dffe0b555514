"""Is a graph legal for this model? The same question for our own recordings and for a stranger's bytes.

Checked here, before anything runs: ids are unique and defined before use in a scope that sees them, operations are in
the table, sites and modules exist and may be used this way, sites come in the order in which the model fires them.
"""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.catalogue import Catalogue, ModuleInfo, SiteInfo
from nnsight_vllm.graph.nodes import (
    NESTED,
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Dtype,
    Export,
    Graph,
    Import,
    Iterations,
    List,
    Log,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Special,
    Stop,
    Tuple,
    Write,
)
from nnsight_vllm.graph.ops import OPS, is_inplace
from nnsight_vllm.graph.order import OrderCursor

MAX_DEPTH = 64
MAX_KEY = 64
_DTYPES = """
float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 bool complex64 complex128 float half long int double short
uint16 uint32 uint64 float8_e4m3fn float8_e5m2
"""
DTYPES = frozenset(_DTYPES.split())
Scopes = tuple[set[int], ...]
"""Ids, by the blocks that define them, from outside in: a copy of all for every inner block would take forever for many."""
ARGUMENTS = {"py.getitem": 2, "py.setitem": 3, "py.append": 2, "py.attr": 2}
"""How many arguments the operations take that plans look into."""
_HEX = frozenset("0123456789abcdef")


def refs(arg: Arg) -> Iterator[int]:
    """Ids of the values that an argument uses."""
    for leaf in leaves(arg) if type(arg) in NESTED else (arg,):
        if type(leaf) is Ref:
            yield leaf.id


def leaves(arg: Arg) -> Iterator[Arg]:
    """The arguments in this one that have no others in them, itself perhaps."""
    match arg:
        case Slice():
            parts = [arg.start, arg.stop, arg.step]
        case List() | Tuple():
            parts = arg.items
        case Dict():
            parts = [part for pair in arg.items for part in pair]
        case _:
            yield arg
            return
    for part in parts:
        yield from leaves(part)


def operands(node: Node) -> list[Arg]:
    """The arguments a node evaluates itself (those of inner blocks not included)."""
    match node:
        case Op():
            return [*node.args, *node.kwargs.values()]
        case Call() | Log():
            return list(node.args)
        case Write() | Save() | Export():
            return [node.value]
        case Cond():
            return [node.test]
        case Loop():
            return [node.over, *node.inits]
        case _:
            return []


def check(graph: Graph, catalogue: Catalogue) -> None:
    """Raise `GraphError` or `OutOfOrderError` unless `graph` may run on the model that `catalogue` describes."""
    Checker(catalogue).run(graph)


class Checker:
    """One pass over a graph in program order."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.sites: dict[str, SiteInfo] = {site.name: site for site in catalogue.sites}
        self.modules: dict[str, ModuleInfo] = {module.path: module for module in catalogue.modules}
        self.cursor = OrderCursor()
        self.ids: set[int] = set()

    def run(self, graph: Graph) -> None:
        try:
            self._block(graph.body, (), 0)
        except RecursionError:
            raise GraphError("the graph is nested too deeply") from None

    def _block(self, block: Block, seen: Scopes, depth: int) -> set[int]:
        """Check a block; `seen` are the ids it may use, by the blocks around it. Returns the ids it defines."""
        if depth > MAX_DEPTH:
            raise GraphError(f"blocks are nested more than {MAX_DEPTH} deep")
        defined: set[int] = set()
        for node in block.nodes:
            for arg in operands(node):
                self._arg(arg, seen, defined, node.id)
            defined |= self._node(node, (*seen, defined), depth)
        for arg in block.yields:
            self._arg(arg, seen, defined, -1)
        return defined

    def _node(self, node: Node, seen: Scopes, depth: int) -> set[int]:
        self._define(node.id)
        match node:
            case Read():
                self.cursor.touch(node.site, self._site(node.site, node.id).order, node.iteration)
            case Write():
                self._write(node)
            case Op():
                self._op(node)
            case Call():
                self._call(node)
            case Const():
                if len(node.digest) != 64 or not _HEX.issuperset(node.digest):
                    raise GraphError(f"node {node.id}: a constant is named by 64 hex digits, got {node.digest[:80]!r}")
            case Cond():
                return {node.id, *self._cond(node, seen, depth)}
            case Loop():
                return {node.id, *self._loop(node, seen, depth)}
            case Iterations():
                return {node.id, *self._iterations(node, seen, depth)}
            case Export() | Import():
                self._across(node, depth)
            case Save() | Log() | Stop():
                pass
        return {node.id}

    def _across(self, node: Export | Import, depth: int) -> None:
        kind = "an export" if isinstance(node, Export) else "an import"
        if depth:
            raise GraphError(
                f"node {node.id}: {kind} stands at the top level of a graph, this one is inside of a block"
            )
        if not 0 < len(node.key) <= MAX_KEY:
            raise GraphError(f"node {node.id}: a key has 1 to {MAX_KEY} characters, got {len(node.key)}")
        if isinstance(node, Import):
            self.cursor.wait(node.iteration)

    def _op(self, node: Op) -> None:
        if node.name not in OPS:
            raise GraphError(f"node {node.id}: no operation {node.name!r}")
        takes = ARGUMENTS.get(node.name)
        if takes is not None and (len(node.args) != takes or node.kwargs):
            given = f"{len(node.args)} and {len(node.kwargs)} by name"
            raise GraphError(f"node {node.id}: {node.name} takes {takes} arguments by position, got {given}")
        if node.writes is None:
            return
        site = self._site(node.writes, node.id)
        if not is_inplace(node.name) and "out" not in node.kwargs:
            raise GraphError(f"node {node.id}: {node.name} doesn't work in place, so it can't write {node.writes}")
        reason = site.refuse_write or site.refuse_inplace
        if reason:
            raise GraphError(f"node {node.id}: {node.writes} can't be changed in place: {reason}")
        iteration = None if self.cursor.inside is not None else self.cursor.at.iteration
        self.cursor.touch(node.writes, site.order, iteration)

    def _write(self, node: Write) -> None:
        site = self._site(node.site, node.id)
        if site.refuse_write:
            raise GraphError(f"node {node.id}: {node.site} can't be assigned: {site.refuse_write}")
        self.cursor.touch(node.site, site.order, node.iteration)

    def _call(self, node: Call) -> None:
        module = self.modules.get(node.module)
        if module is None:
            raise GraphError(f"node {node.id}: no module {node.module!r}")
        if module.refuse_call:
            raise GraphError(f"node {node.id}: {node.module} can't be called: {module.refuse_call}")

    def _cond(self, node: Cond, seen: Scopes, depth: int) -> list[int]:
        start = self.cursor.at
        self._block(node.then, seen, depth + 1)
        end = self.cursor.at
        self.cursor.at = start
        self._block(node.orelse, seen, depth + 1)
        self.cursor.join(end)
        self._same_length(node.id, node.outs, node.then.yields, node.orelse.yields)
        self._define(*node.outs)
        return node.outs

    def _loop(self, node: Loop, seen: Scopes, depth: int) -> list[int]:
        self._define(node.item, *node.carried)
        self.cursor.enter_loop()
        self._block(node.body, (*seen, {node.item, *node.carried}), depth + 1)
        self.cursor.leave_loop()
        self._same_length(node.id, node.outs, node.carried, node.inits, node.body.yields)
        self._define(*node.outs)
        return node.outs

    def _iterations(self, node: Iterations, seen: Scopes, depth: int) -> set[int]:
        self._define(node.index)
        with self.cursor.iterations(node.id, node.start, node.stop, node.step):
            return self._block(node.body, (*seen, {node.index}), depth + 1)

    def _define(self, *ids: int) -> None:
        for id in ids:
            if id < 0:
                raise GraphError(f"an id is a number from 0 on, got {id}")
            if id in self.ids:
                raise GraphError(f"the id {id} is defined twice")
            self.ids.add(id)

    def _site(self, name: str, node: int) -> SiteInfo:
        site = self.sites.get(name)
        if site is None:
            raise GraphError(f"node {node}: no site {name!r}")
        return site

    def _arg(self, arg: Arg, seen: Scopes, defined: set[int], node: int) -> None:
        for id in refs(arg):
            if id not in defined and not any(id in scope for scope in seen):
                raise GraphError(f"node {node}: value {id} isn't defined here")
        for leaf in leaves(arg):
            if isinstance(leaf, Dtype) and leaf.name not in DTYPES:
                raise GraphError(f"node {node}: no dtype {leaf.name!r}")
            if isinstance(leaf, Special) and leaf.text not in {"inf", "-inf", "nan"}:
                raise GraphError(f"node {node}: no special float {leaf.text!r}")

    @staticmethod
    def _same_length(node: int, *lists: list[Arg] | list[int]) -> None:
        if len({len(items) for items in lists}) > 1:
            raise GraphError(f"node {node}: its results and the values of its blocks differ in number")
