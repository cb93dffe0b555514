"""How several graphs of one request and the prefix cache may meet, given how each of them may.

Rows are what all graphs that change rows make of them, in their order; the others bear on nothing in the cache. When one
fails or stops the request, those that only edit go on as long as the engine computes rows for it, and the others end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnsight_vllm.plan.caching import Caching, Salt

_STRICTNESS = [Salt.NONE, Salt.GRAPH, Salt.LENGTH, Salt.PROMPT, Salt.UNIQUE]


@dataclass(frozen=True)
class Composed:
    """As `Caching` has it; `covers`: numbers of the graphs that the blocks depend on, in order."""

    salt: Salt
    most: int | None
    first: int
    covers: tuple[int, ...]


def composed(graphs: Sequence[Caching]) -> Composed:
    """The strictest of them, from the first row on that any changes; it reads what all of them may."""
    covers = tuple(number for number, graph in enumerate(graphs) if graph.salt is not Salt.NONE)
    salt = max((graph.salt for graph in graphs), key=_STRICTNESS.index, default=Salt.NONE)
    if _may_be_cut_off(graphs):
        salt = Salt.UNIQUE
    first = min((graphs[number].first for number in covers), default=0)
    most = [graph.most for graph in graphs if graph.most is not None]
    if salt in (Salt.PROMPT, Salt.UNIQUE):  # plain blocks only
        most.append(first)
    return Composed(salt, min(most, default=None), first, covers)


def _may_be_cut_off(graphs: Sequence[Caching]) -> bool:
    """Whether one that isn't part of the salt may end another amid its edits of the prompt."""
    breaks = any(graph.breaks and graph.salt is Salt.NONE for graph in graphs)
    return breaks and any(graph.salt is not Salt.NONE and not graph.is_quiet for graph in graphs)
