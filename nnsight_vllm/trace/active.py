"""Which recorder a `.output` or `nv.list()` belongs to: each thread and each asyncio task has its own."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.recorder import Recorder

_open: ContextVar[Recorder | None] = ContextVar("nnsight_vllm_recorder", default=None)


def current(what: str) -> Recorder:
    """The recorder of the invoke that is open. Raises if there is none."""
    recorder = _recording()
    if recorder is None:
        raise RefusedError(f"{what} is only available inside a trace (or one of its invokes); {user_line()}")
    return recorder


def open_or(own: Recorder) -> Recorder:
    """The recorder of the invoke that is open; without one, this."""
    return _recording() or own


def is_recording() -> bool:
    return _recording() is not None


def push(recorder: Recorder) -> None:
    if is_recording():
        raise RefusedError(f"an invoke can't be opened inside another one; {user_line()}")
    _open.set(recorder)


def pop() -> None:
    _open.set(None)


def _recording() -> Recorder | None:
    """A task that was started in a block keeps a copy of its context, and may outlive it."""
    recorder = _open.get()
    return recorder if recorder is not None and recorder.state == "recording" else None
