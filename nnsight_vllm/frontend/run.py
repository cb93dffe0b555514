"""The requests of one trace on their way through vLLM's asynchronous engine, from sending to the last outcome.

Nothing here is ever cancelled halfway. To give up is to abort the requests in vLLM, which then ends each with a last
output like any other; so whatever a request held is given back in one place, at the end of `_go` or of `_run`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Protocol

from nnsight_vllm.client.loop import RunningLoop
from nnsight_vllm.frontend.bundling import Bundling, Tied
from nnsight_vllm.frontend.collector import Collector
from nnsight_vllm.frontend.engine import as_admission
from nnsight_vllm.frontend.listener import Listener, StepListener
from nnsight_vllm.frontend.retry import Attempt, RestartPolicy
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Outcome, Request
from nnsight_vllm.trace.events import Notice, Receive

PREFIX = f"nnsight_vllm-{secrets.token_hex(8)}-"
"""Of the ids of requests that are ours. No client can choose one like it."""

_NUMBERS = itertools.count()


class Sender(Protocol):
    """What a run needs of its engine."""

    loop: RunningLoop
    collector: Collector
    restarts: RestartPolicy
    runs: set[TraceRun]

    def sendable(self, request: Request, tensors: dict[str, bytes], tied: Tied) -> tuple[Any, Any]: ...

    async def send(self, id: str, prompt: Any, params: Any, wants_steps: bool) -> Any: ...

    def abort(self, ids: Iterable[str]) -> None: ...

    def acquire(self, digests: set[str], tensors: dict[str, bytes]) -> None: ...

    def release(self, digests: set[str]) -> None: ...


class TraceRun:
    """A `RunningTrace`. `task` is there from its start on the engine's loop."""

    def __init__(
        self, engine: Sender, requests: list[Request], tensors: dict[str, bytes], receive: Receive | None
    ) -> None:
        self.outcomes: Future[list[Outcome]] = Future()
        self.outcomes.set_running_or_notify_cancel()  # a waiting task that is cancelled doesn't cancel it
        self.is_aborted = False
        self._engine = engine
        self._requests = requests
        self._related = Bundling(requests)
        self._tied = self._related.tied(range(len(requests)))
        self._tensors = tensors
        self._receive = receive
        self._error: BaseException | None = None
        self._sent: set[str] = set()  # vLLM's ids of what is in the engine
        self.task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        self._engine.loop.post(self.give_up)

    # -- on the engine's loop --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start."""
        self._engine.runs.add(self)
        self.task = asyncio.get_running_loop().create_task(self._run())

    def give_up(self, error: BaseException | None = None) -> None:
        """End all requests. `error` is raised where somebody still waits."""
        if self.outcomes.done():
            return
        self._error = self._error or error
        self.is_aborted = True
        self._engine.restarts.wake()
        self._engine.abort(self._sent)

    async def _run(self) -> None:
        try:
            outcomes = await self._through()
        except BaseException as error:
            self._error = self._error or error
            outcomes = []
        self._engine.runs.discard(self)
        if self._error is not None:
            self.outcomes.set_exception(self._error)
        else:
            self.outcomes.set_result(outcomes)

    async def _through(self) -> list[Outcome]:
        digests = {digest for request in self._requests for digest in request.constants}
        if digests:
            await asyncio.to_thread(self._engine.acquire, digests, self._tensors)
        try:
            found = await asyncio.gather(*map(self._serve, range(len(self._requests))))
        finally:
            if digests:
                await asyncio.to_thread(self._engine.release, digests)
        return [outcome for outcome in found if outcome is not None]

    async def _serve(self, index: int) -> Outcome | None:
        """Send a request, again after each eviction. None if the run was given up."""
        attempt: Attempt | None = None
        while not self.is_aborted:
            with self._engine.restarts.attempt(attempt) as attempt:
                found = await self._found(index, is_again=attempt.number > 0)
                attempt.is_evicted = found is not None and found[0].is_evicted
            if found is None or self.is_aborted:
                return None
            outcome, notices = found
            if not await self._engine.restarts.gets_room(attempt):
                self._tell(notices)
                return outcome
            if not self.is_aborted and self._receive is not None:
                self._tell([Notice(index, restarted=True)])
        return None

    async def _found(self, index: int, is_again: bool) -> tuple[Outcome, list[Notice]] | None:
        """What a request's go came to, and what is to be told of it. None if the run was given up, as where that raised."""
        try:
            return await (self._again(index) if is_again else self._go(index, self._tied[index], self._receive))
        except Exception as error:
            self.give_up(as_admission(error))
            return None

    async def _again(self, index: int) -> tuple[Outcome, list[Notice]] | None:
        """Once more, with those who make its values; of theirs nobody hears."""
        together = self._related.tied(self._related.with_makers([index]))
        tried = [self._go(i, tied, self._receive if i == index else None) for i, tied in together.items()]
        found = await asyncio.gather(*tried, return_exceptions=True)  # all of them are over
        for one in found:
            if isinstance(one, BaseException):
                raise one
        own = found[list(together).index(index)]
        assert not isinstance(own, BaseException)
        return own

    async def _go(self, index: int, tied: Tied, receive: Receive | None) -> tuple[Outcome, list[Notice]] | None:
        """None if the run was given up."""
        prompt, params = self._engine.sendable(self._requests[index], self._tensors, tied)
        listener = Listener(self.give_up) if receive is None else StepListener(index, receive, self.give_up)
        try:
            output = await self._last_output(listener, prompt, params)
        finally:
            self._engine.collector.forget(listener)
        if self.is_aborted:
            return None
        with garbage.paused():
            return listener.outcome(output)

    async def _last_output(self, listener: Listener, prompt: Any, params: Any) -> Any:
        with self._engine.collector.sending(listener):
            id, wants_steps = f"{PREFIX}{next(_NUMBERS)}", isinstance(listener, StepListener)
            queue = await self._engine.send(id, prompt, params, wants_steps)
        self._sent.add(queue.request_id)
        try:
            if self.is_aborted:  # while it was being sent
                self._engine.abort({queue.request_id})
            output = await queue.get()
            while not output.finished:
                output = await queue.get()
            return output
        finally:
            self._sent.discard(queue.request_id)

    def _tell(self, notices: list[Notice]) -> None:
        try:
            for notice in notices:
                assert self._receive is not None
                self._receive(notice)
        except Exception as error:  # the consumer's loop is gone
            self.give_up(error)
