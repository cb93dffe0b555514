"""Graph -> template and parameters: what graphs of like structure share, and what each has of its own.

Parameters are tensors, numbers (row indexes and slice bounds among them), the bounds of iterations and the keys of values that
pass between requests. In a template,
parameter k is the reference `-1 - k`; ids in a graph that came from outside are never negative.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnsight_vllm.graph.copying import Rewriter
from nnsight_vllm.graph.nodes import Arg, Const, Export, Graph, Import, Iterations, Node, Ref, Special


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


class _Splitter(Rewriter):
    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.bounds: list[int] = []

    def take(self, value: Parameter) -> int:
        self.parameters.append(value)
        return -len(self.parameters)

    def node(self, node: Node) -> Node:
        match node:
            case Const():
                return Const(node.id, str(self.take(Digest(node.digest))))
            case Export():
                return Export(node.id, str(self.take(Key(node.key))), self.arg(node.value))
            case Import():
                return Import(node.id, str(self.take(Key(node.key))), node.iteration)
            case Iterations():
                stop = None if node.stop is None else self.bound(node.stop)
                start, step = self.bound(node.start), self.bound(node.step)
                return Iterations(node.id, start, stop, step, node.index, self.block(node.body))
            case _:
                return super().node(node)

    def bound(self, value: int) -> int:
        self.bounds.append(value)
        return self.take(value)

    def key(self, key: Arg) -> Arg:
        return key

    def leaf(self, arg: Arg) -> Arg:
        match arg:
            case Ref() | bool():
                return arg
            case int() | float():
                return Ref(self.take(arg))
            case Special() if arg.text in {"inf", "-inf", "nan"}:
                return Ref(self.take(float(arg.text)))
            case _:
                return arg
