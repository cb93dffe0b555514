"""What a request has to send home: saved values, logs, and how it ended.

A saved tensor is copied when it's saved. A saved list or dict is followed: at the end of a step it's compared with what
the other side has, and only what a list gained is sent where nothing else changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.codec import encode_delta
from nnsight_vllm.graph.results import Delta, Failure, ListValue, Saved, Sheet
from nnsight_vllm.wire.limits import DEFAULT, Limits
from nnsight_vllm.wire.values import encode_value, names_of
from nnsight_vllm.worker.ops.containers import check_container

_UNSENT = object()
MAX_MESSAGE = 4096


class Outbox:
    """One request's results since the last time they were sent.

    Its `id` is in `unsent`, which all requests share, as long as there may be something to send: a step doesn't ask each.
    `has_ended`: what was taken last said that the request stopped or failed. `limits`: of the bytes that are saved in one
    step, logs among them, and of all lines of logs.
    """

    def __init__(self, id: str = "", unsent: set[str] | None = None, limits: Limits = DEFAULT) -> None:
        self._id = id
        self._limits = limits
        self._num_bytes = 0  # saved in this step
        self._num_lines = 0
        self._unsent = set() if unsent is None else unsent
        self._values: dict[str, Any] = {}
        self._followed: dict[str, Followed] = {}
        self._changed: set[int] = set()  # storages that in-place operations touched
        self._appended: dict[str, list[Any]] = {}
        self._logs: list[str] = []
        self.stopped = False
        self.keep_token = True
        self.failure: Failure | None = None
        self.has_ended = False

    def another(self) -> Outbox:
        """One with the same limits that sends to nobody."""
        return Outbox(limits=self._limits)

    @property
    def is_empty(self) -> bool:
        return self._id not in self._unsent

    def save(self, name: str, value: Any) -> None:
        """A tensor as it is now; a list or dict from now on."""
        self._unsent.add(self._id)
        if isinstance(value, list | dict):
            self._values.pop(name, None)
            if name not in self._followed or self._followed[name].value is not value:
                self._followed[name] = Followed(name, value)
        else:
            self._followed.pop(name, None)
            self._count(size_of(value))
            self._values[name] = frozen_copy(value)

    def start(self, name: str) -> None:
        """A list that items will be appended to, and that nobody reads."""
        self._unsent.add(self._id)
        self._values[name] = []

    def append(self, name: str, value: Any) -> None:
        """One item more of a list that is saved under this name and that nobody reads."""
        self._unsent.add(self._id)
        self._count(size_of(value))
        started = self._values.get(name)
        items = started if isinstance(started, list) else self._appended.setdefault(name, [])
        items.append(frozen_copy(value))

    def values(self) -> dict[str, Any]:
        """What was saved and isn't sent: tensors and the like, not what is followed."""
        return self._values

    def log(self, text: str) -> None:
        self._unsent.add(self._id)
        self._num_lines += 1
        if self._num_lines > self._limits.log_lines:
            raise InterventionError(
                f"the request logged {self._num_lines} lines; the limit `log_lines` is {self._limits.log_lines}"
            )
        self._count(len(text))
        self._logs.append(text)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if excess := self._limits.excess(0, 0, self._num_bytes):
            raise InterventionError(excess)

    def changed(self, value: Any) -> None:
        """A tensor that an in-place operation changed; saved containers may hold it."""
        if self._followed and isinstance(value, Tensor):
            self._changed.add(value.untyped_storage().data_ptr())

    def stop(self, keep_token: bool) -> None:
        self._unsent.add(self._id)
        self.stopped, self.keep_token = True, keep_token

    def fail(self, failure: Failure, keep_token: bool) -> None:
        self._unsent.add(self._id)
        self.failure, self.keep_token = failure, keep_token

    def take(self, sheet: Sheet | None = None) -> bytes | None:
        """Everything new as a msgpack `Delta`, or None. What can't be sent turns into a failure."""
        if self.is_empty and sheet is None:
            return None
        self.has_ended = self.stopped or self.failure is not None
        try:
            data = _encode(self._delta(sheet))
        except Exception as error:
            failure = Failure(type(error).__name__, f"a saved value can't be sent: {describe(error)}")
            data = encode_delta(Delta(failure=failure, keep_token=self.keep_token))
            self.has_ended = True
        self._clear()
        return data

    def _delta(self, sheet: Sheet | None) -> Delta:
        saves = [Saved(name, encode_value(value)) for name, value in self._values.items()]
        for followed in self._followed.values():
            if (saved := followed.take(self._changed, self._count)) is not None:
                saves.append(saved)
        for name, items in self._appended.items():
            saves.append(Saved(name, ListValue([encode_value(item) for item in items]), append=True))
        return Delta(saves, self._logs, self.stopped, self.keep_token, self.failure, sheet)

    def _clear(self) -> None:
        self._values, self._logs, self._changed, self._appended = {}, [], set(), {}
        self._num_bytes = 0
        self.stopped, self.keep_token, self.failure = False, True, None
        if not self._followed:
            self._unsent.discard(self._id)


