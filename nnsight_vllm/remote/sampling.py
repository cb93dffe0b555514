"""Sampling arguments on their way to a server: data that JSON can hold, checked by the server's vLLM, once for equal ones."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import msgspec

from nnsight_vllm.errors import AdmissionError
from nnsight_vllm.remote.connection import Connection, Refusal
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.wire.trace import PREFIX, Asked, Prepared


@dataclass(frozen=True)
class RemoteSampling:
    """`arguments` as JSON text; the rest is what recording needs to know."""

    arguments: str
    max_tokens: int | None
    n: int


class Samplings:
    """Those that the server has checked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, RemoteSampling] = {}

    def of(self, arguments: dict[str, object]) -> RemoteSampling:
        """Raises `AdmissionError` for what vLLM doesn't know or allow."""
        key = _text(arguments)
        if key not in self._known:
            self._known[key] = self._checked(key)
        return self._known[key]

    def _checked(self, arguments: str) -> RemoteSampling:
        content = msgspec.json.encode(Asked(samplings=[json.loads(arguments)]))
        try:
            answer = self._connection.send("POST", f"{PREFIX}/prepare", content, {"Content-Type": "application/json"})
        except Refusal as refusal:
            raise refusal.as_error() from None
        (settled,) = msgspec.json.decode(answer.content, type=Prepared).samplings
        return RemoteSampling(arguments, settled.max_tokens, settled.n)


def _text(arguments: dict[str, object]) -> str:
    for name, value in arguments.items():
        try:
            json.dumps(value, default=_plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AdmissionError(
                f"bad sampling arguments: {name}={value!r:.80} can't be sent to a server: {error}; {user_line()}"
            ) from None
    return json.dumps(arguments, default=_plain, sort_keys=True)


def _plain(value: Any) -> object:
    """vLLM's own objects, such as its structured outputs, by what was set of them; numbers of numpy and torch."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        set_ones = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {name: one for name, one in set_ones.items() if one is not None and not name.startswith("_")}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"a {type(value).__name__} isn't data")
