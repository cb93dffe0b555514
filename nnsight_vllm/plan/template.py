"""Graph -> template and parameters: what graphs of like structure share, and what each has of its own.

Parameters are tensors, numbers (row indexes and slice bounds among them), the bounds of iterations and the keys of values that
pass between requests. In a template,
parameter k is the reference `-1 - k`; ids in a graph that came from outside are never negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Export,
    Graph,
    Import,
    Iterations,
    List,
    Log,
    Loop,
    Node,
    Op,
    Ref,
    Save,
    Slice,
    Special,
    Tuple,
    Write,
)


@dataclass(frozen=True)
class Digest:
    """A parameter that is a tensor, by its content."""

    text: str


@dataclass(frozen=True)
class Key:
    """A parameter that names a value of another request, or for others."""

    text: str


Parameter = Digest | Key | int | float


@dataclass(frozen=True)
class Template:
    """`graph`: the structure alone. `bounds`: parameters that are bounds of iterations, in order."""

    graph: Graph
    parameters: list[Parameter]
    bounds: tuple[int, ...]


def split(graph: Graph) -> Template:
    """Take the parameters out of a graph."""
    splitter = _Splitter()
    body = splitter.block(graph.body)
    return Template(Graph(body, graph.version), splitter.parameters, tuple(splitter.bounds))


def parameter_of(id: int) -> int:
    """The number of the parameter behind a negative id; the same the other way round."""
    return -1 - id


@dataclass
class _Splitter:
    parameters: list[Parameter] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)

    def take(self, value: Parameter) -> int:
        self.parameters.append(value)
        return -len(self.parameters)

    def block(self, block: Block) -> Block:
        return Block([self.node(node) for node in block.nodes], self.args(block.yields))

    def node(self, node: Node) -> Node:
        match node:
            case Op():
                kwargs = {key: self.arg(value) for key, value in node.kwargs.items()}
                return Op(node.id, node.name, self.args(node.args), kwargs, node.writes)
            case Const():
                return Const(node.id, str(self.take(Digest(node.digest))))
            case Export():
                return Export(node.id, str(self.take(Key(node.key))), self.arg(node.value))
            case Import():
                return Import(node.id, str(self.take(Key(node.key))), node.iteration)
            case Write():
                return Write(node.id, node.site, self.arg(node.value), node.iteration)
            case Save():
                return Save(node.id, node.name, self.arg(node.value))
            case Call():
                return Call(node.id, node.module, self.args(node.args))
            case Log():
                return Log(node.id, self.args(node.args))
            case Cond():
                return Cond(node.id, self.arg(node.test), self.block(node.then), self.block(node.orelse), node.outs)
            case Loop():
                over, inits = self.arg(node.over), self.args(node.inits)
                return Loop(node.id, over, node.item, self.block(node.body), node.carried, inits, node.outs)
            case Iterations():
                stop = None if node.stop is None else self.bound(node.stop)
                start, step = self.bound(node.start), self.bound(node.step)
                return Iterations(node.id, start, stop, step, node.index, self.block(node.body))
            case _:
                return node

    def bound(self, value: int) -> int:
        self.bounds.append(value)
        return self.take(value)

    def args(self, args: list[Arg]) -> list[Arg]:
        return [self.arg(arg) for arg in args]

    def arg(self, arg: Arg) -> Arg:
        match arg:
            case bool() | None | str() | Ref():
                return arg
            case int() | float():
                return Ref(self.take(arg))
            case Special() if arg.text in {"inf", "-inf", "nan"}:
                return Ref(self.take(float(arg.text)))
            case Slice():
                return Slice(self.arg(arg.start), self.arg(arg.stop), self.arg(arg.step))
            case List():
                return List(self.args(arg.items))
            case Tuple():
                return Tuple(self.args(arg.items))
            case Dict():
                return Dict([(key, self.arg(value)) for key, value in arg.items])
            case _:
                return arg
