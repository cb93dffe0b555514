"""Program order against the model's firing order: one cursor per request.

The cursor stands at (iteration, order of a site) and only moves forward. Inside an `iterations` block the iteration
is the block's own, and only the order counts. The recorder and the checker of foreign graphs share this class, so
what can be recorded and what is legal are the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from nnsight_vllm.errors import OutOfOrderError

START = -1


def last_trip(start: int, stop: int, step: int) -> int:
    """The last of the iterations `start, start + step, ...` below `stop`."""
    return start + (stop - 1 - start) // step * step


@dataclass(frozen=True)
class ProgramPoint:
    """Where a program stands. `ended` after an unbounded `iterations` block: nothing more can be touched."""

    iteration: int = 0
    order: int = START
    ended: bool = False

    def is_after(self, other: ProgramPoint) -> bool:
        return (self.ended, self.iteration, self.order) > (other.ended, other.iteration, other.order)


class OrderCursor:
    """Moves over the model while a program is recorded or checked."""

    def __init__(self) -> None:
        self.at = ProgramPoint()
        self.inside: int | None = None  # id of the open iterations block
        self._loop_anchor: list[tuple[ProgramPoint, ProgramPoint | None]] = []

    def touch(self, site: str, order: int, iteration: int | None) -> None:
        """Go to a site. Raises `OutOfOrderError` if the model has passed it."""
        target = ProgramPoint(self.at.iteration if iteration is None else iteration, order)
        if self.at.ended:
            raise OutOfOrderError(
                f"{site} comes after an unbounded iteration block; only tracer.result can be read there"
            )
        if (iteration is None) != (self.inside is not None):
            raise OutOfOrderError(f"{site}: a fixed iteration inside an iterations block, or none outside of one")
        if self.at.is_after(target):
            raise OutOfOrderError(
                f"{site} at iteration {target.iteration} has passed: the program is at {self._here()}"
            )
        self._check_loop(site, target)
        self.at = target

    def wait(self, iteration: int) -> None:
        """Go on when the iteration has begun, or at once if it has. Raises `OutOfOrderError` where nothing follows."""
        if iteration < 0:
            raise OutOfOrderError(f"iterations count from 0, got {iteration}")
        if self.at.ended:
            raise OutOfOrderError(
                "a value of another request comes after an unbounded iteration block; nothing follows it"
            )
        if iteration > self.at.iteration:
            self.at = ProgramPoint(iteration)

    @contextmanager
    def iterations(self, block: int, start: int, stop: int | None, step: int) -> Iterator[None]:
        """A block that runs at iterations `start, start + step, ...` below `stop`."""
        self.enter_iterations(block, start, stop, step)
        yield
        self.leave_iterations(start, stop, step)

    def enter_iterations(self, block: int, start: int, stop: int | None, step: int) -> None:
        if self.inside is not None:
            raise OutOfOrderError("an iterations block can't stand inside another one")
        if self._loop_anchor:
            raise OutOfOrderError("an iterations block can't stand inside a loop")
        if step < 1 or start < 0 or (stop is not None and stop <= start):
            raise OutOfOrderError(f"iterations {start}:{stop}:{step} are empty or run backwards")
        if self.at.ended or start < self.at.iteration:
            raise OutOfOrderError(f"iteration {start} has passed: the program is at {self._here()}")
        self.inside = block
        self.at = ProgramPoint(start, self.at.order if start == self.at.iteration else START)

    def leave_iterations(self, start: int, stop: int | None, step: int) -> None:
        self.inside = None
        if stop is None:
            self.at = replace(self.at, ended=True)
        else:
            self.at = ProgramPoint(last_trip(start, stop, step), self.at.order)

    def join(self, other: ProgramPoint) -> None:
        """After two branches: the later of where they ended."""
        if other.is_after(self.at):
            self.at = other

    def enter_loop(self) -> None:
        self._loop_anchor.append((self.at, None))

    def leave_loop(self) -> None:
        self._loop_anchor.pop()

    def _check_loop(self, site: str, target: ProgramPoint) -> None:
        for i, (start, anchor) in enumerate(self._loop_anchor):
            if anchor is None:
                self._loop_anchor[i] = (start, target)
            elif anchor != target:
                raise OutOfOrderError(
                    f"{site}: a loop over values may touch one site only; its second trip comes too late"
                )

    def _here(self) -> str:
        return (
            f"iteration {self.at.iteration}, site number {self.at.order}"
            if self.at.order != START
            else (f"the start of iteration {self.at.iteration}")
        )
