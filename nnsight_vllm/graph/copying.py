"""Copies of nodes under other names: of the values that they use, and of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nnsight_vllm.graph.nodes import (
    NESTED,
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Export,
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
    Stop,
    Tuple,
    Write,
)
from nnsight_vllm.graph.walk import nodes_of


def ids_of(block: Block) -> Iterator[int]:
    """All ids that a block defines, inner blocks included."""
    for node in nodes_of(block):
        yield node.id
        match node:
            case Cond():
                yield from node.outs
            case Loop():
                yield from (node.item, *node.carried, *node.outs)
            case Iterations():
                yield node.index
            case _:
                pass


class Rewriter:
    """Rebuilds nodes, each with what stands in it in the order in which it is printed. As it is here nothing changes."""

    def block(self, block: Block) -> Block:
        return Block([self.node(node) for node in block.nodes], self.args(block.yields))

    def node(self, node: Node) -> Node:
        id = self.id(node.id)
        match node:
            case Op():
                kwargs = {key: self.arg(value) for key, value in node.kwargs.items()}
                return Op(id, node.name, self.args(node.args), kwargs, node.writes)
            case Read():
                return Read(id, node.site, self.iteration(node.iteration))
            case Write():
                return Write(id, node.site, self.arg(node.value), self.iteration(node.iteration))
            case Const():
                return Const(id, node.digest)
            case Call():
                return Call(id, node.module, self.args(node.args))
            case Save():
                return Save(id, node.name, self.arg(node.value))
            case Export():
                return Export(id, node.key, self.arg(node.value))
            case Import():
                return Import(id, node.key, node.iteration)
            case Log():
                return Log(id, self.args(node.args))
            case Stop():
                return Stop(id)
            case Cond():
                test, then, orelse = self.arg(node.test), self.block(node.then), self.block(node.orelse)
                return Cond(id, test, then, orelse, self._ids(node.outs))
            case Loop():
                over, inits, body = self.arg(node.over), self.args(node.inits), self.block(node.body)
                return Loop(id, over, self.id(node.item), body, self._ids(node.carried), inits, self._ids(node.outs))
            case Iterations():
                return Iterations(id, node.start, node.stop, node.step, self.id(node.index), self.block(node.body))

    def args(self, args: list[Arg]) -> list[Arg]:
        return [self.arg(arg) for arg in args]

    def arg(self, arg: Arg) -> Arg:
        return self._nested(arg) if type(arg) in NESTED else self.leaf(arg)

    def _nested(self, arg: Arg) -> Arg:
        match arg:
            case Slice():
                return Slice(self.arg(arg.start), self.arg(arg.stop), self.arg(arg.step))
            case List():
                return List(self.args(arg.items))
            case Tuple():
                return Tuple(self.args(arg.items))
            case Dict():
                return Dict([(self.key(key), self.arg(value)) for key, value in arg.items])
            case _:
                raise AssertionError(type(arg))

    def key(self, key: Arg) -> Arg:
        """A key of a dict."""
        return self.arg(key)

    def leaf(self, arg: Arg) -> Arg:
        """An argument that has no others in it."""
        return arg

    def id(self, id: int) -> int:
        return id

    def iteration(self, iteration: int | None) -> int | None:
        """That of a site."""
        return iteration

    def _ids(self, ids: list[int]) -> list[int]:
        return [self.id(id) for id in ids]


@dataclass(frozen=True)
class Copier(Rewriter):
    """`ids`: other ids for what the copied nodes define. `values`: what stands for the values that they use.

    `at`: the iteration of sites whose iteration is their block's own.
    """

    ids: Mapping[int, int] = field(default_factory=dict)
    values: Mapping[int, Arg] = field(default_factory=dict)
    at: int | None = None

    def leaf(self, arg: Arg) -> Arg:
        return self.values.get(arg.id, Ref(self.id(arg.id))) if isinstance(arg, Ref) else arg

    def id(self, id: int) -> int:
        return self.ids.get(id, id)

    def iteration(self, iteration: int | None) -> int | None:
        return self.at if iteration is None else iteration
