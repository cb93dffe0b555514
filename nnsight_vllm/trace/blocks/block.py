"""A `with` block whose control flow may be over proxies: rewritten once, then run in the place of the native body.

`prepare` decides, when the block is entered, whether it needs rewriting. `Body.skip` has the native body skipped by a
`SkipBody` at its first line; the context's `__exit__` then calls `Body.run`. The rewritten body is a function on the
caller's own closure cells and globals, so inner functions and outer ones see its names; locals without a cell are
written back when it ends, well or not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType
from weakref import WeakKeyDictionary

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks import frames
from nnsight_vllm.trace.blocks.bindings import UNBOUND, Bindings
from nnsight_vllm.trace.blocks.build import Built, build, is_rewritten
from nnsight_vllm.trace.blocks.constructs import BlockRecorder
from nnsight_vllm.trace.blocks.control import Runtime
from nnsight_vllm.trace.blocks.locate import Located, locate
from nnsight_vllm.trace.blocks.poison import Poison
from nnsight_vllm.trace.blocks.skip import Skip, SkipBody
from nnsight_vllm.trace.blocks.syntax import needs_rewriting, obstacle

__all__ = ["Body", "SkipBody", "prepare", "why_native"]


@dataclass(frozen=True)
class _Plan:
    """What is known about the `with` at one place of one code object: rewritten, or the reason why it isn't.

    The native body is skipped at the first of `lines`; without them, before `as` binds its name.
    """

    built: Built | None
    reason: str
    lines: range | None = None


_PLANS: WeakKeyDictionary[CodeType, dict[tuple[str, int], _Plan]] = WeakKeyDictionary()
_REASONS: WeakKeyDictionary[CodeType, str] = WeakKeyDictionary()


class Body:
    """The rewritten body of one run of a block."""

    def __init__(self, frame: FrameType, built: Built, lines: range | None) -> None:
        self._frame = frame
        self._built = built
        self._skip = Skip(frame, lines)
        self._handled: BaseException | None = None

    def skip(self, frame: FrameType) -> None:
        """Have the native body skipped. Call it from the context's `__enter__`."""
        assert frame is self._frame
        self._handled = sys.exception()
        if not self._skip.start():
            _REASONS[frame.f_code] = (
                "it runs inside a debugger's prompt or a trace function, where a block can't be replaced"
            )

    def run(self, recorder: BlockRecorder) -> None:
        """Run the rewritten body. Call it from `__exit__`, where `SkipBody` arrives. Raises what the body raises."""
        self.run_each(recorder, [self._skip.entered])

    def run_each(self, recorder: BlockRecorder, items: Iterable[object]) -> None:
        """Run the rewritten body once for each item, which `as` names."""
        names = _Names(self._frame, self._built)
        function, skipped = names.function(), sys.exception()
        self._skip.restore_frame()
        frames.set_handled(self._handled)
        try:
            self._skip.restore_thread()
            for item in items:
                names.enter(item)
                function(Runtime(recorder, names.bindings, self._frame.f_code.co_filename))
        finally:
            tracer = sys.gettrace()
            sys.settrace(None)
            frames.set_handled(skipped)
            try:
                names.write_back()
            finally:
                sys.settrace(tracer)


class _Names:
    """The names of the frame that the rewritten body uses: its live cells, and copies of plain locals in new cells."""

    def __init__(self, frame: FrameType, built: Built) -> None:
        live, values = frames.cells(frame), frames.names(frame)
        code = built.code
        self._frame = frame
        self._code = code
        self._copies = {name: values.get(name, UNBOUND) for name in code.co_freevars if name not in live}
        new = {name: _cell(value) for name, value in self._copies.items()}
        self._cells = {name: live[name] if name in live else new[name] for name in code.co_freevars}
        self._bound = built.bound
        self._entered_as = built.entered_as
        self.bindings = Bindings(self._cells, frame.f_globals)

    def function(self) -> FunctionType:
        closure = tuple(self._cells[name] for name in self._code.co_freevars)
        return FunctionType(self._code, self._frame.f_globals, self._frame.f_code.co_name, None, closure)

    def enter(self, item: object) -> None:
        """Bind what `as` names, if that's left to the body."""
        if self._entered_as is not None:
            self.bindings.set({self._entered_as: item})

    def write_back(self) -> None:
        """Bind the frame's plain locals to what the body left. One that it deleted can't be unbound from outside."""
        now = self.bindings.get(name for name in self._bound if name in self._copies)
        changed = {name: value for name, value in now.items() if value is not self._copies[name]}
        gone = {
            name: Poison(name, "it was deleted in the block") for name, value in changed.items() if value is UNBOUND
        }
        frames.write_names(self._frame, changed | gone)


