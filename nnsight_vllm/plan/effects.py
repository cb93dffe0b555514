"""What a graph changes in place, and which of its lists only collect: both decide how requests may be batched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nnsight_vllm.graph.check import operands, refs
from nnsight_vllm.graph.nodes import Arg, Cond, Graph, Loop, Node, Op, Read, Ref, Save
from nnsight_vllm.graph.ops import MAY_CHANGE, is_inplace
from nnsight_vllm.graph.walk import blocks_of, nodes_of
from nnsight_vllm.plan.rows import is_fresh

ANY = -(2**62)  # stands for whatever the branches of a cond or the trips of a loop may hand on


def changes(node: Op) -> bool:
    """Whether an operation may change one of its arguments, containers aside."""
    return is_inplace(node.name) or node.name in MAY_CHANGE or "out" in node.kwargs


def changed(nodes: Iterable[Node]) -> set[int]:
    """Values that aren't sites and that an in-place operation may reach, under whatever name."""
    roots: dict[int, set[int]] = {}
    found: set[int] = set()
    for node in nodes:
        _add_roots(node, roots)
        if isinstance(node, Op) and node.writes is None:
            found |= {root for arg in _targets(node) for id in refs(arg) for root in roots.get(id, {id})}
    return found


def changes_through_views(nodes: Iterable[Node]) -> bool:
    """Whether a site is changed through something else than itself or an index of it."""
    sites: set[int] = set()
    plain: set[int] = set()
    for node in nodes:
        if isinstance(node, Op) and node.writes is not None and not _is_ref(node.args[:1], plain):
            return True
        if isinstance(node, Read):
            sites.add(node.id)
            plain.add(node.id)
        elif isinstance(node, Op) and node.name == "py.getitem" and _is_ref(node.args[:1], sites):
            plain.add(node.id)
    return False


def _is_ref(args: list[Arg], ids: set[int]) -> bool:
    return bool(args) and isinstance(args[0], Ref) and args[0].id in ids


def streams(graph: Graph) -> dict[int, str]:
    """Lists that are made and saved at the graph's top level and after that only appended to: id -> name.

    What is appended must not change later, for a list holds its items and not copies of them.
    """
    nodes = list(nodes_of(graph.body))
    names = _saved_lists(graph)
    uses = Counter(id for node in nodes for arg in operands(node) for id in refs(arg))
    uses.update(id for node in nodes for block in blocks_of(node) for arg in block.yields for id in refs(arg))
    appends = [node for node in nodes if isinstance(node, Op) and _appends(node)]
    touched = changed(nodes)
    roots: dict[int, set[int]] = {}
    for node in nodes:
        _add_roots(node, roots)
    if ANY in touched:
        return {}
    safe: Counter[int] = Counter()
    places = {node.id: place for place, node in enumerate(nodes)}
    saves = {node.value.id: places[node.id] for node in nodes if isinstance(node, Save) and isinstance(node.value, Ref)}
    for node in appends:
        (target, item) = node.args
        assert isinstance(target, Ref)
        reached = {root for id in refs(item) for root in roots.get(id, {id})}
        is_kept = not reached & touched and not (ANY in reached and touched)
        is_late = saves.get(target.id, len(nodes)) < places[node.id]
        if is_kept and is_late and uses[node.id] == 0 and isinstance(item, Ref) and item.id not in names:
            safe[target.id] += 1
    return {id: name for id, name in names.items() if uses[id] == 1 + safe[id]}


def _saved_lists(graph: Graph) -> dict[int, str]:
    found: dict[int, str] = {}
    made: set[int] = set()
    for node in graph.body.nodes:
        if isinstance(node, Op) and node.name == "py.list" and not node.args:
            made.add(node.id)
        if isinstance(node, Save) and isinstance(node.value, Ref) and node.value.id in made:
            found[node.value.id] = node.name
    names = Counter(node.name for node in nodes_of(graph.body) if isinstance(node, Save))
    return {id: name for id, name in found.items() if names[name] == 1}


def _appends(node: Op) -> bool:
    return node.name == "py.append" and len(node.args) == 2 and isinstance(node.args[0], Ref)


def _targets(node: Op) -> list[Arg]:
    changes = is_inplace(node.name) or node.name in MAY_CHANGE
    first: list[Arg] = [*node.args, *([node.kwargs["input"]] if "input" in node.kwargs else [])][:1] if changes else []
    return [*first, *([node.kwargs["out"]] if "out" in node.kwargs else [])]


def _add_roots(node: Node, roots: dict[int, set[int]]) -> None:
    roots[node.id] = _roots(node, roots)
    if isinstance(node, Cond | Loop):
        handed = [*node.outs, *([node.item, *node.carried] if isinstance(node, Loop) else [])]
        roots.update({id: {id, ANY} for id in handed})


def _roots(node: Node, roots: dict[int, set[int]]) -> set[int]:
    """Values whose memory this one may share, itself included; a site's own memory doesn't count."""
    if isinstance(node, Read):
        return set()
    if isinstance(node, Op) and is_fresh(node.name):
        return {node.id}
    return {node.id, *(root for arg in operands(node) for id in refs(arg) for root in roots.get(id, {id}))}
