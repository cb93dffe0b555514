"""Graph -> Program: a tree of blocks becomes a flat tuple of instructions with jumps.

The graph is assumed legal. A program holds no tensors and no state of a request, so it's shared by all requests whose
graphs differ in nothing but their parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nnsight_vllm.graph.check import refs
from nnsight_vllm.graph.codec import decode, digest, encode
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Graph,
    Import,
    Iterations,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Stop,
    Write,
)
from nnsight_vllm.graph.ops import is_inplace
from nnsight_vllm.graph.walk import is_quiet, nodes_of
from nnsight_vllm.plan import effects
from nnsight_vllm.plan.edits import Edit, find_edits
from nnsight_vllm.plan.fused import FusedSite, find_fused
from nnsight_vllm.plan.instructions import (
    At,
    Branch,
    End,
    Free,
    Halt,
    Instruction,
    IterBegin,
    IterNext,
    Jump,
    LoopBegin,
    LoopNext,
    Move,
    Run,
)
from nnsight_vllm.plan.liveness import Liveness
from nnsight_vllm.plan.rows import is_fresh
from nnsight_vllm.plan.template import Parameter, split

SAMPLES = "samples.output"
# Operators that only read what stands on their right.
_READERS = frozenset(
    f"py.{name}" for name in ("add", "sub", "mul", "truediv", "matmul", "getitem", "pow", "gt", "lt", "ge", "le")
)


@dataclass(frozen=True)
class Program:
    """A graph's structure, ready to run. A negative id is a parameter of the request, constants included.

    `edits`: nodes that a table's kernel can do. `fused`: by their place in the code, sites where it does nothing but those, or
    nothing but collect.

    `copied` are the `const` and `import` nodes whose tensor some in-place operation might reach: they get a copy, the
    original is everybody's. `writes_samples` says that it may replace a drawn token. `streams`: the lists that only collect what is
    sent home, by the name they are saved under. `changes_values`: something is changed in place that isn't a site.
    `is_quiet`: it never sends anything home, nor stops the request; `saves` are the names that it sends under.
    `keeps_together`: requests in the midst of it can't be told apart from one another's memory, so they don't run as a
    group that a branch may part.
    """

    code: tuple[Instruction, ...]
    edits: Mapping[int, Edit] = field(default_factory=dict)
    fused: Mapping[int, FusedSite] = field(default_factory=dict)
    copied: frozenset[int] = frozenset()
    writes_samples: bool = False
    streams: Mapping[int, str] = field(default_factory=dict)
    changes_values: bool = False
    keeps_together: bool = False
    is_quiet: bool = False
    saves: frozenset[str] = frozenset()

    def __str__(self) -> str:
        width = len(str(len(self.code) - 1))
        return "\n".join(f"{i:{width}}  {instruction}" for i, instruction in enumerate(self.code))


def compile_graph(graph: Graph) -> Program:
    """The program of a legal graph, or of a template."""
    nodes = list(nodes_of(graph.body))
    changes_values = bool(effects.changed(nodes))
    may_part = any(isinstance(node, Cond | Loop) for node in nodes)
    code, copied = _Compiler(graph).run(), _copied(nodes)
    edits, streams = find_edits(code, copied), effects.streams(graph)
    return Program(
        code=code,
        edits=edits,
        fused=find_fused(code, edits, streams),
        copied=copied,
        writes_samples=any(_written_site(node) == SAMPLES for node in nodes),
        streams=streams,
        changes_values=changes_values,
        keeps_together=may_part and (changes_values or effects.changes_through_views(nodes)),
        is_quiet=is_quiet(graph),
        saves=frozenset(node.name for node in nodes if isinstance(node, Save)),
    )


class ProgramCache:
    """Programs by their graph's structure; the least recently used leave first. `hits` and `misses` count look-ups."""

    def __init__(self, check: Callable[[Graph], None], max_programs: int = 512) -> None:
        self._check = check
        self._max_programs = max_programs
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._checked: OrderedDict[tuple[str, tuple[int, ...]], None] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, data: bytes) -> tuple[Program, list[Parameter]]:
        """The program of these graph bytes, and what the graph has of its own. Raises what decoding and checking raise."""
        return self.of(decode(data))

    def of(self, graph: Graph) -> tuple[Program, list[Parameter]]:
        """The same for a graph that is decoded already."""
        template = split(graph)
        key = digest(encode(template.graph))
        self._check_once(graph, key, template.bounds)
        if key in self._programs:
            self.hits += 1
        else:
            self.misses += 1
            self._programs[key] = compile_graph(template.graph)
        _touch(self._programs, key, self._max_programs)
        return self._programs[key], template.parameters

    def _check_once(self, graph: Graph, key: str, bounds: tuple[int, ...]) -> None:
        """Legality is a question of structure and of the iterations' bounds; other parameters don't bear on it."""
        if (key, bounds) not in self._checked:
            self._check(graph)
            self._checked[key, bounds] = None
        _touch(self._checked, (key, bounds), 8 * self._max_programs)


def _touch(cache: OrderedDict[Any, Any], key: object, limit: int) -> None:
    cache.move_to_end(key)
    if len(cache) > limit:
        cache.popitem(last=False)


