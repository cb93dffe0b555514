"""The engine of a server: vLLM's own `AsyncLLM`, on the server's own loop, which starts and ends without us.

Traces run on it as on any asynchronous engine. Requests of vLLM's OpenAI handlers run through `carried`: the handlers
get the outputs that they would get, and beside them what the request's graphs send home.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nnsight_vllm.client.loop import RunningLoop
from nnsight_vllm.frontend.async_engine import AsyncEngine
from nnsight_vllm.frontend.bundling import Tied
from nnsight_vllm.frontend.collector import Collected, Fresh
from nnsight_vllm.frontend.engine import reason_of
from nnsight_vllm.frontend.tensor_cache import DEFAULT_LIMIT
from nnsight_vllm.graph.results import Delta, Failure
from nnsight_vllm.trace.backend import Request

Generate = Callable[..., AsyncGenerator[Any, None]]


@dataclass(frozen=True)
class Heard:
    """vLLM's output of a step, or of several, and by sample what its graphs sent home since the one before."""

    output: Any
    fresh: dict[int, Fresh]
    stopped: frozenset[int] = frozenset()
    failure: Failure | None = None


class ServedEngine(AsyncEngine):
    """Made on another thread than the loop's, whose work it waits for."""

    def __init__(
        self, llm: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread, tensor_limit: int = DEFAULT_LIMIT
    ) -> None:
        self._prepare(RunningLoop(loop, thread))
        self._num_carried = 0
        self._secret = secrets.token_hex(16)  # so that nobody can tell a salt of ours from what it's made of
        self._attach(llm, tensor_limit)

    def close(self) -> None:
        """Nothing: who started vLLM ends it."""

    def tenant(self, name: str) -> str:
        """What stands for a tenant in the salts of the prefix cache."""
        return f"{self._secret}:{name}"

    async def carried(
        self, generate: Generate, id: str, request: Request, tensors: dict[str, bytes]
    ) -> AsyncGenerator[Heard, None]:
        """Run a request through vLLM's own `generate(prompt, params, id)`, once more after an eviction if nobody has heard of it.

        The last of what it gives says how the graphs failed, if they did.
        """
        prompt, params = self.sendable(request, tensors, Tied(None, None))
        number, is_heard = 0, False
        async with self._held(set(request.constants), tensors):
            while True:
                since, is_evicted = self.turnover.enter(), False
                own_id = id if number == 0 else f"{id}-{number}"
                listener = _Listener()
                self.listened.listen(own_id, listener)
                try:
                    async with aclosing(generate(prompt, params, own_id)) as outputs:
                        async for output in outputs:
                            heard = listener.heard(output)
                            is_evicted = heard.failure is not None and heard.failure.retryable
                            if not is_evicted or is_heard:
                                is_heard = True
                                yield heard
                    if listener.error is not None:
                        raise listener.error
                finally:
                    self.listened.forget(own_id)
                    self.turnover.leave(is_evicted)
                if not is_evicted or is_heard:
                    return
                if not await self.turnover.next(since):
                    yield heard
                    return
                self.num_restarted += 1
                number += 1

    @asynccontextmanager
    async def _held(self, digests: set[str], tensors: dict[str, bytes]) -> AsyncIterator[None]:
        """Have the worker hold these tensors. Whoever waits may be cancelled at any time; the tensors are given back all the same."""
        self._num_carried += 1
        acquiring = asyncio.ensure_future(asyncio.to_thread(self.acquire, digests, tensors)) if digests else None
        try:
            if acquiring is not None:
                await asyncio.shield(acquiring)
            yield
        finally:
            self._num_carried -= 1
            if acquiring is not None:
                self._wind_up(self._give_back(acquiring, digests))

    async def _give_back(self, acquiring: asyncio.Future[None], digests: set[str]) -> None:
        await asyncio.wait([acquiring])
        if acquiring.exception() is None:
            await asyncio.to_thread(self.release, digests)

    @property
    def _is_idle(self) -> bool:
        return super()._is_idle and not self._num_carried


class _Listener:
    """Collects what the samples of one request send home, until the next output takes it."""

    wants_steps = False  # vLLM's own consumer takes the outputs

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._collected: dict[int, Collected] = {}

    def collect(self, sample: int, delta: Delta) -> None:
        try:
            self._of(sample).add(delta)
        except Exception as error:
            self.error = error

    def hear(self, output: Any) -> None:
        raise AssertionError("nobody takes this listener's outputs")

    def heard(self, output: Any) -> Heard:
        """The output, with why its samples ended, and all that came until now."""
        fresh = {sample: found.take_fresh() for sample, found in self._collected.items()}
        for completion in output.outputs:
            if completion.finish_reason is not None:
                reason = reason_of(completion.finish_reason, self._of(completion.index))
                completion.finish_reason = "abort" if reason == "error" else reason
        failures = [found.sample.failure for found in self._collected.values() if found.sample.failure is not None]
        stopped = frozenset(sample for sample, found in self._collected.items() if found.is_stopped)
        return Heard(output, fresh, stopped, failures[0] if failures else None)

    def _of(self, sample: int) -> Collected:
        return self._collected.setdefault(sample, Collected(fresh=Fresh()))
