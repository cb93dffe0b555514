"""The caller's frame: its names, read and written while it still runs.

In goes the frame that holds the `with` statement, out come its names as a dict, its closure cells, and the exception
it is handling. Writing binds names and never unbinds one: the compiler may have proved that a local is bound and then
reads it unchecked. CPython 3.11 and 3.12 keep a copy of the locals that has to be flushed; from 3.13 on `f_locals`
writes through. No Python interface gives the cells of a running frame, so they are read from the interpreter's own
record of it, whose identity is checked first.
"""

from __future__ import annotations

import ctypes
import dis
import inspect
import sys
from collections.abc import Mapping
from types import CellType, CodeType, FrameType
from typing import cast

from nnsight_vllm.errors import ControlFlowError

_WORD = ctypes.sizeof(ctypes.c_void_p)
_COPIES_LOCALS = sys.version_info < (3, 13)
# Word offsets in _PyInterpreterFrame of the code object, the globals and the frame object, and of the first local.
_CODE, _GLOBALS, _FRAME = (4, 1, 5) if sys.version_info < (3, 12) else (0, 3, 6)
_LOCALS = 9


def is_function(frame: FrameType) -> bool:
    """Whether the frame keeps its names in slots and cells (a function), not in a dict (a module, a class body)."""
    return bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)


def names(frame: FrameType) -> dict[str, object]:
    """Every name the frame can see as its own, closure variables included. A module's own dict, a function's copy."""
    if is_function(frame):
        return dict(frame.f_locals)
    return frame.f_locals if isinstance(frame.f_locals, dict) else dict(frame.f_locals)


def global_names(frame: FrameType) -> dict[str, object]:
    """The names that a function declares `global` and binds, where they are bound."""
    if not is_function(frame):
        return {}
    bound = {i.argval for i in dis.get_instructions(frame.f_code) if i.opname == "STORE_GLOBAL"}
    return {name: frame.f_globals[name] for name in bound if name in frame.f_globals}


def write_names(frame: FrameType, values: Mapping[str, object]) -> None:
    """Bind names in the frame. In a function, a name that isn't its own is bound in its module (`global`)."""
    if not is_function(frame):
        frame.f_locals.update(values)
        return
    own = set(local_names(frame.f_code))
    frame.f_globals.update({name: value for name, value in values.items() if name not in own})
    _write_locals(frame, {name: value for name, value in values.items() if name in own})


def local_names(code: CodeType) -> tuple[str, ...]:
    """The names of a function's locals, cells and closure variables."""
    return tuple(dict.fromkeys(code.co_varnames + code.co_cellvars + code.co_freevars))


def cells(frame: FrameType) -> dict[str, CellType]:
    """The frame's live closure cells by name: its own variables that inner functions use, and those of outer ones."""
    code = frame.f_code
    wanted = {*code.co_cellvars, *code.co_freevars}
    if not wanted:
        return {}
    slots = dict(zip(_slot_names(code), _slots(frame), strict=False))
    found = {name: ctypes.cast(slot, ctypes.py_object).value for name in wanted if (slot := slots.get(name))}
    return {name: cell for name, cell in found.items() if isinstance(cell, CellType)}


def set_handled(error: BaseException | None) -> None:
    """Make `error` the exception being handled here, as `raise`, `sys.exception` and exception contexts see it.

    It acts on the thread's current handler, which every plain function shares with its callers: don't call it from a
    generator, which has its own.
    """
    ctypes.pythonapi.PyErr_SetHandledException(ctypes.py_object(error))


def _write_locals(frame: FrameType, values: Mapping[str, object]) -> None:
    if not values:
        return
    frame.f_locals.update(values)
    if _COPIES_LOCALS:
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _slot_names(code: CodeType) -> list[str]:
    """The names of the frame's slots in order: locals, then cells that aren't arguments, then closure variables."""
    own = list(code.co_varnames)
    return own + [name for name in code.co_cellvars if name not in own] + list(code.co_freevars)


def _slots(frame: FrameType) -> list[int | None]:
    """The addresses in the frame's slots (None: empty)."""
    record = ctypes.c_void_p.from_address(id(frame) + object.__basicsize__ + _WORD).value
    count = len(_slot_names(frame.f_code))
    words = (ctypes.c_void_p * (_LOCALS + count)).from_address(_checked(frame, record))
    return cast("list[int | None]", list(words)[_LOCALS:])


def _checked(frame: FrameType, record: int | None) -> int:
    known = sys.implementation.name == "cpython" and sys.version_info < (3, 14)
    if known and record is not None:
        head = (ctypes.c_void_p * _LOCALS).from_address(record)
        if (head[_CODE], head[_GLOBALS], head[_FRAME]) == (id(frame.f_code), id(frame.f_globals), id(frame)):
            return record
    raise ControlFlowError(
        f"{frame.f_code.co_filename}:{frame.f_lineno}: this Python ({sys.version.split()[0]}) doesn't show the closure "
        "variables of a running function, so control flow over a proxy can't be recorded in a function that has some; "
        "use CPython 3.11 to 3.13, or a function without closures"
    )
