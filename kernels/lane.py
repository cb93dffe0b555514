"""A lane: one entry in a site's list of edits. Its table says what, its slots say which rows, each with its own line.

A row has at most one line in a lane; a second edit of the same row is a later lane, also where both have the same table.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nnsight_vllm.kernels.table import Table


class Lane:
    """`slots` [max_rows] int32 at a fixed address; -1: the lane doesn't edit that row."""

    def __init__(self, table: Table, max_rows: int) -> None:
        self.table = table
        self.slots = torch.full((max_rows,), -1, dtype=torch.int32, device=table.device)
        self._end = 0

    @property
    def is_idle(self) -> bool:
        """Whether no row is edited in this step."""
        return self._end == 0

    def place(self, lines: Iterable[tuple[slice, int]]) -> None:
        """This step's rows, as (rows `start:stop`, slot), in any order; every other row is left alone. After `Table.fill`."""
        spans = sorted((rows.start, rows.stop, slot) for rows, slot in lines if rows.start < rows.stop)
        self._check(spans)
        end = spans[-1][1] if spans else 0
        host = torch.full((max(end, self._end),), -1, dtype=torch.int32)
        for start, stop, slot in spans:
            host[start:stop] = slot
        self.slots[: len(host)].copy_(host)
        self._end = end

    def _check(self, spans: list[tuple[int, int, int]]) -> None:
        passed = 0
        for start, stop, slot in spans:
            if start < passed or stop > len(self.slots):
                raise ValueError(
                    f"expected rows that don't overlap, below {len(self.slots)}; got {start}:{stop} behind :{passed}"
                )
            if not self.table.holds(slot):
                raise ValueError(f"expected a slot in use and filled; got {slot} for rows {start}:{stop}")
            passed = stop
