"""How scenarios are drawn: few different prompts and graphs, so that requests meet in the cache and in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from churn_kinds import KINDS
from churn_scenario import LENGTH, TABLE, Arrival, Ask, Graph, Prompt, Scenario, Settings
from churn_table import SITES, TABLE_LOOKS, TABLE_STEPS
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS

# Hypothesis' own way to draw makes five of six examples by copying parts of the one before; under another name it doesn't.
INDEPENDENT = "independent"
AVAILABLE_PROVIDERS[INDEPENDENT] = AVAILABLE_PROVIDERS["hypothesis"]

SHARED = [0, 0, 20, 32, 33, 50, 64, 70]
BLOCK = 32
STOPS = [None, None, None, "e", "th", "A"]

_layers = st.integers(0, 3)
_firsts = st.sampled_from([0, 0, 0, 0, 1, 2])
_lengths = st.sampled_from([None, None, None, 1, 2, 3])
_steps = st.sampled_from([1, 1, 1, 2])
_seeds = st.integers(0, 2)

_where: dict[str, Any] = {"layer": _layers, "first": _firsts, "last": _lengths, "step": _steps, "seed": _seeds}
_written = st.builds(Graph, st.sampled_from(sorted(KINDS)), **_where)
_ending = st.builds(
    Graph, st.sampled_from([name for name in sorted(KINDS) if name.startswith(("stops", "fails"))]), **_where
)
_of_table = st.builds(
    Graph,
    st.just(TABLE),
    **_where,
    site=st.sampled_from(SITES),
    steps=st.lists(st.sampled_from(TABLE_STEPS), max_size=3).map(tuple),
    looks=st.lists(st.sampled_from(TABLE_LOOKS), max_size=2).map(tuple),
)
graphs = st.one_of(_written, _written, _written, _of_table, _of_table, _ending).map(
    lambda graph: graph if graph.last is None else replace(graph, last=graph.first + graph.last)
)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    shared = draw(st.sampled_from(SHARED))
    own = draw(st.integers(1 if shared else 3, 24))
    if draw(st.booleans()):  # soon behind a block's end, so that another block will be needed
        own += -(shared + own) % BLOCK - draw(st.integers(1, 6))
    return Prompt(draw(st.integers(0, 1)), shared, max(1, min(own, LENGTH - shared)), draw(_seeds))


@st.composite
def asks(draw: st.DrawFn, settings: Settings, pool: list[Graph]) -> Ask:
    """One request: without a graph, or with one of the pool, its constants often its own."""
    graph = draw(st.sampled_from([None, *pool, *pool]))
    if graph is not None and draw(st.booleans()):
        graph = replace(graph, seed=draw(_seeds))
    prompt = draw(prompts())
    least = 1 if graph is None else max(graph.first + 1, KINDS[graph.kind].tokens if graph.kind in KINDS else 1)
    max_tokens = max(draw(st.integers(1, 12)), least)
    is_sampled = draw(st.sampled_from([False, False, True]))
    n = draw(st.sampled_from([1, 1, 2])) if is_sampled else 1
    return Ask(
        prompt,
        graph,
        max_tokens,
        temperature=0.8 if is_sampled else 0.0,
        n=n if settings.has_room_for(n, len(prompt) + max_tokens) else 1,
        seed=draw(_seeds),
        stop=draw(st.sampled_from(STOPS)),
        ignore_eos=draw(st.booleans()),
        penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
    )


@st.composite
def scenarios(draw: st.DrawFn, settings: Settings) -> Scenario:
    pool = draw(st.lists(graphs, min_size=1, max_size=3))
    found = draw(st.lists(asks(settings, pool), min_size=2, max_size=6))
    for number in draw(st.lists(st.integers(0, len(found) - 1), max_size=2)):  # the second turn, or the same again
        found.append(replace(found[number], seed=draw(_seeds), prompt=replace(found[number].prompt, seed=draw(_seeds))))
    if draw(st.sampled_from([False, False, False, True])):
        return Scenario(tuple(Arrival(ask) for ask in found), front=True)
    spread = draw(st.sampled_from([0, 3, 12]))
    arrivals = []
    for ask in found:
        at = draw(st.integers(0, spread))
        abort = at + draw(st.integers(1, 8)) if draw(st.integers(0, 7)) == 0 else None
        arrivals.append(Arrival(ask, at, abort))
    return Scenario(tuple(arrivals))
