"""What a stranger is told when a request can't be served: an HTTP status, OpenAI's error shape, and a path into the body."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.exceptions import VLLMValidationError

from nnsight_vllm.server import metrics


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


async def answer_refused(_: Request, refused: Exception) -> JSONResponse:
    """FastAPI's handler of `Refused`."""
    assert isinstance(refused, Refused)
    metrics.count_rejected(refused.kind)
    return JSONResponse(refused.body(), status_code=int(refused.status), headers=refused.headers)
