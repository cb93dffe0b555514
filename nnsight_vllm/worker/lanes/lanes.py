"""Values of a group of requests, kept together.

    Shared    one value for all: a plain value, or a tensor that nothing changes
    Each      a tensor a request, all of one shape, stacked: [requests, ...]
    Rows      a tensor a request with rows of its own, all rows one after the other: [all rows, ...]
    View      rows of a tensor that may still change: of a site, or of another value of the group
    Several   what an operation with several results gives
    Items     a value a request, whatever it is

`of(i)` is request i's own value: of tensors a view, so what changes it in place changes the group's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.wire.step_output import Ints

MAX_STACK = 1 << 27  # bytes: more isn't copied together


class Ragged:
    """How many rows each request has, and where its first is. `is_single`: one each; `is_even`: all as many."""

    def __init__(self, counts: Ints) -> None:
        self.counts = counts
        self.starts: Ints = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64)
        self.total = int(counts.sum())
        self.is_single = bool((counts == 1).all())
        self.is_even = bool((counts == counts[0]).all())
        self.picks: dict[int, Pick] = {}  # of the same row of each request

    @functools.cached_property
    def owner(self) -> Tensor:
        """The request of each row: [all rows]."""
        return torch.from_numpy(np.repeat(np.arange(len(self.counts)), self.counts))

    def fits(self, other: Ragged) -> bool:
        return self is other or bool(np.array_equal(self.counts, other.counts))

    def slice_of(self, i: int) -> slice:
        return slice(int(self.starts[i]), int(self.starts[i] + self.counts[i]))

    def select(self, keep: Sequence[int]) -> tuple[Ragged, Tensor]:
        """The rows of some requests: their counts, and the rows' numbers."""
        rows = ranges(self.starts[list(keep)], self.counts[list(keep)])
        return Ragged(self.counts[list(keep)]), torch.from_numpy(rows)


def as_ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def ranges(starts: Ints, counts: Ints) -> Ints:
    """All numbers of `start .. start + count` for each pair, one after the other."""
    before = np.cumsum(counts) - counts
    numbers: Ints = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return numbers


class Memory(Protocol):
    """A tensor that may still change, with the rows of each request: [all rows, ...]."""

    ragged: Ragged

    @property
    def tensor(self) -> Tensor: ...


@dataclass
class Held:
    """Memory of the group's own."""

    tensor: Tensor
    ragged: Ragged


@dataclass(frozen=True)
class Shared:
    value: Any

    def of(self, i: int) -> Any:
        return self.value

    def select(self, keep: Sequence[int]) -> Lane:
        return self


@dataclass(frozen=True)
class Each:
    tensor: Tensor

    def of(self, i: int) -> Any:
        return self.tensor[i]

    def select(self, keep: Sequence[int]) -> Lane:
        return Each(self.tensor[list(keep)])


@dataclass(frozen=True)
class Rows:
    tensor: Tensor
    ragged: Ragged

    def of(self, i: int) -> Any:
        return self.tensor[self.ragged.slice_of(i)]

    def select(self, keep: Sequence[int]) -> Lane:
        ragged, rows = self.ragged.select(keep)
        return Rows(self.tensor[rows.to(self.tensor.device)], ragged)


@dataclass(frozen=True)
class Pick:
    """Rows of each request, as numbers of the memory's rows. Without `ragged` one each, and the dimension is gone."""

    starts: Ints
    ragged: Ragged | None
    is_all: bool = False  # every row of the memory, in order

    @functools.cached_property
    def rows(self) -> Tensor:
        if self.ragged is None:
            return torch.from_numpy(self.starts)
        return torch.from_numpy(ranges(self.starts, self.ragged.counts))


