"""Which requests of a stranger's trace hand values to each other: nothing that its graphs don't say, and nobody waits for himself.

The engine believes links, for it doesn't read graphs before they run. So what a client sends has to be what its graphs
export and import, no more and no less; the bundle's name and size are ours to give.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.nodes import Export, Graph, Import, Iterations
from nnsight_vllm.graph.walk import iteration_after
from nnsight_vllm.server.errors import Refused


@dataclass(frozen=True)
class Linked:
    """A request's graphs, in the order in which they run, its links, and how many samples it has."""

    graphs: Sequence[Graph]
    links: Links | None
    n: int


Moment = tuple[int, int]
"""A request and an iteration: the moment at which it may begin that."""


def check_links(requests: Sequence[Linked]) -> None:
    """Raise `Refused` unless the links are those of the graphs, and every value that is waited for will be made."""
    for i, request in enumerate(requests):
        _check_own(request, f"requests[{i}].links")
    makers = _makers(requests)
    needs = [(i, need) for i, one in enumerate(requests) if one.links is not None for need in one.links.needs]
    waits: dict[Moment, set[Moment]] = {}
    for i, need in needs:
        if need.key not in makers:
            raise Refused(f"no request of the trace makes {need.key!r}", f"requests[{i}].links.needs")
        waits.setdefault((i, need.iteration), set()).add(makers[need.key])
    _refuse_circles(waits)


def _check_own(request: Linked, param: str) -> None:
    """The links against the request's own graphs."""
    links = request.links or Links()
    if links.bundle or links.size:
        raise Refused("the server says which bundle it is", f"{param}.bundle")
    if request.links is not None and request.graphs and links.program >= len(request.graphs):
        raise Refused(f"the request has {len(request.graphs)} graphs, no number {links.program}", f"{param}.program")
    for number, graph in enumerate(request.graphs):
        if request.links is not None and number == links.program:
            _check_graph(graph, links, param)
        elif any(isinstance(node, Export | Import) for node in graph.body.nodes):
            raise Refused(f"graph {number} of the request exports or imports values that its links don't name", param)
    if not request.graphs and (links.makes or links.needs):
        raise Refused("a request without graphs makes and needs nothing", param)
    if links.makes and request.n > 1:
        raise Refused(f"values of a request with n={request.n} can't be another one's", param)


def _check_graph(graph: Graph, links: Links, param: str) -> None:
    """The links against the graph that they are of."""
    exported = [node.key for node in graph.body.nodes if isinstance(node, Export)]
    imported = [(node.key, node.iteration, node.id) for node in graph.body.nodes if isinstance(node, Import)]
    if len(set(exported)) < len(exported) or len({key for key, _, _ in imported}) < len(imported):
        raise Refused("a graph exports, and imports, each key once", param)
    if sorted(links.makes) != sorted(exported):
        message = f"the graph exports {sorted(exported)[:8]}, the links make {sorted(links.makes)[:8]}"
        raise Refused(message, f"{param}.makes")
    if sorted((need.key, need.iteration, need.node) for need in links.needs) != sorted(imported):
        raise Refused("the links need other values than those that the graph imports", f"{param}.needs")


def _makers(requests: Sequence[Linked]) -> dict[str, Moment]:
    """By key, the request that makes the value, and the iteration that has to be over for it."""
    found: dict[str, Moment] = {}
    for i, key, iteration in _exports(requests):
        if key in found:
            raise Refused(f"requests {found[key][0]} and {i} both make {key!r}", f"requests[{i}].links.makes")
        if iteration is None:
            raise Refused(f"{key!r} is never made: the iterations before it have no end", f"requests[{i}].graph")
        found[key] = (i, iteration)
    return found


def _exports(requests: Sequence[Linked]) -> Iterator[tuple[int, str, int | None]]:
    for i, request in enumerate(requests):
        for graph in request.graphs:
            yield from ((i, key, iteration) for key, iteration in _exported(graph))


def _exported(graph: Graph) -> Iterator[tuple[str, int | None]]:
    now: int | None = 0  # the iteration at which the program stands; None: it never gets there
    for node in graph.body.nodes:
        if isinstance(node, Export):
            yield node.key, now
        elif now is not None:
            then = iteration_after([node])
            now = then if then is None or isinstance(node, Iterations) else max(now, then)


def _refuse_circles(waits: dict[Moment, set[Moment]]) -> None:
    """`waits`: what has to be over before a request may begin an iteration."""
    moments = sorted(waits)
    order: TopologicalSorter[Moment] = TopologicalSorter()
    for before, after in itertools.pairwise(moments):
        if before[0] == after[0]:
            order.add(after, before)
    for moment, made in ((moment, made) for moment, until in waits.items() for made in until):
        place = bisect.bisect_right(moments, made)  # behind the last moment up to it at which its maker waits itself
        if place and moments[place - 1][0] == made[0]:
            order.add(moment, moments[place - 1])
    try:
        order.prepare()
    except CycleError as error:
        circle = sorted({request for request, _ in error.args[1]})
        raise Refused(
            f"the requests {circle[:8]} wait for each other's values", f"requests[{circle[0]}].links"
        ) from None
