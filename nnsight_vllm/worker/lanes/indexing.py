"""Parts of lanes: rows and columns that all requests name alike, or each for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.lanes.alignment import Uncovered
from nnsight_vllm.worker.lanes.lanes import (
    Each,
    Held,
    Items,
    Lane,
    Pick,
    Ragged,
    Rows,
    Several,
    Shared,
    View,
    as_ints,
    resolved,
)


def part(target: Lane, key: list[Any], is_kept: bool) -> Lane:
    """`target[key]`, where the elements of `key` are lanes, slices of lanes, None or `...`.

    With `is_kept` the result must share the target's memory, as it does for a request alone.
    """
    match target:
        case View():
            return _part_of_view(target, key, is_kept)
        case Rows():
            return _part_of_view(View(Held(target.tensor, target.ragged)), key, is_kept)
        case Each():
            return _part_of_each(target, key)
        case Several():
            (index,) = key
            if not isinstance(index, Shared) or type(index.value) is not int:
                raise Uncovered
            return target.lanes[index.value]
        case _:
            raise Uncovered


def _part_of_view(view: View, key: list[Any], is_kept: bool) -> Lane:
    if view.own is not None:
        raise Uncovered
    own = _own_column(key, view)
    if own is not None:
        first = key[0] if len(key) == 2 else slice(None)
        picked = View(view.memory, view.pick) if is_full(first) else _part_of_view(view, [first], is_kept)
        assert isinstance(picked, View)
        return View(picked.memory, picked.pick, (), own)
    if view.pick is not None and view.pick.ragged is None:
        if view.columns:
            raise Uncovered
        return View(view.memory, view.pick, _basic(key))
    if view.columns:
        value = view.read()
        first, *rest = key
        if view.pick is None and is_full(first) and not has_tensors(rest) and isinstance(value, Rows):
            return Rows(value.tensor[(slice(None), *_basic(rest))], value.ragged)  # a view of the memory too
        if is_kept:
            raise Uncovered
        return _part_of_view(View(Held(value.tensor, _ragged_of(value))), key, is_kept)
    first, *rest = key
    ragged = view.memory.ragged if view.pick is None else view.pick.ragged
    assert ragged is not None
    if first is Ellipsis and not has_tensors(rest):
        return View(view.memory, view.pick, (Ellipsis, *_basic(rest)))  # too many for the columns: torch says so
    if first is Ellipsis or first is None:
        raise Uncovered
    if not is_full(first):
        if view.pick is not None:
            raise Uncovered
        return View(view.memory, _pick(ragged, first), _basic(rest))
    if not has_tensors(rest):
        return View(view.memory, view.pick, _basic(rest))
    value = view.read()
    assert isinstance(value, Rows)
    return Rows(value.tensor[column_index(rest, value.ragged)], value.ragged)


def _own_column(key: list[Any], view: View) -> Ints | None:
    """The column that each request names for itself, if the key's last element is that."""
    is_row = view.pick is not None and view.pick.ragged is None
    if view.columns or len(key) != (1 if is_row else 2) or not isinstance(key[-1], Items):
        return None
    width, tensor = view.memory.tensor.shape[-1], view.memory.tensor
    if tensor.ndim != 2 or not all(type(value) is int and -width <= value < width for value in key[-1].values):
        raise Uncovered
    return as_ints(key[-1].values)


def _part_of_each(target: Each, key: list[Any]) -> Lane:
    return Each(target.tensor[(slice(None), *_basic(key))])


def _ragged_of(value: Lane) -> Ragged:
    if not isinstance(value, Rows):
        raise Uncovered
    return value.ragged


def column_index(key: list[Any], ragged: Ragged) -> tuple[Any, ...]:
    """The index [all rows, ...] for one tensor of column numbers, everybody's or each request's own."""
    if len(key) != 1:
        raise Uncovered
    match resolved(key[0]):
        case Shared(value=Tensor() as ids) if not ids.is_floating_point() and ids.dtype != torch.bool and ids.ndim == 1:
            return (slice(None), ids)
        case Each(tensor=ids) if not ids.is_floating_point() and ids.dtype != torch.bool and ids.ndim == 2:
            own = ids if ragged.is_single else ids.index_select(0, ragged.owner.to(ids.device))
            return (torch.arange(ragged.total, device=ids.device).unsqueeze(1), own)
        case _:
            raise Uncovered


def _pick(ragged: Ragged, first: Any) -> Pick:
    """Rows by an integer or a slice, each request's own or everybody's."""
    num = len(ragged.counts)
    if isinstance(first, slice):
        if first.step is not None and _numbers(first.step, num) != [1] * num:
            raise Uncovered
        starts, stops = _numbers(first.start, num), _numbers(first.stop, num)
        bounds = [slice(a, b).indices(n)[:2] for a, b, n in zip(starts, stops, ragged.counts.tolist(), strict=True)]
        counts = [max(stop - start, 0) for start, stop in bounds]
        return Pick(ragged.starts + as_ints([start for start, _ in bounds]), Ragged(as_ints(counts)))
    known = first.value if isinstance(first, Shared) else None
    if type(known) is int and known in ragged.picks:
        return ragged.picks[known]
    rows = as_ints(_numbers(first, num))
    rows = rows + (rows < 0) * ragged.counts
    if bool(((rows < 0) | (rows >= ragged.counts)).any()):
        raise Uncovered  # the requests that are out of range find out by themselves
    pick = Pick(ragged.starts + rows, None, ragged.is_single)
    if type(known) is int:
        ragged.picks[known] = pick
    return pick


def _numbers(lane: Any, num: int) -> list[Any]:
    """An integer or None a request."""
    match lane:
        case None:
            return [None] * num
        case Shared(value=value) if type(value) is int or value is None:
            return [value] * num
        case Items(values=values) if all(type(value) is int for value in values):
            return values
        case _:
            raise Uncovered


def is_full(first: Any) -> bool:
    return isinstance(first, slice) and first == slice(None)


def has_tensors(key: list[Any]) -> bool:
    return any(isinstance(element, Each | Rows | View | Items) or _is_tensor(element) for element in key)


def _is_tensor(element: Any) -> bool:
    return isinstance(element, Shared) and not (type(element.value) is int or element.value is None)


def _basic(key: list[Any]) -> tuple[Any, ...]:
    """Integers, slices, None and `...`, the same for everybody."""
    return tuple(_basic_element(element) for element in key)


def _basic_element(element: Any) -> Any:
    match element:
        case None:
            return None
        case Shared(value=value) if type(value) is int or value is None:
            return value
        case slice():
            parts = [_basic_element(part) for part in (element.start, element.stop, element.step)]
            return slice(*parts)
        case _ if element is Ellipsis:
            return element
        case _:
            raise Uncovered
