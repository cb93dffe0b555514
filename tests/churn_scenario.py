"""Scenarios as literals: who arrives when with which prompt and graph, who is aborted, and in which engine.

A scenario's `repr` is the expression that makes it, so what a fuzzer prints can be pasted into a regression test.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

VOCABULARY = range(3, 500)  # without the special tokens
LENGTH = 84
WHOLE = 256
MAX_BLOCK = 64
TABLE = "table"


@dataclass(frozen=True)
class Prompt:
    """The first `shared` tokens of one of the texts that prompts share, then `own` tokens drawn by `seed`."""

    text: int = 0
    shared: int = 0
    own: int = 3
    seed: int = 0

    @property
    def ids(self) -> list[int]:
        return _tokens(self.text, LENGTH)[: self.shared] + _tokens(1000 + self.seed, self.own)

    def __len__(self) -> int:
        return self.shared + self.own


@dataclass(frozen=True)
class Graph:
    """A graph of a kind (churn_kinds.py), with what kinds have in common.

    It acts at iterations `first, first + step, ...` below `last`. `seed` draws its constants. Of kind `table`, it does
    `steps` at the site, by their names in generated.py, and saves `looks` of it.
    """

    kind: str
    layer: int = 1
    first: int = 0
    last: int | None = None
    step: int = 1
    seed: int = 0
    site: str = ""
    steps: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()

    def iterations(self, below: int) -> range:
        """Those it acts at in a request of this many tokens."""
        return range(self.first, below if self.last is None else min(self.last, below), self.step)


@dataclass(frozen=True)
class Ask:
    """One request. `n` samples; `stop` ends them where this text comes up."""

    prompt: Prompt
    graph: Graph | None = None
    max_tokens: int = 4
    temperature: float = 0.0
    n: int = 1
    seed: int = 0
    stop: str | None = None
    ignore_eos: bool = True
    penalty: float = 0.0

    @property
    def sampling(self) -> dict[str, object]:
        """vLLM's arguments. A seed always: random operations of a graph draw by it too."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "n": self.n,
            "seed": self.seed,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.penalty,
        }


@dataclass(frozen=True)
class Arrival:
    """A request that comes before the engine's step `at`, and is aborted before step `abort`."""

    ask: Ask
    at: int = 0
    abort: int | None = None


@dataclass(frozen=True)
class Scenario:
    """Requests in the order they are sent. With `front` they go through `Engine.run`, all at once."""

    arrivals: tuple[Arrival, ...]
    front: bool = False

    @property
    def plain(self) -> Scenario:
        """The same without graphs."""
        return replace(self, arrivals=tuple(replace(one, ask=replace(one.ask, graph=None)) for one in self.arrivals))

    @property
    def is_mixed(self) -> bool:
        """Whether requests with graphs and without are together."""
        return len({arrival.ask.graph is None for arrival in self.arrivals}) == 2


@dataclass(frozen=True)
class Settings:
    """An engine for scenarios. `step`: tokens that a step computes at most; requests alone have room for all of theirs.

    `memory`: tokens that the cache holds. `occurs`: classes of scenarios (churn_tally.py) that
    a fixed draw of a few dozen must contain, so that a fuzzer that no longer reaches them fails.
    """

    name: str
    arguments: dict[str, Any] = field(hash=False)
    step: int = WHOLE
    memory: int | None = None
    is_asynchronous: bool = False
    occurs: tuple[str, ...] = ()

    def has_room_for(self, samples: int, tokens: int) -> bool:
        """Whether the samples of a request alone fit into memory together, whole blocks each."""
        return self.memory is None or samples * -(-tokens // MAX_BLOCK) * MAX_BLOCK <= self.memory


def _tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(VOCABULARY, k=count)
