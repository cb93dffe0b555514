"""Which values are dead after each node, by one reverse walk over a graph.

A value is freed after its last use. What a block takes from outside lives until the block's node is done, for a loop
may come back to it; what a block makes itself dies inside. A value made inside `iterations` may be used after it.
"""

from __future__ import annotations

from collections.abc import Iterable

from nnsight_vllm.graph.check import operands, refs
from nnsight_vllm.graph.nodes import Arg, Block, Cond, Iterations, Loop, Node
from nnsight_vllm.graph.walk import blocks_of


class Liveness:
    """`after[node id]`: ids to free once that node is done. `at_end[block]`: ids to free where a block ends."""

    def __init__(self, body: Block) -> None:
        self.after: dict[int, tuple[int, ...]] = {}
        self._at_end: dict[int, tuple[int, ...]] = {}
        self._walk(body, set())

    def at_end(self, block: Block) -> tuple[int, ...]:
        return self._at_end[id(block)]

    def _walk(self, block: Block, live_after: set[int]) -> None:
        yielded = _refs(block.yields)
        self._at_end[id(block)] = _sorted((yielded & _defined_in(block)) - live_after)
        live = live_after | yielded
        for node in reversed(block.nodes):
            used, made = uses(node), defines(node)
            self.after[node.id] = _sorted((used | made) - live)
            for inner in blocks_of(node):
                self._walk(inner, live | used | _held_in(node))
            live = (live - made) | used


def uses(node: Node) -> set[int]:
    """Ids from outside that a node or the blocks in it use."""
    found = _refs(operands(node))
    for block in blocks_of(node):
        found |= _uses_in(block)
    return found - _held_in(node)


def defines(node: Node) -> set[int]:
    """Ids that exist once the node is done."""
    match node:
        case Cond():
            return {node.id, *node.outs}
        case Loop():
            return {node.id, node.item, *node.carried, *node.outs}
        case Iterations():
            return {node.id, node.index, *_defined_in(node.body)}
        case _:
            return {node.id}


def _uses_in(block: Block) -> set[int]:
    found = _refs(block.yields)
    for node in block.nodes:
        found |= uses(node)
    return found - _defined_in(block)


def _defined_in(block: Block) -> set[int]:
    return set().union(*(defines(node) for node in block.nodes))


def _held_in(node: Node) -> set[int]:
    """Ids that a node itself sets anew at every trip."""
    match node:
        case Loop():
            return {node.item, *node.carried}
        case Iterations():
            return {node.index}
        case _:
            return set()


def _refs(args: Iterable[Arg]) -> set[int]:
    return {id for arg in args for id in refs(arg) if id >= 0}  # parameters live as long as the request


def _sorted(ids: set[int]) -> tuple[int, ...]:
    return tuple(sorted(ids))
