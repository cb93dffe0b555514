"""A `with` block whose control flow may be over proxies: rewritten once, then run in the place of the native body.

`prepare` decides, when the block is entered, whether it needs rewriting. `Body.skip` has the native body skipped by a
`SkipBody` at its first line; the context's `__exit__` then calls `Body.run`. The rewritten body is a function on the
caller's own closure cells and globals, so inner functions and outer ones see its names; locals without a cell are
written back when it ends, well or not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType
from weakref import WeakKeyDictionary

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace import frames
from nnsight_vllm.trace.bindings import UNBOUND, Bindings
from nnsight_vllm.trace.build import Built, build, is_rewritten
from nnsight_vllm.trace.control import Recorder, Runtime
from nnsight_vllm.trace.locate import Located, locate
from nnsight_vllm.trace.poison import Poison
from nnsight_vllm.trace.skip import Skip, SkipBody
from nnsight_vllm.trace.syntax import needs_rewriting, obstacle

__all__ = ["Body", "SkipBody", "prepare", "why_native"]


@dataclass(frozen=True)
class _Plan:
    """What is known about the `with` at one place of one code object: rewritten, or the reason why it isn't."""

    built: Built | None
    reason: str
    lines: tuple[int, int] = (0, 0)


_PLANS: WeakKeyDictionary[CodeType, dict[tuple[str, int], _Plan]] = WeakKeyDictionary()
_REASONS: WeakKeyDictionary[CodeType, str] = WeakKeyDictionary()


class Body:
    """The rewritten body of one run of a block."""

    def __init__(self, frame: FrameType, built: Built, lines: tuple[int, int]) -> None:
        self._frame = frame
        self._built = built
        self._skip = Skip(frame, *lines)
        self._handled: BaseException | None = None

    def skip(self, frame: FrameType) -> None:
        """Have the native body skipped. Call it from the context's `__enter__`, last."""
        self._handled = sys.exception()
        self._skip.start()

    def run(self, recorder: Recorder) -> None:
        """Run the rewritten body. Call it from `__exit__`, where `SkipBody` arrives. Raises what the body raises."""
        cells = self._cells()
        locals_before = {name: _contents(cell) for name, cell in self._local(cells).items()}
        runtime = Runtime(recorder, Bindings(cells, self._frame.f_globals), self._frame.f_code.co_filename)
        function = self._function(cells)
        skipped = sys.exception()
        self._skip.restore_frame()
        frames.set_handled(self._handled)
        try:
            self._skip.restore_thread()
            function(runtime)
            sys.settrace(tracer := _pause())
            runtime.finish()
        finally:
            ...
