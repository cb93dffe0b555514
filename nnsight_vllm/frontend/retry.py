"""When a request that the engine evicted may start again: once another one has ended and left its memory."""

from __future__ import annotations

import asyncio


class Turnover:
    """Counts the requests of all traces. Everything happens on the engine's loop."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_ended = 0
        self._waiting: list[asyncio.Future[None]] = []

    def enter(self) -> int:
        """A request goes into the engine. Returns how many have ended so far."""
        self.num_running += 1
        return self.num_ended

    def leave(self, is_evicted: bool) -> None:
        """It comes out."""
        self.num_running -= 1
        self.num_ended += not is_evicted
        if not is_evicted or not self.num_running:
            self.wake()

    async def next(self, since: int) -> bool:
        """Wait for room, after an eviction. False if there won't be more: nothing ended `since`, and nothing runs."""
        if not self.num_running:
            return self.num_ended > since
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
