"""What a stream yields, and what the engine hands on for it: one step of one sample of one request."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.trace.backend import Backend, ModelBackend, Outcome, Request, Result


@dataclass(frozen=True)
class Event:
    """What one step of a request brought.

    `invoke` is the request's index in the trace, `sample` that of its completion where `n > 1`. `text` and `token_ids`
    continue what came before. `values` has what the step saved, by the names that the values are bound to; of a saved list
    it has the new items, and `replaced` names those lists of which the items that came before don't hold any more.

    `finish_reason` is set in the sample's last event, `failure` too if its graph failed. With `restarted` the engine had
    evicted the request and runs it again from its prompt: all that came of this invoke is void.
    """

    invoke: int
    sample: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    logs: tuple[str, ...] = ()
    finish_reason: str | None = None
    failure: InterventionError | None = None
    restarted: bool = False


@dataclass(frozen=True)
class Notice:
    """An event as the engine has it: `values` and `replaced` by the names of the graph's saves.

    `result` comes with the last notice of a request.
    """

    request: int
    sample: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    values: dict[str, object] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    logs: tuple[str, ...] = ()
    finish_reason: str | None = None
    failure: Failure | None = None
    result: Result | None = None
    restarted: bool = False


Receive = Callable[[Notice], None]


class RunningTrace(Protocol):
    """The requests of one trace, running. `outcomes` is done when nothing of them is left in the engine."""

    outcomes: Future[list[Outcome]]

    def abort(self) -> None:
        """End the requests. Returns at once; any thread may call it, and more than once."""


class AsyncBackend(Backend, Protocol):
    """An engine that runs traces while their callers do something else."""

    def start(self, requests: list[Request], tensors: dict[str, bytes], receive: Receive | None = None) -> RunningTrace:
        """Send the requests off. `receive` gets notices as they come, on a thread of the engine's; it mustn't block."""


class AsyncModelBackend(AsyncBackend, ModelBackend, Protocol):
    """The same as the model's own object sees it."""

    @property
    def event_loop(self) -> AbstractEventLoop:
        """What it lives on, on a thread of its own."""
