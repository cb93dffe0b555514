"""What the programs of all steps took and sent home, for the operator."""

from __future__ import annotations

from bisect import bisect_left
from time import perf_counter

from nnsight_vllm.graph.results import STEP_SECONDS


class Tally:
    """`start` and `pause` go around what belongs to a step's programs, `end_step` closes the step."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.saved_bytes = 0
        self.steps_within = [0] * (len(STEP_SECONDS) + 1)
        self._in_step = 0.0
        self._since = 0.0

    def start(self) -> None:
        self._since = perf_counter()

    def pause(self) -> None:
        self._in_step += perf_counter() - self._since

    def end_step(self, saved_bytes: int) -> None:
        """The step is over and sent so many bytes home."""
        self.pause()
        self.seconds += self._in_step
        self.saved_bytes += saved_bytes
        self.steps_within[bisect_left(STEP_SECONDS, self._in_step)] += 1
        self._in_step = 0.0
