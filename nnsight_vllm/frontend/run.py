"""The requests of one trace on their way through vLLM's asynchronous engine, from sending to the last outcome.

Nothing here is ever cancelled halfway. To give up is to abort the requests in vLLM, which then ends each with a last
output like any other; so whatever a request held is given back in one place, at the end of `_attempt` or of `_fly`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_vllm.errors import AdmissionError
from nnsight_vllm.frontend.attempt import Attempt
from nnsight_vllm.frontend.bundling import Bundling, Tied
from nnsight_vllm.frontend.engine import refusals
from nnsight_vllm.graph.links import Links
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Outcome, Request
from nnsight_vllm.trace.events import Notice, Receive

if TYPE_CHECKING:
    from nnsight_vllm.frontend.async_engine import AsyncEngine

PREFIX = "nnsight_vllm-"
_NUMBERS = itertools.count()


class TraceRun:
    """A `Run`. `task` is there from its start on the engine's loop."""

    def __init__(
        self, engine: AsyncEngine, requests: list[Request], tensors: dict[str, bytes], receive: Receive | None
    ) -> None:
        self.outcomes: Future[list[Outcome]] = Future()
        self.outcomes.set_running_or_notify_cancel()  # a waiting task that is cancelled doesn't cancel it
        self.is_aborted = False
        self._engine = engine
        self._requests = requests
        self._related = Bundling(requests)
        self._links = self._related.links(range(len(requests)))
        self._seeds = self._related.seeds()
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
        self.task = asyncio.get_running_loop().create_task(self._fly())

    def give_up(self, error: BaseException | None = None) -> None:
        """End all requests. `error` is raised where somebody still waits."""
        if self.outcomes.done():
            return
        self._error = self._error or error
        self.is_aborted = True
        self._engine.turnover.wake()
        self._engine.abort(self._sent)

    async def _fly(self) -> None:
        try:
            outcomes = await self._through()
        except BaseException as error:
            self._error = self._error or error
            outcomes = []
        self._engine.landed(self)
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
        """Send a request, again after each eviction. None if the flight was given up."""
        turnover = self._engine.turnover
        attempt = self._attempt(index, self._links, self._receive)
        while not self.is_aborted:
            since = turnover.enter()
            found = None
            try:
                found = await attempt
            except Exception as error:
                self.give_up(_admission(error))
            finally:
                turnover.leave(is_evicted=found is not None and found[0].is_evicted)
            if found is None or self.is_aborted:
                return None
            outcome, notices = found
            if not outcome.is_evicted or not await turnover.next(since):
                self._tell(notices)
                return outcome
            if not self.is_aborted:
                self._engine.num_restarted += 1
                self._tell([Notice(index, restarted=True)] if self._receive else [])
                attempt = self._again(index)
        attempt.close()
        return None

    async def _again(self, index: int) -> tuple[Outcome, list[Notice]] | None:
        """Once more, with those who make its values; of theirs nobody hears."""
        together = self._related.in_order(self._related.with_makers([index]))
        links = self._related.links(together)
        tried = [self._attempt(i, links, self._receive if i == index else None) for i in together]
        found = await asyncio.gather(*tried, return_exceptions=True)  # all of them are over
        for one in found:
            if isinstance(one, BaseException):
                raise one
        own = found[together.index(index)]
        assert not isinstance(own, BaseException)
        return own

    async def _attempt(
        self, index: int, links: Mapping[int, Links], receive: Receive | None
    ) -> tuple[Outcome, list[Notice]] | None:
        """None if the flight was given up."""
        request = self._requests[index]
        tied = Tied(links.get(index), self._seeds.get(index))
        prompt, params = self._engine.sendable(request, self._tensors, tied)
        attempt = Attempt(index, receive, self.give_up)
        id = f"{PREFIX}{next(_NUMBERS)}"
        self._engine.listened.listen(id, attempt)
        try:
            output = await self._last_output(id, prompt, params, receive is not None)
        finally:
            self._engine.listened.forget(id)
        if self.is_aborted:
            return None
        with garbage.paused():
            outcome, notices = attempt.outcome(output)
        if notices:
            notices[-1] = replace(notices[-1], result=outcome.result)
        return outcome, notices

    async def _last_output(self, id: str, prompt: Any, params: Any, wants_steps: bool) -> Any:
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


def _admission(error: Exception) -> Exception:
    if not isinstance(error, refusals()):
        return error
    refused = AdmissionError(f"the engine refuses the request: {error}")
    refused.__cause__ = error
    return refused
