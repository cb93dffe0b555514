"""A server's engine for traces that are awaited or streamed: each runs as a task of an event loop on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future

import httpx

from nnsight_vllm.client.loop import LoopThread
from nnsight_vllm.client.trace_codec import decode_frame, notice_of, outcomes_of
from nnsight_vllm.errors import ConnectionFailed, InterventionError
from nnsight_vllm.remote.connection import Refusal, wait_for
from nnsight_vllm.remote.engine import TRACE, RemoteEngine, line_of, packed
from nnsight_vllm.trace.backend import Outcome, Request
from nnsight_vllm.trace.events import Receive
from nnsight_vllm.wire.trace import FRAMES, MISSING, Answered, Broken, SentNotice


class RemoteRun:
    """The requests of one trace at the server. To abort them is to hang up."""

    def __init__(self, engine: AsyncRemoteEngine, requests: list[Request], receive: Receive | None) -> None:
        self.outcomes: Future[list[Outcome]] = Future()
        self.outcomes.set_running_or_notify_cancel()  # a waiting task that is cancelled doesn't cancel it
        self.requests, self.receive = requests, receive
        self._engine = engine
        self._is_left = False
        self._task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        self._engine.loop.post(self._give_up)

    @property
    def line(self) -> object:
        """A line of the user's: that of the first prompt, for who waits isn't known here."""
        return self.requests[0].prompt.engine.line if self.requests else "in a trace without requests"

    # -- on the loop -----------------------------------------------------------------------------------------------------

    def begin(self, content: bytes, large: dict[str, bytes]) -> None:
        """Start."""
        self._task = asyncio.get_running_loop().create_task(self._run(content, large))

    def _give_up(self) -> None:
        self._is_left = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self, content: bytes, large: dict[str, bytes]) -> None:
        try:
            self.outcomes.set_result(await self._engine.through(self, content, large))
        except asyncio.CancelledError:
            if self._is_left:
                self.outcomes.set_result([])
            else:
                self.outcomes.set_exception(InterventionError("the connection was closed while the trace ran"))
        except Refusal as refusal:
            self.outcomes.set_exception(refusal.as_error(line_of(refusal, self.requests) or self.line))
        except Exception as error:
            self.outcomes.set_exception(error)


class AsyncRemoteEngine(RemoteEngine):
    """Prompts and sampling are asked about while a block is recorded, as in sync mode."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float | None = 600.0) -> None:
        super().__init__(url, api_key, timeout)
        self.loop = LoopThread()
        self._client = self._connection.asynchronous()

    def start(self, requests: list[Request], tensors: dict[str, bytes], receive: Receive | None = None) -> RemoteRun:
        """Send the requests off. `receive` gets notices as they come, on the loop's thread."""
        run = RemoteRun(self, requests, receive)
        self.loop.post(run.begin, *packed(requests, tensors))
        return run

    def close(self) -> None:
        """Close the connection. Traces that still run fail."""
        self.loop.call(self._hang_up())
        self.loop.stop()
        super().close()

    @property
    def event_loop(self) -> asyncio.AbstractEventLoop:
        """What the connection lives on."""
        return self.loop.loop

    # -- on the loop -----------------------------------------------------------------------------------------------------

    async def through(self, run: RemoteRun, content: bytes, large: dict[str, bytes]) -> list[Outcome]:
        """What became of a run. Raises `Refusal` and errors of ours."""
        await asyncio.to_thread(self.upload, large)
        try:
            return await self._streamed(run, content)
        except Refusal as refusal:
            if refusal.kind != MISSING:
                raise
        await asyncio.to_thread(self.upload_again, large)
        return await self._streamed(run, content)

    async def _streamed(self, run: RemoteRun, content: bytes, is_again: bool = False) -> list[Outcome]:
        try:
            answer = await self._answered(run, content)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._connection.broken(error, run.line) from error
        if isinstance(answer, list):
            return answer
        seconds = None if is_again else wait_for(answer)
        if seconds is None:
            raise self._connection.refusal(answer, run.line)
        await asyncio.sleep(seconds)
        return await self._streamed(run, content, is_again=True)

    async def _answered(self, run: RemoteRun, content: bytes) -> list[Outcome] | httpx.Response:
        """What became of a run, or the server's refusal, whole."""
        async with self._client.stream("POST", TRACE, content=content, headers=self._headers(FRAMES)) as answer:
            if answer.is_success:
                return await self._heard(run, answer.aiter_bytes())
            await answer.aread()
            return answer

    async def _heard(self, run: RemoteRun, chunks: AsyncIterator[bytes]) -> list[Outcome]:
        async for data in pieces(chunks):
            match decode_frame(data, run.line):
                case Answered() as answered:
                    return outcomes_of(answered)
                case Broken() as broken:
                    raise Refusal(broken.status, broken.kind, broken.message, broken.param, {})
                case SentNotice() as notice if run.receive is not None:
                    run.receive(notice_of(notice))
        raise ConnectionFailed(f"the connection to {self._connection.url} broke off; {run.line}")

    async def _hang_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()


async def pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of each frame, however they were cut on the way."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        while len(held) >= 4 and len(held) >= (end := 4 + int.from_bytes(held[:4], "big")):
            yield bytes(held[4:end])
            del held[:end]
