"""How the lanes of a group line up: which rows they have, and how what a request has once meets its rows.

What can't be lined up raises `Uncovered`, with nothing done: then every request runs the operation by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nnsight_vllm.worker.lanes.lanes import Each, Items, Lane, Ragged, Rows, Several, Shared

Function = Callable[..., Any]
MAX_REPEATED = 1 << 30  # bytes: what each request has once isn't copied to its rows beyond that


class Uncovered(Exception):
    """The requests of a group run this operation one by one."""


def aligned(lanes: list[Lane]) -> list[Any]:
    """Values that broadcast with one another, [all rows, ...] or [requests, ...]."""
    ragged, rank = frame(lanes)
    return [aligned_to(lane, ragged, rank) for lane in lanes]


def frame(lanes: list[Lane]) -> tuple[Ragged | None, int]:
    """The rows that the result has (None: the requests have no rows), and a request's number of dimensions in it."""
    ragged: Ragged | None = None
    rank = max(rank_of(lane) for lane in lanes)
    for lane in lanes:
        if not isinstance(lane, Rows):
            continue
        if lane.tensor.ndim != rank or (ragged is not None and not ragged.fits(lane.ragged)):
            raise Uncovered
        ragged = ragged or lane.ragged
    dtypes = {tensor.dtype for lane in lanes if (tensor := _tensor_of(lane)) is not None}
    if len(dtypes) > 1 and any(isinstance(lane, Each) and rank_of(lane) == 0 for lane in lanes):
        raise Uncovered  # a tensor without dimensions has less say in the result's type than a stack of them
    return ragged, rank


def rank_of(lane: Lane) -> int:
    """A request's own number of dimensions."""
    match lane:
        case Rows():
            return lane.tensor.ndim
        case Each():
            return lane.tensor.ndim - 1
        case Shared():
            return lane.value.ndim if isinstance(lane.value, Tensor) else 0
        case _:
            return 0


def _tensor_of(lane: Lane) -> Tensor | None:
    match lane:
        case Rows() | Each():
            return lane.tensor
        case Shared() if isinstance(lane.value, Tensor):
            return lane.value
        case _:
            return None


def aligned_to(lane: Lane, ragged: Ragged | None, rank: int) -> Any:
    """A lane's values so that they broadcast with [all rows, ...], or with [requests, ...] where there are no rows."""
    match lane:
        case Rows():
            return lane.tensor
        case Each():
            return spread(lane.tensor, ragged, rank)
        case Shared():
            value = lane.value
            if ragged is not None and isinstance(value, Tensor) and value.ndim == rank and value.shape[0] != 1:
                return _for_each(value, ragged)
            if isinstance(value, list | dict):
                raise Uncovered
            return value
        case Items():
            return lane.values
        case _:
            raise Uncovered


def _for_each(rows: Tensor, ragged: Ragged) -> Tensor:
    """The same rows for every request: [all rows, ...]."""
    num = len(ragged.counts)
    if not _has_rows_of(rows.shape[0], ragged) or rows.nbytes * num > MAX_REPEATED:
        raise Uncovered
    return rows.repeat(num, *[1] * (rows.ndim - 1))


def _has_rows_of(num: int, ragged: Ragged) -> bool:
    """Whether each request has so many rows."""
    return ragged.is_even and int(ragged.counts[0]) == num


def spread(tensor: Tensor, ragged: Ragged | None, rank: int) -> Tensor:
    """[requests, ...] beside values of `rank` dimensions a request: a row each for all of a request's rows."""
    own = tensor.ndim - 1
    if ragged is None:
        return tensor.reshape(tensor.shape[0], *[1] * (rank - own), *tensor.shape[1:])
    if own == rank and tensor.shape[1] != 1:
        if not _has_rows_of(tensor.shape[1], ragged):
            raise Uncovered
        return tensor.flatten(0, 1)
    if own == rank:
        tensor, own = tensor[:, 0], own - 1
    if not ragged.is_single:
        tensor = repeated(tensor, ragged)
    return tensor.reshape(tensor.shape[0], *[1] * (rank - 1 - own), *tensor.shape[1:])


def repeated(tensor: Tensor, ragged: Ragged) -> Tensor:
    """[requests, ...] -> [all rows, ...], unless that's very much."""
    if tensor.nbytes // max(1, tensor.shape[0]) * ragged.total > MAX_REPEATED:
        raise Uncovered
    return tensor.index_select(0, ragged.owner.to(tensor.device))


def dense(lane: Each | Rows) -> Tensor:
    """[requests, rows, ...] of what has as many rows for each request; what has none as it is."""
    if isinstance(lane, Each):
        return lane.tensor
    if not lane.ragged.is_even:
        raise Uncovered
    counts = lane.ragged.counts
    return lane.tensor.reshape(len(counts), int(counts[0]), *lane.tensor.shape[1:])


def wrapped(result: Any, ragged: Ragged | None) -> Lane:
    """A result as a lane; several tensors as several lanes under torch's names."""
    if isinstance(result, Tensor):
        return Each(result) if ragged is None else Rows(result, ragged)
    if isinstance(result, tuple) and all(isinstance(item, Tensor) for item in result):
        kind: Any = type(result)
        make = kind if kind is not tuple else tuple
        lanes = [Each(item) if ragged is None else Rows(item, ragged) for item in result]
        return Several(tuple(lanes), make)
    raise Uncovered
