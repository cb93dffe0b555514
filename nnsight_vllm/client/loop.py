"""The event loop that vLLM's asynchronous engine lives on: on a thread of its own, or a server's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class RunningLoop:
    """A loop that runs on some thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self.loop = loop
        self._thread = thread

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it. Not from a coroutine that runs there: it would wait for itself."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("this call waits for the engine's event loop, and was made in it: use another thread")
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function there soon, in the order of the posts. Nothing happens where the loop has stopped."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)


class LoopThread(RunningLoop):
    """A loop on a thread of its own, whatever loops its users have, if any. Runs until it is stopped; a process may end without that."""

    def __init__(self) -> None:
        loop = asyncio.new_event_loop()
        super().__init__(loop, threading.Thread(target=loop.run_forever, name="nnsight_vllm", daemon=True))
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs there and end the thread."""
        self.call(self._wind_up())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()
