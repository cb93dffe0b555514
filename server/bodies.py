"""Bodies of requests, read up to a limit."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import Request
from starlette.types import Message, Receive

from nnsight_vllm.server.errors import Refused


async def read_body(raw_request: Request, most: int) -> bytes:
    """The whole body. Raises `Refused` as soon as it has more than `most` bytes."""
    told = raw_request.headers.get("content-length", "")
    size = int(told) if told.isascii() and told.isdigit() else 0
    data = bytearray()
    if size <= most:
        async for part in raw_request.stream():
            data += part
            if (size := len(data)) > most:
                break
    if size > most:
        raise Refused(
            f"the body has {size} bytes or more; the limit is {most}",
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            kind="AdmissionError",
        )
    return bytes(data)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then what else comes."""
    due: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return due.pop() if due else await receive()

    return replay
