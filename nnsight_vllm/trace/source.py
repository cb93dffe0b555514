"""The user's line behind what is being recorded."""

from __future__ import annotations

import linecache
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_TORCH = str(Path(torch.__file__).resolve().parent)


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's code."""

    file: str
    number: int

    def __str__(self) -> str:
        if self == _NOBODYS:
            return "in the request"
        text = linecache.getline(self.file, self.number).strip()
        return f"{self.file}:{self.number}" + (f": {text}" if text else "")


_NOBODYS = SourceLine("", 0)
_is_far_away: ContextVar[bool] = ContextVar("is_far_away", default=False)


def hide_lines() -> None:
    """In this context the user isn't in this process: errors tell no file of it."""
    _is_far_away.set(True)


def user_frame() -> FrameType:
    """The innermost frame outside of this package, torch, numpy and einops."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame or sys._getframe(1)


def user_line() -> SourceLine:
    """The line that `user_frame` stands at."""
    if _is_far_away.get():
        return _NOBODYS
    frame = user_frame()
    return SourceLine(frame.f_code.co_filename, frame.f_lineno)


def _is_ours(file: str) -> bool:
    return file.startswith((_PACKAGE, _TORCH, "<frozen")) or "/einops/" in file or "-packages/numpy/" in file
