"""Python's and numpy's operators on a value of the run: recorded in the block, done to the value itself afterwards."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.recording import RunValue, unwrap
from nnsight_vllm.trace.source import user_line

_ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
# numpy's name of an operator -> Python's.
_UFUNCS = {
    **dict(subtract="sub", multiply="mul", divide="truediv", floor_divide="floordiv", remainder="mod", power="pow"),
    **dict(bitwise_and="and", bitwise_or="or", bitwise_xor="xor", left_shift="lshift", right_shift="rshift"),
    **dict(equal="eq", not_equal="ne", less="lt", less_equal="le", greater="gt", greater_equal="ge"),
    **dict(add="add", matmul="matmul"),
}


class Operators(RunValue):
    """A value that operators may stand beside."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **kwargs: object) -> Any:
        """numpy's functions: its operators, for an array on the left, are recorded."""
        name = _UFUNCS.get(ufunc.__name__) if method == "__call__" and not kwargs.keys() - {"out"} else None
        python = getattr(operator, f"__{name}__", None)
        if self._is_done:
            whole = unwrap(inputs)
            return python(*whole) if python else getattr(ufunc, method)(*whole, **unwrap(kwargs))
        if python is None:
            raise RefusedError(f"numpy's {ufunc.__name__} can't be recorded, torch's functions can; {user_line()}")
        return self._here.op(f"py.{name}", python, inputs, {})

    def __round__(self, digits: int | None = None) -> Any:
        return _round(self.value, digits) if self._is_done else self._here.op("py.round", _round, (self, digits), {})

    __hash__ = object.__hash__


def _binary(name: str, function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[RunValue, object], Any]:
    def run(self: RunValue, other: object) -> Any:
        mine, theirs = (other, self) if reflected else (self, other)
        if self._is_done:
            return function(unwrap(mine), unwrap(theirs))
        return self._here.op(name, function, (mine, theirs), {})

    return run


def _inplace(name: str, function: Callable[[Any, Any], Any]) -> Callable[[RunValue, object], Any]:
    def run(self: RunValue, other: object) -> Any:
        if self._is_done:
            return function(self.value, unwrap(other))
        is_fixed = isinstance(self._metas[0], int | float | bool | str | tuple)
        return self._here.op(name.replace("py.i", "py.") if is_fixed else name, function, (self, other), {})

    return run


def _unary(name: str, function: Callable[[Any], Any]) -> Callable[[RunValue], Any]:
    def run(self: RunValue) -> Any:
        return function(self.value) if self._is_done else self._here.op(name, function, (self,), {})

    return run


def _refused(what: str) -> Callable[..., NoReturn]:
    def run(self: RunValue, *args: object) -> NoReturn:
        raise RefusedError(f"{what} of a value can't be recorded; {user_line()}")

    return run


def _install_operators() -> None:
    for bare in _ARITHMETIC.split():
        function = getattr(operator, f"__{bare}__")
        setattr(Operators, f"__{bare}__", _binary(f"py.{bare}", function, reflected=False))
        setattr(Operators, f"__r{bare}__", _binary(f"py.{bare}", function, reflected=True))
        setattr(Operators, f"__i{bare}__", _inplace(f"py.i{bare}", getattr(operator, f"__i{bare}__")))
    for bare in ["eq", "ne", "lt", "le", "gt", "ge"]:
        setattr(Operators, f"__{bare}__", _binary(f"py.{bare}", getattr(operator, bare), reflected=False))
    for bare in ["neg", "pos", "invert", "abs"]:
        setattr(Operators, f"__{bare}__", _unary(f"py.{bare}", getattr(operator, bare)))
    for bare in ["divmod", "complex", "delitem", "enter", "exit"]:
        setattr(Operators, f"__{bare}__", _refused(f"__{bare}__"))


def _round(value: Any, digits: int | None = None) -> object:
    if isinstance(value, torch.Tensor):
        return torch.round(value, decimals=digits or 0)
    return meta.UNKNOWN if isinstance(value, meta.Unknown) else round(value, digits)


_install_operators()
