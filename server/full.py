"""The full form of an intervention, a whole graph in the body: read, counted and found legal. And what a lowered one is."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from nnsight_vllm.errors import NNsightError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import from_json
from nnsight_vllm.graph.nodes import Block, Graph, Iterations, Op, Ref, Save
from nnsight_vllm.graph.walk import constants_of, count_nodes, nodes_of
from nnsight_vllm.server import metrics
from nnsight_vllm.server.errors import Refused, require_at_most
from nnsight_vllm.server.schema import Intervention
from nnsight_vllm.server.tensor_refs import TensorRefs
from nnsight_vllm.trace.tree import Tree


@dataclass(frozen=True)
class SaveForm:
    """How a saved value comes home.

    `over_iterations`: a list with an item for each, told as one tensor with a leading iteration axis where shapes agree.
    `stream`: each item with the token that it belongs to.
    """

    over_iterations: bool
    stream: bool


@dataclass(frozen=True)
class Lowered:
    """`tensors`: those that the graph names, by digest. `names`: what it saves."""

    graph: Graph
    tensors: dict[str, bytes]
    names: dict[str, SaveForm]


def lower_full(intervention: Intervention, tree: Tree, refs: TensorRefs, max_nodes: int) -> Lowered:
    """The graph that the body holds, checked, with its tensors. Raises `Refused`."""
    param = "intervention.graph"
    try:
        graph = from_json(msgspec.json.encode(intervention.graph))
        require_size(graph, max_nodes, param)  # before the check, whose time grows with it
        check(graph, tree.catalogue)
    except NNsightError as error:
        raise refused_at(error, param) from None
    except (RecursionError, OverflowError, ValueError, TypeError) as error:  # JSON that msgspec doesn't write
        if isinstance(error, Refused):
            raise
        raise Refused(f"not an intervention graph: {error}", param) from None
    for name in sorted(constants_of(graph.body)):
        refs.find(name, param)
    refs.refuse_unused()
    lists = _names_of(graph)
    for i, name in enumerate(intervention.stream):
        if name not in lists:
            raise Refused(
                f"the graph saves no {name[:64]!r}; it saves {sorted(lists)[:20]}", f"intervention.stream[{i}]"
            )
    streamed = frozenset(intervention.stream)
    return Lowered(graph, refs.used, {name: SaveForm(over, name in streamed) for name, over in lists.items()})


def require_size(graph: Graph, most: int, param: str) -> None:
    """Count its nodes. Raises `Refused` for too many."""
    found = count_nodes(graph, most)
    require_at_most(most, found, "nodes in a graph", param)
    metrics.nodes.inc(found)


def _names_of(graph: Graph) -> dict[str, bool]:
    """What a graph saves, and whether it grows with the iterations: saved in or behind a block of them, or a list filled there."""
    blocks = [node for node in graph.body.nodes if isinstance(node, Iterations)]
    inside = list(nodes_of(Block(list(blocks))))
    filled = {arg.id for node in inside if isinstance(node, Op) for arg in node.args[:1] if isinstance(arg, Ref)}
    found: dict[str, bool] = {}
    is_behind = False
    for node in graph.body.nodes:
        is_behind = is_behind or isinstance(node, Iterations)
        for save in (one for one in nodes_of(Block([node])) if isinstance(one, Save)):
            is_filled = isinstance(save.value, Ref) and save.value.id in filled
            found[save.name] = found.get(save.name, False) or is_behind or is_filled
    return found


def refused_at(error: NNsightError, param: str) -> Refused:
    """An error of ours, for a stranger."""
    return Refused(str(error).removesuffix("; in the request"), param, kind=type(error).__name__)
