"""What a stranger is told when a request can't be served: an HTTP status, OpenAI's error shape, and a path into the body."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError

from nnsight_vllm.errors import NNsightError
from nnsight_vllm.server import journal, metrics


class Refused(VLLMValidationError):
    """`param` says where in the body, such as `intervention.edits[0].site`; `kind` is OpenAI's `type`.

    A vLLM error, so that vLLM's own streams, which end with an error as their last event, give it the same shape.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        kind: str = "BadRequestError",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, parameter=param)
        self.message = message
        self.param = param
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """In OpenAI's shape."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": int(self.status)}
        return {"error": error}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: a route's answers with these statuses have OpenAI's shape of errors."""
    refused: dict[int | str, dict[str, Any]] = {
        s: {"model": ErrorResponse, "description": HTTPStatus(s).phrase} for s in statuses
    }
    return {int(HTTPStatus.UNAUTHORIZED): {"description": "No key, or a wrong one."}, **refused}


class Failed(Refused):
    """The engine took the request, and its graph failed while it ran."""


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Around what judges a part of the body: an error of ours becomes a `Refused` that says where."""
    try:
        yield
    except NNsightError as error:
        raise Refused(str(error), param, kind=type(error).__name__) from None


def require_at_most(most: int, number: int, what: str, param: str | None) -> None:
    """Raise `Refused` for more than a limit allows."""
    if number > most:
        raise Refused(f"{number} {what}; the limit is {most}", param, kind="AdmissionError")


async def answer_refused(raw_request: Request, refused: Exception) -> JSONResponse:
    """FastAPI's handler of `Refused`."""
    assert isinstance(refused, Refused)
    if not isinstance(refused, Failed):
        metrics.rejected.labels(refused.kind).inc()
        where = {"id": journal.asked_id(raw_request), "route": raw_request.scope["route"].path}
        journal.write({**where, "outcome": refused.kind, "status": int(refused.status), "param": refused.param or ""})
    return JSONResponse(refused.body(), status_code=int(refused.status), headers=refused.headers)