@dataclass(frozen=True)
class View:
    """`memory[pick][:, *columns]`. Reading it gives what the memory holds at that time.

    `own`: instead of `columns`, one column of each request's own; of memory [all rows, columns].
    """

    memory: Memory
    pick: Pick | None = None
    columns: tuple[Any, ...] = ()
    own: Ints | None = None

    @property
    def ragged(self) -> Ragged | None:
        """The rows of the value; None: each request has one, without a dimension for it."""
        return self.memory.ragged if self.pick is None else self.pick.ragged

    @property
    def elements(self) -> tuple[Tensor, Tensor]:
        """With `own`: the value's elements, as numbers of rows and of columns."""
        assert self.own is not None
        total = self.memory.ragged.total
        rows = torch.arange(total) if self.pick is None else self.pick.rows
        columns = self.own if self.ragged is None else np.repeat(self.own, self.ragged.counts)
        device = self.memory.tensor.device
        return rows.to(device), torch.from_numpy(columns).to(device)

    def narrowed(self, tensor: Tensor) -> Tensor:
        """The columns of a tensor with the rows picked already; a view."""
        return tensor[(slice(None), *self.columns)] if self.columns else tensor

    def picked(self, tensor: Tensor) -> Tensor:
        """The rows picked: the tensor itself where that's all of them, else a copy."""
        if self.pick is None or self.pick.is_all:
            return tensor
        return tensor.index_select(0, self.pick.rows.to(tensor.device))

    def read(self) -> Each | Rows:
        """The value now; it may be the memory itself."""
        if self.own is not None:
            value = self.memory.tensor[self.elements]
        else:
            value = self.narrowed(self.picked(self.memory.tensor))
        if self.pick is None:
            return Rows(value, self.memory.ragged)
        return Each(value) if self.pick.ragged is None else Rows(value, self.pick.ragged)

    def of(self, i: int) -> Any:
        tensor = self.memory.tensor
        if self.own is not None:
            column = int(self.own[i])
            return View(self.memory, self.pick).of(i)[..., column]
        if self.pick is None:
            part = tensor[self.memory.ragged.slice_of(i)]
        elif self.pick.ragged is None:
            return tensor[int(self.pick.starts[i])][self.columns]
        else:
            start = int(self.pick.starts[i])
            part = tensor[start : start + int(self.pick.ragged.counts[i])]
        return self.narrowed(part)

    def select(self, keep: Sequence[int]) -> Lane:
        return self.read().select(keep)

    def onto(self, memory: Memory, keep: Sequence[int]) -> View:
        """The same view for some of the requests, of memory that holds theirs."""
        if self.pick is None:
            return View(memory, None, self.columns, self._own_of(keep))
        at = list(keep)
        starts = memory.ragged.starts + (self.pick.starts - self.memory.ragged.starts)[at]
        ragged = None if self.pick.ragged is None else Ragged(self.pick.ragged.counts[at])
        return View(memory, Pick(starts, ragged), self.columns, self._own_of(keep))

    def _own_of(self, keep: Sequence[int]) -> Ints | None:
        return None if self.own is None else self.own[list(keep)]


@dataclass(frozen=True)
class Several:
    lanes: tuple[Each | Rows, ...]
    make: Callable[[Any], Any]

    def of(self, i: int) -> Any:
        return self.make([lane.of(i) for lane in self.lanes])

    def select(self, keep: Sequence[int]) -> Lane:
        return Several(tuple(lane.select(keep) for lane in self.lanes), self.make)  # type: ignore[misc]


@dataclass(frozen=True)
class Items:
    values: list[Any]

    def of(self, i: int) -> Any:
        return self.values[i]

    def select(self, keep: Sequence[int]) -> Lane:
        return Items([self.values[i] for i in keep])


Lane = Shared | Each | Rows | View | Several | Items


def lane_of(values: list[Any]) -> Lane:
    """One value a request -> a lane. Nothing is copied."""
    first = values[0]
    plain = isinstance(first, bool | int | float | str | torch.dtype) or first is None or first is Ellipsis
    if plain and all(type(value) is type(first) and value == first for value in values):
        return Shared(first)
    if isinstance(first, Tensor) and all(value is first for value in values):  # so it's a constant or another request's
        return Shared(first)
    return Items(values)


def constant_of(values: list[Any]) -> Lane:
    """The same for what nothing changes, tensors included; those are stacked where they differ and fit."""
    first = values[0]
    if all(value is first for value in values):
        return Shared(first)
    if isinstance(first, Tensor):
        return stacked(values) or Items(values)
    return lane_of(values)


def stacked(values: list[Any]) -> Each | None:
    """Tensors of one shape and type as one; a copy."""
    first = values[0]
    if not isinstance(first, Tensor) or first.nbytes * len(values) > MAX_STACK:
        return None
    for value in values:
        if not isinstance(value, Tensor) or value.shape != first.shape or value.dtype != first.dtype:
            return None
    return Each(torch.stack(values))


def resolved(lane: Lane) -> Lane:
    """A view as the value it has now, tensors by item stacked: for operations that only read."""
    if isinstance(lane, View):
        return lane.read()
    if isinstance(lane, Items):
        return stacked(lane.values) or lane
    return lane


def joined(lanes: list[Lane], sizes: list[int]) -> Lane:
    """The lanes of several groups as one group's, in the same order. Memory isn't shared with them any more."""
    first = lanes[0]
    if isinstance(first, Shared) and all(isinstance(lane, Shared) and lane.value is first.value for lane in lanes):
        return first
    return lane_of([lane.of(i) for lane, size in zip(lanes, sizes, strict=True) for i in range(size)])
