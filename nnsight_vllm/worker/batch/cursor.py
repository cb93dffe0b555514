"""Where a program stands: that of a request which runs by itself, or of a group of requests which run as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.plan.program import SAMPLES, Program
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


Frame = LoopFrame | IterationsFrame


class Place(Protocol):
    """The site where a program stands."""

    name: str


@dataclass(eq=False, kw_only=True)
class Cursor(ABC):
    """`pc`: the next instruction. `site`: where the program waits (None: at the iteration's beginning), `lag` iterations from now.

    `order`: how far it is in this iteration, as the model fires. `node`: the one that runs. `env`: node id -> value.

    `number`: which of its request's programs it is. `size`: so many requests run here, each of which `spent` what that says.
    """

    program: Program = field(default_factory=lambda: Program(()))
    pc: int = 0
    node: int | None = None
    env: dict[int, Any] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    site: str | None = None
    lag: int = 1
    order: int = START
    place: Place | None = None
    spent: Spent = field(default_factory=Spent)
    is_over: bool = False
    number: int = 0
    size: int = 1

    @abstractmethod
    def end(self) -> None:
        """The program is over."""

    @abstractmethod
    def stop(self, keep_token: bool) -> None:
        """The program ends what it belongs to."""

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

    def keeps_token(self, orders: Mapping[str, int]) -> bool:
        """Whether this iteration's token was drawn and seen before the program got here."""
        return self.order >= orders[SAMPLES]

    def leave_iteration(self) -> None:
        self.place = None
        self.order = START