class _Compiler:
    """Emits instructions in program order; jump targets are filled in once they are known."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.live = Liveness(graph.body)
        self.code: list[Instruction] = []
        self.at: At | None = None  # where every path to the next instruction stands

    def run(self) -> tuple[Instruction, ...]:
        self.block(self.graph.body)
        self.emit(End())
        return tuple(self.code)

    def emit(self, instruction: Instruction) -> int:
        self.code.append(instruction)
        return len(self.code) - 1

    def label(self) -> int:
        """The next instruction can be jumped to, so nothing is known about where the request stands."""
        self.at = None
        return len(self.code)

    def block(self, block: Block) -> None:
        for node in block.nodes:
            self.node(node)

    def node(self, node: Node) -> None:
        match node:
            case Cond():
                self.cond(node)
            case Loop():
                self.loop(node)
            case Iterations():
                self.iterations(node)
            case Stop():
                self.emit(Halt(node.id))
            case _:
                if isinstance(node, Read | Write):
                    self.wait(At(node.site, node.iteration))
                elif isinstance(node, Import):
                    self.wait_for_iteration(node.iteration)
                self.emit(Run(node, self.dead_after(node)))

    def wait(self, at: At) -> None:
        if at != self.at:
            self.emit(at)
            self.at = at

    def wait_for_iteration(self, iteration: int) -> None:
        is_there = self.at is not None and self.at.iteration is not None and self.at.iteration >= iteration
        if not is_there:
            self.wait(At(None, iteration))

    def cond(self, node: Cond) -> None:
        branch = self.emit(Branch(node.id, node.test, 0))
        before = self.at
        self.block(node.then)
        self.leave(node.outs, node.then)
        jump = self.emit(Jump(0))
        self.patch(branch, self.label())
        self.at = before
        self.block(node.orelse)
        self.leave(node.outs, node.orelse)
        self.patch(jump, self.label())
        self.free(node)

    def loop(self, node: Loop) -> None:
        self.emit(LoopBegin(node.id, node.over))
        if node.carried:
            self.emit(Move(tuple(node.carried), tuple(node.inits)))
        top = self.label()
        head = self.emit(LoopNext(node.item, 0))
        self.block(node.body)
        self.leave(node.carried, node.body)
        self.emit(Jump(top))
        self.patch(head, self.label())
        if node.outs:
            carried = tuple(Ref(id) for id in node.carried)
            self.emit(Move(tuple(node.outs), carried))
        self.free(node)

    def iterations(self, node: Iterations) -> None:
        self.emit(IterBegin(_bound(node.start), _bound(node.stop), _bound(node.step)))
        top = self.label()
        head = self.emit(IterNext(node.index, 0))
        self.emit(At(None, None))
        self.block(node.body)
        self.emit(Jump(top))
        self.patch(head, self.label())
        self.free(node)

    def leave(self, ids: list[int], block: Block) -> None:
        """End of a block: its values go to `ids`."""
        free = self.live.at_end(block)
        if ids or free:
            self.emit(Move(tuple(ids), tuple(block.yields), free))

    def free(self, node: Node) -> None:
        if ids := self.dead_after(node):
            self.emit(Free(ids))

    def dead_after(self, node: Node) -> tuple[int, ...]:
        """Values to free once the node is done; only some kinds of nodes have a value of their own."""
        dead = self.live.after[node.id]
        return (
            dead if isinstance(node, Read | Op | Const | Call | Import) else tuple(id for id in dead if id != node.id)
        )

    def patch(self, index: int, target: int) -> None:
        match self.code[index]:
            case Branch() | Jump() as jump:
                self.code[index] = replace(jump, target=target)
            case LoopNext() | IterNext() as step:
                self.code[index] = replace(step, exit=target)


def _bound(value: int | None) -> Arg:
    """A bound in a template is the number of a parameter."""
    return Ref(value) if value is not None and value < 0 else value


def _copied(nodes: list[Node]) -> frozenset[int]:
    """Constants and imports that leave their node under another name (a view, a container, a branch's result) or are changed."""
    if not any(isinstance(node, Op) and effects.changes(node) for node in nodes):
        return frozenset()
    constants = {node.id for node in nodes if isinstance(node, Const | Import)}
    return frozenset(id for node in nodes for arg in _aliased(node) for id in refs(arg) if id in constants)


def _aliased(node: Node) -> list[Arg]:
    """Arguments that a node may hand on as they are, or change."""
    match node:
        case Op() if is_fresh(node.name) and not effects.changes(node):
            return [*node.kwargs.values()]
        case Op():
            is_reader = not effects.changes(node) and node.name.partition(".")[0] != "py"
            first = node.args[:1] if is_reader or node.name in _READERS or is_inplace(node.name) else node.args
            return [*first, *node.kwargs.values()]
        case Cond():
            return [*node.then.yields, *node.orelse.yields]
        case Loop():
            return [node.over, *node.inits, *node.body.yields]
        case _:
            return []


def _written_site(node: Node) -> str | None:
    match node:
        case Write():
            return node.site
        case Op():
            return node.writes
        case _:
            return None
