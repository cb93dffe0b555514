"""Functions that work element by element, for all requests at once: bit for bit those of the requests one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.worker.lanes.alignment import Function, Uncovered, aligned_to, frame, rank_of, spread, wrapped
from nnsight_vllm.worker.lanes.lanes import Each, Items, Lane, Rows, resolved

_ARITHMETIC = {
    f"{space}.{name}"
    for space, names in {
        "py": "add sub mul truediv iadd isub imul itruediv",
        "tensor": "add sub mul div add_ sub_ mul_ div_",
        "torch": "add sub mul div",
    }.items()
    for name in names.split()
}
_SCALING = {name for name in _ARITHMETIC if "mul" in name or "div" in name}
_COMPARING = {f"{space}.{name}" for space in ("py", "tensor", "torch") for name in ["eq", "ne", "lt", "le", "gt", "ge"]}
_HALF = (torch.bfloat16, torch.float16)
_OUT_OF_PLACE: dict[str, Function] = {
    **dict.fromkeys(("py.iadd", "tensor.add_"), torch.add),
    **dict.fromkeys(("py.isub", "tensor.sub_"), torch.sub),
    **dict.fromkeys(("py.imul", "tensor.mul_"), torch.mul),
    **dict.fromkeys(("py.itruediv", "tensor.div_"), torch.div),
}


def pointwise(name: str, operation: Function, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
    """Element by element with broadcasting, after every value is aligned with the rows of all requests."""
    lanes = [*args, *kwargs.values()]
    ragged, rank = frame(lanes)
    values = [aligned_to(lane, ragged, rank) for lane in args]
    named = {key: aligned_to(lane, ragged, rank) for key, lane in kwargs.items()}
    if not any(isinstance(lane, Items) for lane in lanes):
        return wrapped(operation(*values, **named), ragged)
    return wrapped(_with_numbers(name, operation, args, values, rank, kwargs), ragged)


def change(name: str, operation: Function, target: Lane, rest: list[Lane], kwargs: dict[str, Lane]) -> None:
    """Change `target`'s tensor in place, element by element."""
    rest = [resolved(lane) for lane in rest]
    named = {key: resolved(lane) for key, lane in kwargs.items()}
    if not isinstance(target, Rows | Each) or any(rank_of(lane) > rank_of(target) for lane in rest):
        raise Uncovered
    if isinstance(target, Each) and any(isinstance(lane, Rows) for lane in rest):
        raise Uncovered
    result = pointwise(name, operation, [target, *rest], named)
    assert isinstance(result, Rows | Each) and result.tensor.data_ptr() == target.tensor.data_ptr()


def numbers_of(lane: Lane, dtype: torch.dtype) -> Lane:
    """A number a request as a tensor a request, rounded as torch rounds a number that is assigned."""
    if not isinstance(lane, Items) or not all(type(value) in (bool, int, float) for value in lane.values):
        return lane
    kind = torch.float64 if dtype.is_floating_point else torch.int64
    if kind is torch.int64 and any(type(value) is float for value in lane.values):
        raise Uncovered
    return Each(torch.tensor(lane.values, dtype=kind).to(dtype))


def _with_numbers(
    name: str, operation: Function, lanes: list[Lane], values: list[Any], rank: int, kwargs: dict[str, Lane]
) -> Tensor:
    """`tensor op number` where the number is each request's own.

    With bfloat16 and float16, torch multiplies and divides by the exact number and rounds once; it adds, subtracts and
    compares with the number rounded first (measured on a CPU). A number divided by a tensor is neither, in any type.
    """
    if len(lanes) != 2 or kwargs or name not in _ARITHMETIC | _COMPARING:
        raise Uncovered
    (at,) = [i for i, lane in enumerate(lanes) if isinstance(lane, Items)] if _num_items(lanes) == 1 else [-1]
    if at < 0:
        raise Uncovered
    other = lanes[1 - at]
    tensor = values[1 - at]
    numbers = values[at]
    if not isinstance(other, Rows | Each) or not tensor.is_floating_point():
        raise Uncovered
    if not all(type(number) in (int, float) for number in numbers):
        raise Uncovered
    is_half = tensor.dtype in _HALF and name in _SCALING
    if at == 0 and "div" in name:
        raise Uncovered
    wide = torch.float32 if is_half else tensor.dtype
    column = torch.tensor(numbers, dtype=torch.float64, device=tensor.device).to(wide)
    ragged = other.ragged if isinstance(other, Rows) else None
    column = spread(column, ragged, rank)
    pair = (column, tensor.to(wide)) if at == 0 else (tensor.to(wide), column)
    if name.endswith("_") or name in {"py.iadd", "py.isub", "py.imul", "py.itruediv"}:
        changed: Tensor = tensor.copy_(_OUT_OF_PLACE[name](*pair)) if is_half else operation(*pair)
        return changed
    result: Tensor = operation(*pair)
    return result.to(tensor.dtype) if name in _ARITHMETIC else result


def _num_items(lanes: list[Lane]) -> int:
    return sum(isinstance(lane, Items) for lane in lanes)
