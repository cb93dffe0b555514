"""HTTP to one server: requests with the key, and the server's refusals as our exceptions."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from nnsight_vllm import errors
from nnsight_vllm.errors import AdmissionError, BusyError, ConnectionFailed, NNsightError, UnauthorizedError
from nnsight_vllm.trace.source import user_line

LONGEST_WAIT = 10.0
"""Seconds that a busy server may ask for before a request is sent once more; longer ones are the caller's to wait."""

_HERE = "; in the request"  # what the server says where we know the line
_SECONDS_TO_CONNECT = 10.0


class Refusal(Exception):
    """An error that the server told: `kind` is the class name of it, `param` a path into what was sent."""

    def __init__(self, status: int, kind: str, message: str, param: str | None, body: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.param, self.body = status, kind, message, param, body

    def as_error(self, line: object = None) -> NNsightError:
        """The exception that the same mistake raises locally, with a line of the user's (the current one where none is given)."""
        text = f"{self.message.removesuffix(_HERE)}; {line or user_line()}"
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, NNsightError):
            return kind(text)
        if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return ConnectionFailed(f"the server failed ({self.status}): {text}")
        return AdmissionError(f"the server refuses the request ({self.status}): {text}")


class Connection:
    """`timeout`: seconds that any answer may take, None: for ever."""

    def __init__(self, url: str, api_key: str | None, timeout: float | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConnectionFailed(f"a server's address begins with http:// or https://, got {url!r}; {user_line()}")
        self._timeout = timeout
        self._arguments: dict[str, Any] = {
            "base_url": self.url,
            "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            "timeout": httpx.Timeout(timeout, connect=min(timeout or _SECONDS_TO_CONNECT, _SECONDS_TO_CONNECT)),
            # Shorter than servers keep a connection, so that none ends under a request.
            "limits": httpx.Limits(keepalive_expiry=2.0, max_connections=None),
        }
        self._client = httpx.Client(**self._arguments)
        weakref.finalize(self, self._client.close)

    def send(
        self, method: str, path: str, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """The answer. Raises `Refusal` for what the server refuses, `ConnectionFailed` for all else that goes wrong.

        Where the server is busy and names a time of at most `LONGEST_WAIT`, the request is sent once more after it; then
        `BusyError` is raised. Nothing of a request that is refused so has run.
        """
        answer = self._sent(method, path, content, headers)
        seconds = wait_for(answer)
        if seconds is not None:
            time.sleep(seconds)
            answer = self._sent(method, path, content, headers)
        if answer.is_success:
            return answer
        raise self.refusal(answer)

    def asynchronous(self) -> httpx.AsyncClient:
        """A client of the same server for an event loop; `broken` and `refusal` tell what goes wrong with it."""
        return httpx.AsyncClient(**self._arguments)

    def close(self) -> None:
        self._client.close()

    def _sent(self, method: str, path: str, content: bytes, headers: Mapping[str, str] | None) -> httpx.Response:
        try:
            return self._client.request(method, path, content=content, headers=headers)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self.broken(error) from error

    def broken(self, error: Exception, line: object = None) -> ConnectionFailed:
        """No answer, as an error of ours."""
        where = line or user_line()
        match error:
            case httpx.ConnectTimeout():
                return ConnectionFailed(f"{self.url} can't be reached in time (timeout={self._timeout}); {where}")
            case httpx.TimeoutException():
                return ConnectionFailed(f"{self.url} didn't answer in time (timeout={self._timeout}); {where}")
            case httpx.ConnectError():
                return ConnectionFailed(f"{self.url} can't be reached: {error}; {where}")
            case _:
                return ConnectionFailed(f"the connection to {self.url} broke off: {error}; {where}")

    def refusal(self, answer: httpx.Response, line: object = None) -> Exception:
        """An answer that isn't what was asked for, as what is to be raised. Its content has been read."""
        where = line or user_line()
        told = _error_of(answer)
        status, message = answer.status_code, str(told.get("message") or answer.reason_phrase)
        if status == HTTPStatus.UNAUTHORIZED:
            return UnauthorizedError(f"{self.url} wants another api_key; {where}")
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return BusyError(f"{message.removesuffix(_HERE)}; {where}")
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED) and "type" not in told:
            return ConnectionFailed(
                f"{self.url} has no {answer.request.url.path}: is it a server that `nnsight-vllm serve` started? {where}"
            )
        return Refusal(status, str(told.get("type")), message, told.get("param"), told)


def _error_of(answer: httpx.Response) -> Mapping[str, Any]:
    """The error in OpenAI's shape, empty where the answer has none."""
    try:
        told = json.loads(answer.content)
    except ValueError:
        return {}
    error = told.get("error") if isinstance(told, dict) else None
    return error if isinstance(error, dict) else {}


def wait_for(answer: httpx.Response) -> float | None:
    """The seconds after which a busy server is asked once more; None where it isn't busy, or for too long."""
    if answer.status_code != HTTPStatus.TOO_MANY_REQUESTS:
        return None
    try:
        seconds = max(float(answer.headers.get("Retry-After", "")), 0.0)
    except ValueError:
        return None
    return seconds if seconds <= LONGEST_WAIT else None
