"""A site, as the program of a group of requests sees it: the rows of all of them at once.

The rows are read when somebody looks, so an edit that only adds never reads them. They needn't lie side by side: the
engine's rows between them are read too and written back as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.batch.places import RequestPlace
from nnsight_vllm.worker.lanes.lanes import Ragged, ranges
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors

Blame = Callable[[int, Exception], None]


class Work:
    """The site's value from when it was read or assigned: a working copy [all rows, ...], made when it's asked for."""

    def __init__(self, ragged: Ragged, read: Callable[[], Tensor], tensor: Tensor | None = None) -> None:
        self.ragged = ragged
        self._read = read
        self._tensor = tensor

    @property
    def is_read(self) -> bool:
        return self._tensor is not None

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._read()
        return self._tensor

    def refresh(self) -> None:
        """The engine's rows changed: follow them."""
        if self._tensor is not None:
            self._tensor.copy_(self._read())


class Layout:
    """Where the rows of a group's requests are. `cover`: the rows from the first to the last of them.

    `index`: theirs among those, None where there are no others.
    """

    def __init__(self, starts: Ints, ragged: Ragged) -> None:
        self.starts = starts
        self.ragged = ragged
        first, last = int(starts.min()), int((starts + ragged.counts).max())
        self.cover = slice(first, last)
        in_order = bool((starts[1:] == starts[:-1] + ragged.counts[:-1]).all())
        self.index = None if in_order else torch.from_numpy(ranges(starts - first, ragged.counts))
        self._rows_at: dict[int, Tensor | None] = {}

    @functools.cached_property
    def all_rows(self) -> Tensor:
        """The rows of all requests, among those of `cover`."""
        return torch.arange(self.ragged.total) if self.index is None else self.index

    def rows_at(self, number: int) -> Tensor | None:
        """Row `number` of each request, among those of `cover`. None: some request has no such row."""
        if number not in self._rows_at:
            counts = self.ragged.counts
            own = np.full(len(counts), number) if number >= 0 else counts + number
            is_there = bool(((own >= 0) & (own < counts)).all())
            rows = self.starts - self.cover.start + own
            is_all = is_there and self.index is None and self.ragged.is_single
            self._rows_at[number] = self.all_rows if is_all else torch.from_numpy(rows) if is_there else None
        return self._rows_at[number]

    def is_cover(self, rows: Tensor) -> bool:
        """Whether these are all rows of `cover`, in order."""
        return self.index is None and rows is self.all_rows


class GroupPlace:
    """A group at one site in one step. `blame` is told of a request whose write fails."""

    def __init__(self, name: str, site: Site, tensors: Tensors, layout: Layout, blame: Blame) -> None:
        self.name = name
        self._site = site
        self._tensors = tensors
        self._layout = layout
        self._blame = blame
        self._cover = layout.cover
        self._index = None if layout.index is None else layout.index.to(tensors[0].device)
        self.ragged = layout.ragged
        self.current = Work(self.ragged, self._read)

    def select(self, keep: list[int], blame: Blame) -> GroupPlace:
        """Some of the requests, at the same site."""
        at = list(keep)
        layout = Layout(self._layout.starts[at], Ragged(self.ragged.counts[at]))
        return GroupPlace(self.name, self._site, self._tensors, layout, blame)

    def share(self, i: int) -> RequestPlace:
        """Request i's part, on the same memory, for what it does by itself."""
        start, count = int(self._layout.starts[i]), int(self.ragged.counts[i])
        work = self.current.tensor[self.ragged.slice_of(i)]
        return RequestPlace(self.name, self._site, self._tensors, slice(start, start + count), work)

    def aliases(self, tensor: Tensor) -> bool:
        """Whether the tensor shares the working copy's memory."""
        if not self.current.is_read or tensor.numel() == 0:
            return False
        return tensor.untyped_storage().data_ptr() == self.current.tensor.untyped_storage().data_ptr()

    def is_integer(self) -> bool:
        return self._site.info.dtype in {"int64", "int32"}

    def assign(self, new: Tensor) -> None:
        """The whole site by value, [all rows, ...], already fitted. What was read before keeps the old value."""
        old = self.current.tensor
        self.current = Work(self.ragged, self._read, new)
        self._write(old, new)

    def change(self, operation: Callable[[], None]) -> None:
        """Run an operation that changes the working copy in place, and write the change back. If it raises, nothing changed."""
        work = self.current.tensor
        old = work.clone() if self._site.compares else work
        try:
            operation()
        except Exception:
            work.copy_(old if self._site.compares else self._read())
            raise
        self._write(old, work)

    def addend(self) -> Tensor | None:
        """Where an in-place add may go so that nothing else is rounded: all rows, or a copy to give to `put_addend`."""
        part = self._site.addend(self._tensors, self._cover)
        if part is None or str(part.dtype).removeprefix("torch.") != self._site.info.dtype:
            return None
        return part if self._index is None else part.index_select(0, self._index)

    def put_addend(self, value: Tensor) -> None:
        if self._index is not None:
            part = self._site.addend(self._tensors, self._cover)
            assert part is not None
            part.index_copy_(0, self._index, value)
        self.current.refresh()

    def _read(self) -> Tensor:
        full = self._site.read(self._tensors, self._cover)
        return full if self._index is None else full.index_select(0, self._index)

    def _write(self, old: Tensor, new: Tensor) -> None:
        try:
            if self._index is None:
                self._site.write(self._tensors, self._cover, old, new)
            else:
                full_old = self._site.read(self._tensors, self._cover)
                self._site.write(self._tensors, self._cover, full_old, full_old.index_copy(0, self._index, new))
        except Exception:  # some request's value: find out whose
            self._write_each(old, new)

    def _write_each(self, old: Tensor, new: Tensor) -> None:
        for i, (start, count) in enumerate(zip(self._layout.starts.tolist(), self.ragged.counts.tolist(), strict=True)):
            rows = self.ragged.slice_of(i)
            try:
                self._site.write(self._tensors, slice(start, start + count), old[rows], new[rows])
            except Exception as error:
                self._blame(i, error)
