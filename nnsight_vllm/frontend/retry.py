"""Which request that the engine evicted starts again, and when: once another one has ended and left its memory.

Requests of all traces count. Where nothing has ended since a request began, and nothing runs any more, it has no hope: it
would be evicted again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nnsight_vllm.trace.backend import Outcome

if TYPE_CHECKING:
    from typing import Self


class Attempt:
    """One go of a request, the `number`th after the first: a context, for as long as it's in the engine.

    Whoever runs it says whether it was evicted.
    """

    def __init__(self, policy: RestartPolicy, number: int) -> None:
        self.number = number
        self.is_evicted = False
        self.num_ended_before = 0  # of all requests, when it began
        self._policy = policy

    def __enter__(self) -> Self:
        self.num_ended_before = self._policy.num_ended
        self._policy.num_running += 1
        self._policy.num_restarted += self.number > 0
        return self

    def __exit__(self, *raised: object) -> None:
        self._policy.num_running -= 1
        self._policy.num_ended += not self.is_evicted
        if not self.is_evicted or not self._policy.num_running:
            self._policy.wake()

    def settled(self, outcome: Outcome) -> Outcome:
        """This came of it."""
        self.is_evicted = outcome.is_evicted
        return outcome


class RestartPolicy:
    """Of one engine. Everything happens on its loop, or under its lock."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_restarted = 0
        self.num_ended = 0
        self._waiting: list[asyncio.Future[None]] = []

    def attempt(self, after: Attempt | None = None) -> Attempt:
        """A request's first go, or the next."""
        return Attempt(self, 0 if after is None else after.number + 1)

    def has_room(self, attempt: Attempt) -> bool:
        """Whether a request has another go after this one, now."""
        return attempt.is_evicted and self.num_ended > attempt.num_ended_before

    async def gets_room(self, attempt: Attempt) -> bool:
        """Whether it has another go; while others run, that isn't known, and the next to end makes room."""
        if not attempt.is_evicted or not self.num_running:
            return self.has_room(attempt)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn
        return True

    def wake(self) -> None:
        """Let everybody go on who waits."""
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
