"""Skips the native body of a `with` block: an exception at its first line, and everybody's tracing as it was before.

The interpreter reports lines to a thread's trace function. Ours stands in for a debugger's or coverage's from the
moment the context is entered to the first line of the body, sees nothing but the frame's own lines, and goes. Calls
that a previous function was following still report to it, so its own bookkeeping stays balanced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

TraceFunction = Callable[[FrameType, str, Any], Any]


class SkipBody(BaseException):
    """The native body of a block is skipped; the context's `__exit__` runs the rewritten one and swallows this."""


class Skip:
    """Tracing of one frame until its body, the lines `first` to `last`, starts."""

    def __init__(self, frame: FrameType, first: int, last: int) -> None:
        self._frame = frame
        self._lines = range(first, last + 1)
        self._thread_trace: TraceFunction | None = None
        self._frame_trace: TraceFunction | None = None
        self._frame_lines = True
        self._is_on = False

    def start(self) -> None:
        """Take over the thread's and the frame's trace functions."""
        self._thread_trace, self._frame_trace = sys.gettrace(), self._frame.f_trace
        self._frame_lines, self._is_on = self._frame.f_trace_lines, True
        self._frame.f_trace, self._frame.f_trace_lines = self._local, True
        sys.settrace(_ignore_calls)

    def restore_frame(self) -> None:
        """Give the frame its trace function back."""
        self._frame.f_trace, self._frame.f_trace_lines = self._frame_trace, self._frame_lines

    def restore_thread(self) -> None:
        """Give the thread its trace function back; calls from here on are reported to it."""
        self._is_on = False
        sys.settrace(self._thread_trace)

    def _local(self, frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        if event == "line" and frame.f_lineno in self._lines:
            raise SkipBody
        if event in {"exception", "return"} and self._is_on:
            self.restore_frame()
            self.restore_thread()
            return self._frame_trace
        return self._local


def _ignore_calls(frame: FrameType, event: str, argument: Any) -> None:
    return None
