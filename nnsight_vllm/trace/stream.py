"""The events of a trace that runs, for `async for`.

The engine posts notices from a thread of its own into a queue of the consumer's event loop, which grows as long as the
consumer is slow; nothing is merged. A stream that is left early, closed or forgotten ends its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from nnsight_vllm.trace.events import Event, Notice, Receive, RunningTrace

if TYPE_CHECKING:
    from typing import Self


class Stream:
    """An asynchronous iterator over events. Make it in a running event loop.

    `start` sends the trace off. `event` is a notice in the user's terms. The run ends by `finish`, or nobody waits for it any
    more: `leave`.
    """

    _is_over = True

    def __init__(
        self,
        start: Callable[[Receive], RunningTrace],
        event: Callable[[Notice], Event],
        finish: Callable[[RunningTrace], None],
        leave: Callable[[RunningTrace], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._event_of, self._finish, self._leave_run = event, finish, leave
        self._notices: asyncio.Queue[Notice | None] = asyncio.Queue()
        self._run = start(_receiver(loop, self._notices))
        self._is_over = False
        self._run.outcomes.add_done_callback(_ending(loop, self._notices))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        try:
            notice = await self._notices.get()
        except BaseException:  # cancelled, timed out, or thrown away
            self._leave()
            raise
        if notice is None:
            self._is_over = True
            self._finish(self._run)
            raise StopAsyncIteration
        return self._event_of(notice)

    async def aclose(self) -> None:
        """End the requests, unless they are over, and wait until nothing of them is left in the engine."""
        if self._is_over:
            return
        self._leave()
        await ended(self._run)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _leave(self) -> None:
        self._is_over = True
        self._leave_run(self._run)

    def __del__(self) -> None:
        if not self._is_over:
            self._leave()


async def ended(run: RunningTrace) -> None:
    """Wait until nothing of a run is left in the engine, however it ended."""
    waiting = asyncio.wrap_future(run.outcomes)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio says that nobody asked
    await asyncio.wait([waiting])


def _receiver(loop: asyncio.AbstractEventLoop, notices: asyncio.Queue[Notice | None]) -> Receive:
    """Not a method: the engine mustn't keep the stream, whose end as an object says that nobody listens."""

    def receive(notice: Notice) -> None:
        loop.call_soon_threadsafe(notices.put_nowait, notice)  # raises if the loop is closed

    return receive


def _ending(loop: asyncio.AbstractEventLoop, notices: asyncio.Queue[Notice | None]) -> Callable[[object], None]:
    def end(_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(notices.put_nowait, None)

    return end