def describe(error: BaseException) -> str:
    """An error's text, also where it has none that can be made or sent, cut to a sane length."""
    try:
        text = str(error) or repr(error)
    except Exception:  # a stranger's value may be what can't be printed
        text = "an error without a printable text"
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_MESSAGE]


def _encode(delta: Delta) -> bytes | None:
    return None if delta == Delta() else encode_delta(delta)


class Followed:
    """A saved container and a snapshot of what was sent of it."""

    def __init__(self, name: str, value: list[Any] | dict[Any, Any]) -> None:
        self.name = name
        self.value = value
        self._sent: Any = _UNSENT

    def take(self, changed: set[int], count: Callable[[int], None]) -> Saved | None:
        """What has to be sent, its bytes counted first; None if the other side has it all."""
        sent, value = self._sent, self.value
        check_container(value)
        if _is_same(sent, value, changed):
            return None
        self._sent = _snapshot(value)
        if isinstance(value, list) and isinstance(sent, list) and _is_same(sent, value[: len(sent)], changed):
            count(size_of(value[len(sent) :]))
            return Saved(self.name, ListValue([encode_value(item) for item in value[len(sent) :]]), append=True)
        count(size_of(value))
        return Saved(self.name, encode_value(value))


def size_of(value: Any) -> int:
    """Bytes of a value as it travels. Raises for containers that are too deep or too large."""
    if isinstance(value, list | tuple | dict):
        check_container(value)
    return _size(value)


def _size(value: Any) -> int:
    match value:
        case Tensor():
            return value.nbytes
        case list() | tuple():
            return sum(map(_size, value))
        case dict():
            return sum(map(_size, value.keys())) + sum(map(_size, value.values()))
        case str():
            return len(value)
        case _:
            return 8


def frozen_copy(value: Any) -> Any:
    """A copy that later operations can't change. Lists and dicts inside are copied too."""
    match value:
        case Tensor():
            return value.detach().clone()
        case torch.Size():
            return tuple(value)
        case list():
            return [frozen_copy(item) for item in value]
        case tuple():
            items = tuple(frozen_copy(item) for item in value)
            return type(value)(items) if names_of(value) else items
        case dict():
            return {key: frozen_copy(item) for key, item in value.items()}
        case _:
            return value


def _snapshot(value: Any) -> Any:
    """The structure with the tensors themselves as leaves: they are compared by identity."""
    match value:
        case list():
            return [_snapshot(item) for item in value]
        case tuple():
            return tuple(_snapshot(item) for item in value)
        case dict():
            return {key: _snapshot(item) for key, item in value.items()}
        case _:
            return value


def _is_same(sent: Any, value: Any, changed: set[int]) -> bool:
    if type(sent) is not type(value) and not (isinstance(sent, tuple) and isinstance(value, tuple)):
        return False
    match value:
        case Tensor():
            return sent is value and value.untyped_storage().data_ptr() not in changed
        case list() | tuple():
            return len(sent) == len(value) and all(map(lambda a, b: _is_same(a, b, changed), sent, value))
        case dict():
            return list(sent) == list(value) and all(_is_same(sent[key], value[key], changed) for key in value)
        case float():
            return bool(sent == value) or (sent != sent and value != value)
        case _:
            return bool(sent == value)
