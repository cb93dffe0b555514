"""Which recorder a `.output` or `nv.list()` in this thread belongs to."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.recorder import Recorder


class _Stack(threading.local):
    def __init__(self) -> None:
        self.recorders: list[Recorder] = []


_stack = _Stack()


def current(what: str) -> Recorder:
    """The recorder of the invoke that is open. Raises if there is none."""
    if not _stack.recorders:
        raise RefusedError(f"{what} is only available inside a trace (or one of its invokes); {user_line()}")
    return _stack.recorders[-1]


def is_recording() -> bool:
    return bool(_stack.recorders)


def push(recorder: Recorder) -> None:
    if _stack.recorders:
        raise RefusedError(f"an invoke can't be opened inside another one; {user_line()}")
    _stack.recorders.append(recorder)


def pop() -> None:
    _stack.recorders.pop()
