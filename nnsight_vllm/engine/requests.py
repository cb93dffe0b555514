"""One request with a graph, while the engine runs it: where its program stands and what it holds."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nnsight_vllm.engine.places import Place
from nnsight_vllm.engine.results import Outbox, describe
from nnsight_vllm.errors import InterventionError, OutOfOrderError
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.plan.program import Program

START = -1


class Status(enum.Enum):
    RUNNING = "running"
    ENDED = "ended"  # the program is over, or the request was stopped
    FAILED = "failed"


@dataclass(frozen=True)
class Arrival:
    """A new request as the engine hands it over. `prompt_length` in tokens; `graph` as msgpack bytes.

    `refuse_samples`: why the sampled token can't be replaced, empty where it can.
    """

    request_id: str
    graph: bytes
    prompt_length: int
    seed: int
    refuse_samples: str = ""


@dataclass(frozen=True)
class Span:
    """A request's rows in one step: `start:stop` of the step's rows, the first at `position` of the request.

    `index`: its place in the batch, and the row of its last token where each request has one row.
    """

    request_id: str
    index: int
    start: int
    stop: int
    position: int


@dataclass(frozen=True)
class Wait:
    """What a program waits for. No site: the iteration's beginning."""

    site: str | None
    iteration: int


@dataclass
class LoopFrame:
    items: Iterator[Any]


@dataclass
class IterationsFrame:
    upcoming: Iterator[int]
    current: int = START


Frame = LoopFrame | IterationsFrame


@dataclass
class Request:
    """`pc`: the next instruction. `env`: node id -> value. `order`: how far the program is in this iteration."""

    id: str
    prompt_length: int
    seed: int
    program: Program = field(default_factory=lambda: Program((), frozenset(), frozenset(), False))
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    status: Status = Status.RUNNING
    pc: int = 0
    node: int | None = None
    env: dict[int, Any] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    wait: Wait = Wait(None, 0)
    iteration: int = START
    order: int = START
    place: Place | None = None
    num_drawn: int = 0
    outbox: Outbox = field(default_factory=Outbox)

    @property
    def is_running(self) -> bool:
        return self.status is Status.RUNNING

    def absolute(self, iteration: int | None) -> int:
        """An instruction's iteration; None is that of the innermost `iterations` block."""
        if iteration is not None:
            return iteration
        for frame in reversed(self.frames):
            if isinstance(frame, IterationsFrame):
                return frame.current
        raise InterventionError("a site without an iteration outside of an iterations block")

    def expects(self, span: Span) -> bool:
        """Whether the step computes just what comes next: the whole prompt, or the one next position."""
        if self.iteration == START:
            return span.position == 0 and span.stop - span.start == self.prompt_length
        return span.stop - span.start == 1 and span.position == self.prompt_length + self.iteration

    def place_at(self, site: str) -> Place:
        """The place at this site, if that's where the program is."""
        if self.place is None or self.place.name != site:
            raise OutOfOrderError(f"{site} can't be changed any more: the program has left it")
        return self.place

    def draw_seed(self) -> int:
        """A seed for the next random operation, the same alone and in any batch."""
        self.num_drawn += 1
        data = hashlib.sha256(f"{self.seed}:{self.num_drawn}".encode()).digest()
        return int.from_bytes(data[:7], "little")

    def leave_iteration(self) -> None:
        self.place = None
        self.order = START

    def end(self) -> None:
        self._finish(Status.ENDED)

    def stop(self, keep_token: bool) -> None:
        self.outbox.stop(keep_token)
        self._finish(Status.ENDED)

    def fail(self, error: BaseException, keep_token: bool) -> None:
        """The request's own failure: nobody else hears of it."""
        retryable = isinstance(error, InterventionError) and error.retryable
        self.outbox.fail(Failure(type(error).__name__, describe(error), self.node, retryable), keep_token)
        self._finish(Status.FAILED)

    def _finish(self, status: Status) -> None:
        self.status = status
        self.place = None
        self.env, self.constants = {}, {}
        self.frames = []
