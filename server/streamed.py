"""A trace's answer bit by bit: a frame a notice, and at last all outcomes, or why there are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from http import HTTPStatus

from fastapi.responses import StreamingResponse

from nnsight_vllm.client.trace_codec import answered_of, encode_frame, sent_notice
from nnsight_vllm.errors import InterventionError, NNsightError
from nnsight_vllm.server.closing import ClosingResponse
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.trace.events import Notice, Receive, RunningTrace
from nnsight_vllm.wire.trace import FRAMES, Broken


def streamed_trace(start: Callable[[Receive], RunningTrace], held: ExitStack) -> ClosingResponse:
    """Runs the requests when it is sent; a client that goes ends them. `held` is given back at its end."""
    frames = _frames(start)
    return ClosingResponse(StreamingResponse(frames, media_type=FRAMES), frames, held)


def not_run(error: NNsightError) -> Refused:
    """Why a run gave no outcomes, for a stranger."""
    if isinstance(error, InterventionError):  # the engine ends
        return Refused(str(error), status=HTTPStatus.SERVICE_UNAVAILABLE, kind="ConnectionFailed")
    return Refused(str(error), "requests", kind=type(error).__name__)


async def _frames(start: Callable[[Receive], RunningTrace]) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    notices: asyncio.Queue[Notice | None] = asyncio.Queue()

    def receive(notice: Notice | None) -> None:
        loop.call_soon_threadsafe(notices.put_nowait, notice)

    run = start(receive)
    run.outcomes.add_done_callback(lambda _: receive(None))
    is_over = False
    try:
        while (notice := await notices.get()) is not None:
            yield encode_frame(sent_notice(notice))
        is_over = True
        yield await asyncio.to_thread(_end, run)
    finally:
        if not is_over:
            run.abort()


def _end(run: RunningTrace) -> bytes:
    try:
        return encode_frame(answered_of(run.outcomes.result()))
    except NNsightError as error:
        refused = not_run(error)
        return encode_frame(Broken(int(refused.status), refused.kind, refused.message, refused.param))