def prepare(frame: FrameType) -> Body | None:
    """Decide how the block of the `with` that the frame is entering runs. None: natively, `why_native` has the reason.

    Raises `ControlFlowError`, before anything runs, for a block that needs rewriting and can't be.
    """
    code = frame.f_code
    if is_rewritten(code):
        return None
    plans, key = _PLANS.setdefault(code, {}), (code.co_filename, frame.f_lasti)
    if key not in plans:
        plans[key] = _plan(frame)
    plan = plans[key]
    _REASONS[code] = plan.reason
    return Body(frame, plan.built, plan.lines) if plan.built is not None else None


def prepare_repeated(frame: FrameType) -> Body | str:
    """The body of a block that runs several times, each time with another value for the name that `as` binds; or why not."""
    if is_rewritten(frame.f_code):
        return "it stands in a block that is run apart from its function already"
    located = locate(frame)
    if isinstance(located, str):
        return located
    if not frames.is_function(frame) and frame.f_locals is not frame.f_globals:
        return "it stands in a class body"
    target = located.item.optional_vars
    if not isinstance(target, ast.Name | None):
        return "`as` binds more than a plain name"
    _refuse_obstacles(located, frame.f_code.co_filename)
    lines = range(located.first_line, located.last_line + 1) if located.starts_visibly() else None
    name = None if target is None else target.id
    return Body(frame, build(located.body, located.statement.lineno, frame.f_code, name), lines)


def why_native(frame: FrameType) -> str | None:
    """Why control flow met in this frame, in a block or in what it calls, isn't rewritten. None: no reason is known."""
    if is_rewritten(frame.f_code):
        return None
    if frame.f_code in _REASONS:
        return _REASONS[frame.f_code] or None
    caller = frame.f_back
    while caller is not None:
        if is_rewritten(caller.f_code) or caller.f_code in _REASONS:
            return f"it is in {frame.f_code.co_name!r}, which the block calls; only the block's own lines are rewritten"
        caller = caller.f_back
    return None


def _plan(frame: FrameType) -> _Plan:
    located = locate(frame)
    if isinstance(located, str):
        return _Plan(None, located)
    if not needs_rewriting(located.body):
        return _Plan(None, "no control flow that could be over a value stands in the block itself")
    if not frames.is_function(frame) and frame.f_locals is not frame.f_globals:
        return _Plan(None, "the block stands in a class body; put it into a function")
    target, code = located.item.optional_vars, frame.f_code
    if not located.starts_visibly() and not isinstance(target, ast.Name | None):
        return _Plan(None, "the block starts on its `with` line or with a `try`, and `as` binds more than a plain name")
    _refuse_obstacles(located, code.co_filename)
    if located.starts_visibly():
        lines = range(located.first_line, located.last_line + 1)
        return _Plan(build(located.body, located.statement.lineno, code, None), "", lines)
    entered_as = target.id if isinstance(target, ast.Name) else None
    return _Plan(build(located.body, located.statement.lineno, code, entered_as), "")


def _refuse_obstacles(located: Located, filename: str) -> None:
    found = obstacle(located.body)
    if found is not None:
        what, line = found
        raise ControlFlowError(
            f"{filename}:{line}: `{what}` can't stand in a block that has control flow (if, for, and, or, not, ...): such "
            "a block is run apart from its function; move it out of the block"
        )


def _cell(value: object) -> CellType:
    return CellType() if value is UNBOUND else CellType(value)
