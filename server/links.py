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


Event = tuple[int, int]
"""A request and an iteration: the moment at which it may begin that."""


def check_links(requests: Sequence[Linked]) -> None:
    """Raise `Refused` unless the links are those of the graphs, and every value that is waited for will be made."""
    for i, request in enumerate(requests):
        _check_own(request, f"requests[{i}].links")
    makers = _makers(requests)
    waits: dict[Event, set[Event]] = {}
    for i, request in enumerate(requests):
        for need in request.links.needs if request.links is not None else ():
            if need.key not in makers:
                raise Refused(f"no request of the trace makes {need.key!r}", f"requests[{i}].links.needs")
            waits.setdefault((i, need.iteration), set()).add(makers[need.key])
    _refuse_circles(waits)


def _check_own(request: Linked, param: str) -> None:
    """The links against the request's own graphs."""
    links = request.links
    if links is not None and (links.bundle or links.size):
        raise Refused("the server says which bundle it is", f"{param}.bundle")
    if links is not None and request.graphs and links.program >= len(request.graphs):
        raise Refused(f"the request has {len(request.graphs)} graphs, no number {links.program}", f"{param}.program")
    for number, graph in enumerate(request.graphs):
        exported = [node.key for node in graph.body.nodes if isinstance(node, Export)]
        imported = [(node.key, node.iteration, node.id) for node in graph.body.nodes if isinstance(node, Import)]
        if links is None or number != links.program:
            if exported or imported:
                raise Refused(
                    f"graph {number} of the request exports or imports values that its links don't name", param
                )
            continue
        if len(set(exported)) < len(exported) or len({key for key, _, _ in imported}) < len(imported):
            raise Refused("a graph exports, and imports, each key once", param)
        if sorted(links.makes) != sorted(exported):
            raise Refused(
                f"the graph exports {sorted(exported)[:8]}, the links make {sorted(links.makes)[:8]}", f"{param}.makes"
            )
        if sorted((need.key, need.iteration, need.node) for need in links.needs) != sorted(imported):
            raise Refused("the links need other values than those that the graph imports", f"{param}.needs")
    if links is not None and not request.graphs and (links.makes or links.needs):
        raise Refused("a request without graphs makes and needs nothing", param)
    if links is not None and links.makes and request.n > 1:
        raise Refused(f"values of a request with n={request.n} can't be another one's", param)


def _makers(requests: Sequence[Linked]) -> dict[str, Event]:
    """By key, the request that makes the value, and the iteration that has to be over for it."""
    found: dict[str, Event] = {}
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
            now: int | None = 0  # the iteration at which the program stands; None: it never gets there
            for node in graph.body.nodes:
                if isinstance(node, Export):
                    yield i, node.key, now
                    continue
                then = iteration_after([node])
                if now is not None:
                    now = then if then is None or isinstance(node, Iterations) else max(now, then)


def _refuse_circles(waits: dict[Event, set[Event]]) -> None:
    """`waits`: what has to be over before a request may begin an iteration."""
    begins: dict[int, list[int]] = {}
    for request, iteration in waits:
        begins.setdefault(request, []).append(iteration)
    order: TopologicalSorter[Event] = TopologicalSorter()
    for request, iterations in begins.items():
        iterations.sort()
        for before, after in itertools.pairwise(iterations):
            order.add((request, after), (request, before))
    for event, until in waits.items():
        for maker, iteration in until:
            waited = begins.get(maker, [])
            place = bisect.bisect_right(waited, iteration)
            if place:
                order.add(event, (maker, waited[place - 1]))
    try:
        order.prepare()
    except CycleError as error:
        circle = sorted({request for request, _ in error.args[1]})
        raise Refused(
            f"the requests {circle[:8]} wait for each other's values", f"requests[{circle[0]}].links"
        ) from None
