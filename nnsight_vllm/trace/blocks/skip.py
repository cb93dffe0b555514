"""Skips the native body of a `with` block: an exception at its start, and everybody's tracing as it was before.

The interpreter reports lines to a thread's trace function. Ours stands in for a debugger's or coverage's from the
moment the context is entered to the first line of the body, sees nothing but the frame's own lines, and goes. Calls
that a previous function was following still report to it, so its own bookkeeping stays balanced. Where the body's first
line won't do (it is the `with` line itself, or a `try`, which no handler covers yet), the exception comes one
instruction after the context is entered, before `as` binds its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, FunctionType, MethodType
from typing import Any, cast

TraceFunction = Callable[[FrameType, str, Any], Any]


class SkipBody(BaseException):
    """The native body of a block is skipped; the context's `__exit__` runs the rewritten one and swallows this."""


class Skip:
    """Tracing of one frame until its body, these lines, starts; without lines, until its next instruction.

    `entered` is what the context's `__enter__` returned, if `as` didn't get to bind it.
    """

    def __init__(self, frame: FrameType, lines: range | None) -> None:
        self._frame = frame
        self._lines = lines
        self.thread_trace: TraceFunction | None = None
        self._frame_trace: TraceFunction | None = None
        self._frame_switches = True, False
        self._is_on = False
        self.entered: object = None

    def start(self) -> bool:
        """Take over the thread's and the frame's trace functions. False, and nothing changed, if nobody can trace here."""
        self.thread_trace = cast(TraceFunction | None, sys.gettrace())
        self._frame_trace = self._frame.f_trace
        self._frame_switches = self._frame.f_trace_lines, self._frame.f_trace_opcodes
        self._frame.f_trace, self._frame.f_trace_lines = self._local, True
        self._frame.f_trace_opcodes = self._lines is None
        if self._lines is None:
            self._note_entered(_frames_below(self._frame, sys._getframe())[0])
        sys.settrace(self._note_call)
        _call()
        if not self._is_on:
            self.restore_frame()
            sys.settrace(self.thread_trace)
        return self._is_on

    def restore_frame(self) -> None:
        """Give the frame its trace function back."""
        self._frame.f_trace = self._frame_trace
        self._frame.f_trace_lines, self._frame.f_trace_opcodes = self._frame_switches

    def restore_thread(self) -> None:
        """Give the thread its trace function back; calls from here on are reported to it.

        One written in C (coverage has one) is told of returns by the interpreter itself, so the calls between the
        frame and here, which were made while nobody traced, are told to it first.
        """
        self._is_on = False
        trace = self.thread_trace
        sys.settrace(trace)
        if trace is not None and not isinstance(trace, FunctionType | MethodType):
            for frame in _frames_below(self._frame, sys._getframe()):
                trace(frame, "call", None)

    def _note_call(self, frame: FrameType, event: str, argument: Any) -> None:
        self._is_on = True

    def _note_entered(self, entering: FrameType) -> None:
        """Keep what the context's `__enter__`, whose frame this is, returns: `as` won't bind it."""
        previous = entering.f_trace

        def note(frame: FrameType, event: str, argument: Any) -> TraceFunction:
            if event == "return":
                self.entered = argument
            if previous is not None:
                previous(frame, event, argument)
            return note

        entering.f_trace = note

    def _local(self, frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        if event == "opcode" if self._lines is None else event == "line" and frame.f_lineno in self._lines:
            raise SkipBody
        if event in {"exception", "return"} and self._is_on:
            self._is_on = False
            self.restore_frame()
            sys.settrace(self.thread_trace)
            return self._frame_trace
        return self._local


def _call() -> None:
    """Something to see whether calls are reported: inside another trace function, a debugger's prompt, they aren't."""


def _frames_below(outer: FrameType, inner: FrameType) -> list[FrameType]:
    """The frames that `outer` called to get to `inner`, `inner` last."""
    found, frame = list[FrameType](), inner
    while frame is not outer:
        found.append(frame)
        assert frame.f_back is not None
        frame = frame.f_back
    return found[::-1]
