"""What the driver and an engine's process say to each other: JSON lines over pipes. Also what a measured piece of work gets.

A `Job` names its work as `module:function`. That function is called as `function(host, job)`, outside of the clock, and returns
what is run inside of it: everything that a user would do, from recording to looking at the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct, field

Kind = Literal["stock", "ours", "transformers", "nnsight"]
Sites = str | list[str]


class Start(Struct, frozen=True, forbid_unknown_fields=True):
    """Which engine a process is. `arguments` are those of `vllm.LLM`, the same for every engine of a run."""

    kind: Kind
    checkpoint: str
    arguments: dict[str, Any]
    sites: Sites = "all"


class Job(Struct, frozen=True, forbid_unknown_fields=True):
    """One run. `seed` decides the constants (vectors, ids), `options` are the work's own."""

    work: str
    prompts: list[list[int]]
    num_tokens: int
    seed: int
    options: dict[str, int] = field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, Any]:
        """vLLM's sampling parameters, the same for every engine."""
        return {"temperature": 0.0, "max_tokens": self.num_tokens, "ignore_eos": True}


class Done(Struct, frozen=True, tag="done"):
    """What a run took, and what it delivered."""

    seconds: float
    tokens: list[list[int]]
    num_complete: int
    numbers: list[float]


class Ready(Struct, frozen=True, tag="ready"):
    """The engine runs; `seconds` it took to start."""

    seconds: float
    versions: dict[str, str]


class Failed(Struct, frozen=True, tag="failed"):
    """A traceback of the engine's process."""

    error: str


Reply = Done | Ready | Failed


@dataclass(frozen=True)
class Host:
    """What a piece of work runs on: `engine` is a `vllm.LLM`, our `VLLM`, or a peer's model; `dtype` is the model's."""

    engine: Any
    hidden: int
    num_layers: int
    vocab: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Delivered:
    """What a run brought home: generated ids by request, how many requests had all their values, numbers to compare."""

    tokens: list[list[int]]
    num_complete: int = 0
    numbers: list[float] = dataclasses.field(default_factory=list)


Work = Callable[[Host, Job], Callable[[], Delivered]]
