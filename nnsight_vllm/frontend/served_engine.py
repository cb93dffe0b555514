"""The engine of a server: vLLM's own `AsyncLLM`, on the server's own loop, which starts and ends without us.

Traces run on it as on any asynchronous engine. Requests of vLLM's OpenAI handlers run through `carried`: the handlers
get the outputs that they would get, and beside them what the request's graphs send home.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nnsight_vllm.client.loop import RunningLoop
from nnsight_vllm.frontend.async_engine import AsyncEngine
from nnsight_vllm.frontend.bundling import Tied
from nnsight_vllm.frontend.collected import Fresh
from nnsight_vllm.frontend.listener import Listener, reason_of
from nnsight_vllm.frontend.retry import Attempt
from nnsight_vllm.frontend.tensor_cache import DEFAULT_LIMIT
from nnsight_vllm.graph.results import Failure
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
        async with AsyncExitStack() as ending:
            await ending.enter_async_context(self._held(set(request.constants), tensors))
            first, rest = await self._begun(lambda own_id: generate(prompt, params, own_id), id)
            ending.push_async_callback(rest.aclose)
            yield first
            async for heard in rest:
                yield heard

    async def _begun(self, generate: Generate, id: str) -> tuple[Heard, AsyncGenerator[Heard, None]]:
        """The first that's to be heard of a request, and the rest. A go that's evicted before is only heard of if it's the last."""
        attempt = self.restarts.attempt()
        while True:
            heard_ones = self._go(generate(f"{id}-{attempt.number}" if attempt.number else id), attempt)
            heard = await anext(heard_ones)
            if not attempt.is_evicted:
                return heard, heard_ones
            async for later in heard_ones:
                heard = later
            if not await self.restarts.gets_room(attempt):
                return heard, heard_ones
            attempt = self.restarts.attempt(attempt)

    async def _go(self, outputs: AsyncGenerator[Any, None], attempt: Attempt) -> AsyncGenerator[Heard, None]:
        errors: list[Exception] = []
        listener = Listener(errors.append, keeps_fresh=True)
        async with AsyncExitStack() as ending:
            ending.enter_context(attempt)
            ending.callback(self.collector.forget, listener)
            ending.push_async_callback(outputs.aclose)
            while (output := await self._next(outputs, listener)) is not None:
                heard = _heard(listener, output)
                attempt.is_evicted = heard.failure is not None and heard.failure.retryable
                yield heard
        if errors:
            raise errors[0]

    async def _next(self, outputs: AsyncGenerator[Any, None], listener: Listener) -> Any:
        """vLLM's next output; asked for the first, it sends the request."""
        with self.collector.sending(listener):
            return await anext(outputs, None)

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


def _heard(listener: Listener, output: Any) -> Heard:
    """The output, with why its samples ended, and all that came until now."""
    fresh = {sample: found.take_fresh() for sample, found in listener.samples.items()}
    for completion in output.outputs:
        if completion.finish_reason is not None:
            reason = reason_of(completion.finish_reason, listener.of(completion.index))
            completion.finish_reason = "abort" if reason == "error" else reason
    failures = [found.sample.failure for found in listener.samples.values() if found.sample.failure is not None]
    stopped = frozenset(sample for sample, found in listener.samples.items() if found.is_stopped)
    return Heard(output, fresh, stopped, failures[0] if failures else None)
