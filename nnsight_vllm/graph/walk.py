"""Every node of a block, inner blocks included, in program order."""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_vllm.graph.nodes import (
    Block,
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
    Save,
    Stop,
    Write,
)
from nnsight_vllm.graph.order import last_trip


def nodes_of(block: Block) -> Iterator[Node]:
    """The block's nodes, each followed by those inside it."""
    for node in block.nodes:
        yield node
        for inner in blocks_of(node):
            yield from nodes_of(inner)


def blocks_of(node: Node) -> list[Block]:
    """The blocks inside a node."""
    match node:
        case Cond():
            return [node.then, node.orelse]
        case Loop() | Iterations():
            return [node.body]
        case _:
            return []


def count_nodes(graph: Graph, most: int) -> int:
    """How many nodes a graph has, counted until they are more than `most`. Without recursion: nobody has checked it yet."""
    due, found = [graph.body], 0
    while due and found <= most:
        block = due.pop()
        found += len(block.nodes)
        due += [inner for node in block.nodes for inner in blocks_of(node)]
    return found


def constants_of(block: Block) -> frozenset[str]:
    """Digests of the tensors that a block names."""
    return frozenset(node.digest for node in nodes_of(block) if isinstance(node, Const))


def sites_written(block: Block) -> frozenset[str]:
    """Names of the sites that a block changes."""
    nodes = list(nodes_of(block))
    assigned = {node.site for node in nodes if isinstance(node, Write)}
    return frozenset(assigned | {node.writes for node in nodes if isinstance(node, Op) and node.writes is not None})


def is_quiet(graph: Graph) -> bool:
    """Whether a graph sends nothing home and never stops its request."""
    return not any(isinstance(node, Save | Log | Stop | Export | Import) for node in nodes_of(graph.body))


def iteration_after(nodes: list[Node]) -> int | None:
    """The iteration at which a program stands behind these top-level nodes; None where it never gets there."""
    found = 0
    for node in nodes:
        if not isinstance(node, Iterations):
            within = nodes_of(Block([node]))
            found = max([found, *(one.iteration or 0 for one in within if isinstance(one, Read | Write | Import))])
        elif node.stop is None:
            return None
        else:
            found = last_trip(node.start, node.stop, node.step)
    return found
