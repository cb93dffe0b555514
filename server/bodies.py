"""Bodies of requests: read up to a limit, and what is wrong in our field told with a path into it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Message, Receive

from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.schema_errors import refusal_of
from nnsight_vllm.server.state import state_of


async def read_body(raw_request: Request, most: int) -> bytes:
    """The whole body. Raises `Refused` as soon as it has more than `most` bytes."""
    length = raw_request.headers.get("content-length", "")
    _require_fits(int(length) if length.isascii() and length.isdigit() else 0, most)
    data = bytearray()
    async for part in raw_request.stream():
        data += part
        _require_fits(len(data), most)
    return bytes(data)


def _require_fits(size: int, most: int) -> None:
    if size > most:
        raise Refused(
            f"the body has {size} bytes or more; the limit is {most}",
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            kind="AdmissionError",
        )


class InterventionRoute(APIRoute):
    """A route whose bodies may have our field: what is wrong in it is told with a path into it, all else as vLLM tells it.

    A body that is too long is given up before it's read.

    Not an exception handler of the app: vLLM has one for the same error, and it closes the list before `init_state`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, with errors in our field told in our words."""
        handle = super().get_route_handler()

        async def judge(request: Request) -> Response:
            body = await read_body(request, state_of(request).limits.body_bytes)
            try:
                return await handle(Request(request.scope, _replayed(body, request.receive)))
            except RequestValidationError as error:
                found = [one for one in error.errors() if "intervention" in one["loc"]]
                if not found:
                    raise
                raise refusal_of(found[0], len(found) - 1) from error

        return judge


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then what else comes."""
    due: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return due.pop() if due else await receive()

    return replay
