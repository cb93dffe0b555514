"""Where a program stands: that of a request which runs by itself, or of a group of requests which run as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nnsight_vllm.errors import InterventionError, OutOfOrderError
from nnsight_vllm.plan.program import SAMPLES, Program
from nnsight_vllm.worker.batch.step import Step
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors
from nnsight_vllm.worker.ops.usage import Spent

START = -1
"""The iteration before the first one, and the order before an iteration's first site."""


@dataclass
class LoopFrame:
    """The items of a loop; those from `position` on are still to come. In a group each is a lane."""

    items: list[Any]
    position: int = 0


@dataclass
class IterationsFrame:
    """A block that runs at iterations `upcoming, upcoming + step, ...` below `stop`: integers, in a group one a member."""

    upcoming: Any
    stop: Any
    step: Any
    current: Any

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self.upcoming, self.stop, self.step, self.current


BlockFrame = LoopFrame | IterationsFrame


class Place(Protocol):
    """The site where a program stands."""

    name: str


@dataclass(eq=False, kw_only=True)
class Cursor(ABC):
    """`pc`: the next instruction. `site`: where the program waits (None: at the iteration's beginning), `lag` iterations from now.

    `iteration`: the one that runs or ran last; in a group one a member.

    `order`: how far it is in this iteration, as the model fires; `has_token`: it has seen the token that was drawn. `node`: the
    one that runs. `env`: node id -> value.

    `number`: which of its request's programs it is. `size`: so many requests run here, each of which `spent` what that says.
    """

    program: Program = field(default_factory=lambda: Program(()))
    pc: int = 0
    node: int | None = None
    env: dict[int, Any] = field(default_factory=dict)
    frames: list[BlockFrame] = field(default_factory=list)
    site: str | None = None
    lag: int = 1
    iteration: Any = START
    order: int = START
    has_token: bool = False
    place: Place | None = None
    spent: Spent = field(default_factory=Spent)
    is_over: bool = False
    number: int = 0
    size: int = 1

    @abstractmethod
    def arrive(self, site: Site, tensors: Tensors, step: Step, at_logits: bool) -> None:
        """Stand at a site, with the rows that the step has of it. Without `at_logits` those are all rows of the request."""

    @abstractmethod
    def end(self) -> None:
        """The program is over."""

    @abstractmethod
    def stop(self, keep_token: bool) -> None:
        """The program ends what it belongs to."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Fail whoever is still running here."""

    @abstractmethod
    def remaining(self) -> Cursor | None:
        """Without those that are over; None: nobody is left."""

    @abstractmethod
    def held(self) -> list[tuple[Spent, int]]:
        """Bytes of values, of which constants aren't: the store has those, and bounds them."""

    def go_to(self, site: str, order: int) -> None:
        """The program is at this site now, or has done all that it does there."""
        self.order, self.has_token, self.place = order, site == SAMPLES, None

    @property
    def innermost(self) -> IterationsFrame:
        """The block whose iteration an instruction without one means."""
        for frame in reversed(self.frames):
            if isinstance(frame, IterationsFrame):
                return frame
        raise InterventionError("a site without an iteration outside of an iterations block")

    def point(self) -> tuple[object, ...] | None:
        """Those with equal points may run as one; None: with nobody."""
        if self.lag or self.program.keeps_together or any(isinstance(frame, LoopFrame) for frame in self.frames):
            return None
        return id(self.program), self.pc, len(self.frames), self.site, self.number

    def leave_iteration(self) -> None:
        """The iteration is over; what the program still waits for in it will never come."""
        if self.site is not None and self.lag <= 0 and not self.is_over:
            iteration = int(np.ravel(self.iteration)[0])
            self.fail(OutOfOrderError(f"the model ran iteration {iteration} without passing {self.site}"))
        self.place = None
        self.order, self.has_token = START, False
