"""A streamed answer whose end, however it ends, gives back what it held."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class ClosingResponse(Response):
    """`response` streams `events`, an async generator, which is closed before `held` is."""

    background = None

    def __init__(self, response: Response, events: Any, held: ExitStack) -> None:
        self._response, self._events, self._held = response, events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                await self._response(scope, receive, send)
            finally:
                await self._events.aclose()
