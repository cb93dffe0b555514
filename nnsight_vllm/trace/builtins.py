"""Containers and conversions that are part of the graph: `nv.list()`, `nv.int(x)`, `nv.log(...)`.

Inside a trace they record; outside they are Python's own.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import torch

from nnsight_vllm.trace import meta
from nnsight_vllm.trace.recorder import current
from nnsight_vllm.trace.recording import is_recording
from nnsight_vllm.trace.session import KeptDict, KeptList, kept_by_session


def _recorded(name: Any, python: Callable[..., Any], twin: Callable[..., Any], args: Any) -> Any:
    if not is_recording():
        return python(*args)
    return current(f"nv.{name}()").op(f"py.{name}", twin, args, {})


def _scalar(value: Any) -> object:
    return meta.UNKNOWN if isinstance(value, torch.Tensor) else value


def list(*items: Any) -> Any:
    """A list in the run. What is appended to it after `.save()` comes home too. Between the traces of a session one of Python's."""
    if not is_recording() and kept_by_session(kept := KeptList(items)):
        return kept
    return _recorded("list", builtins.list, builtins.list, items)


def dict(*items: Any, **named: Any) -> Any:
    """A dict in the run; between the traces of a session one of Python's."""
    if not is_recording() and kept_by_session(kept := KeptDict(*items, **named)):
        return kept
    args = (builtins.dict(*items, **named),) if named else items
    return _recorded("dict", builtins.dict, builtins.dict, args)


def tuple(*items: Any) -> Any:
    """A tuple in the run."""
    return _recorded("tuple", builtins.tuple, builtins.tuple, items)


def int(value: Any = 0) -> Any:
    """A value of the run as an int."""
    return _recorded("int", builtins.int, _scalar, (value,))


def float(value: Any = 0.0) -> Any:
    """A value of the run as a float."""
    return _recorded("float", builtins.float, _scalar, (value,))


def str(value: Any = "") -> Any:
    """A value of the run as text."""
    return _recorded("str", builtins.str, _scalar, (value,))


def bool(value: Any = False) -> Any:
    """The truth of a value of the run."""
    return _recorded("bool", builtins.bool, _scalar, (value,))


def log(*args: Any) -> None:
    """Print the arguments when the run is over; values of the run included."""
    if is_recording():
        current("nv.log()").log(args)
    else:
        print(*args)
