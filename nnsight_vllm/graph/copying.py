"""Copies of nodes under other names: of the values that they use, and of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from nnsight_vllm.graph.nodes import (
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


@dataclass(frozen=True)
class Copier:
    """`ids`: other ids for what the copied nodes define. `values`: what stands for the values that they use.

    `iteration`: that of sites whose iteration is their block's own.
    """

    ids: Mapping[int, int] = field(default_factory=dict)
    values: Mapping[int, Arg] = field(default_factory=dict)
    iteration: int | None = None

    def block(self, block: Block) -> Block:
        return Block([self.node(node) for node in block.nodes], self._args(block.yields))

    def node(self, node: Node) -> Node:
        id = self._id(node.id)
        match node:
            case Read():
                return Read(id, node.site, self._iteration(node.iteration))
            case Write():
                return Write(id, node.site, self._arg(node.value), self._iteration(node.iteration))
            case Op():
                kwargs = {key: self._arg(value) for key, value in node.kwargs.items()}
                return Op(id, node.name, self._args(node.args), kwargs, node.writes)
            case Const():
                return Const(id, node.digest)
            case Call():
                return Call(id, node.module, self._args(node.args))
            case Save():
                return Save(id, node.name, self._arg(node.value))
            case Export():
                return Export(id, node.key, self._arg(node.value))
            case Import():
                return Import(id, node.key, node.iteration)
            case Log():
                return Log(id, self._args(node.args))
            case Stop():
                return Stop(id)
            case Cond():
                then, orelse = self.block(node.then), self.block(node.orelse)
                return Cond(id, self._arg(node.test), then, orelse, self._ids(node.outs))
            case Loop():
                over, inits, body = self._arg(node.over), self._args(node.inits), self.block(node.body)
                return Loop(id, over, self._id(node.item), body, self._ids(node.carried), inits, self._ids(node.outs))
            case Iterations():
                index = self._id(node.index)
                return Iterations(id, node.start, node.stop, node.step, index, self.block(node.body))

    def _id(self, id: int) -> int:
        return self.ids.get(id, id)

    def _ids(self, ids: list[int]) -> list[int]:
        return [self._id(id) for id in ids]

    def _iteration(self, iteration: int | None) -> int | None:
        return self.iteration if iteration is None else iteration

    def _args(self, args: list[Arg]) -> list[Arg]:
        return [self._arg(arg) for arg in args]

    def _arg(self, arg: Arg) -> Arg:
        return replaced(arg, lambda ref: self.values.get(ref.id, Ref(self._id(ref.id))))


def replaced(arg: Arg, change: Callable[[Ref], Arg]) -> Arg:
    """An argument with other values in it."""
    match arg:
        case Ref():
            return change(arg)
        case Slice():
            return Slice(*(replaced(end, change) for end in (arg.start, arg.stop, arg.step)))
        case List():
            return List([replaced(item, change) for item in arg.items])
        case Tuple():
            return Tuple([replaced(item, change) for item in arg.items])
        case Dict():
            return Dict([(replaced(key, change), replaced(value, change)) for key, value in arg.items])
        case _:
            return arg
