"""What a name holds when no single value can stand for it: it was bound on one path only, or its paths don't merge.

A `Poison` raises `ScopeError` at any use: attribute, operator, call, index, iteration, truth, text, `isinstance`, an
argument of a torch function. The message names the variable, where it became unusable and where it was used. `values`
keeps what the paths had bound, for a saved value still has to reach the user's variable after the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Never, cast

from nnsight_vllm.errors import ScopeError

_NOT_THE_USERS = frozenset({"nnsight_vllm", "torch", "einops"})
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or"
_OTHER = """
    eq ne lt le gt ge neg pos abs invert hash bool len length_hint int float complex index round trunc floor ceil
    repr str format bytes iter next reversed contains getitem setitem delitem call enter exit await aiter anext
    setattr delattr copy deepcopy reduce reduce_ex dir array
"""
_OPEN = frozenset({"name", "reason", "values"})


class Poison:
    """An unusable value. Test for it with `is_poison`: `isinstance(poison, other_class)` raises."""

    __slots__ = ("name", "reason", "values")

    name: str
    reason: str
    values: tuple[object, ...]

    def __init__(self, name: str, reason: str, values: tuple[object, ...] = ()) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "reason", reason)
        object.__setattr__(self, "values", values)

    def __getattribute__(self, attribute: str) -> object:
        return object.__getattribute__(self, attribute) if attribute in _OPEN else fail(self)

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Never:
        fail(cast(Poison, _find(args) or _find(kwargs)))


def is_poison(value: object) -> bool:
    """Whether the value may not be used."""
    return type(value) is Poison


def kept(*values: object) -> tuple[object, ...]:
    """The distinct usable values among these, those kept in a poison included."""
    flat = [inner for value in values for inner in (value.values if type(value) is Poison else (value,))]
    return tuple({id(value): value for value in flat}.values())


def fail(poison: Poison) -> Never:
    """Raise the poison's error at the user's line."""
    raise ScopeError(f"{user_place()}: `{poison.name}` can't be used here: {poison.reason}")


def user_place() -> str:
    """`file:line` of the nearest caller outside this package and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_USERS:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _find(values: object) -> object:
    if type(values) is Poison:
        return values
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    return next((found for item in items if (found := _find(item)) is not None), None)


def _uses() -> list[str]:
    """Names of the special methods that stand for a use of the value."""
    arithmetic = [f"{prefix}{name}" for prefix in ("", "r", "i") for name in _BINARY.split()]
    return [f"__{name}__" for name in arithmetic + _OTHER.split()]


def _raiser() -> Callable[..., Never]:
    def use(self: Poison, *args: object, **kwargs: object) -> Never:
        fail(self)

    return use


for _name in _uses():
    setattr(Poison, _name, _raiser())
