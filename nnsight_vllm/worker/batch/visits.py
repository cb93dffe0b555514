"""Sites where several programs only edit whole rows: one visit of the kernels for all of them.

Programs of different structure meet here: what each row is edited with is in the tables, and which line in `Lane`s, one for
each edit that a row gets there and each table. Lanes stay as they are from step to step as long as the same requests come
with the same rows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.kernels.dispatch import choose, edit
from nnsight_vllm.kernels.table import DTYPES, Table
from nnsight_vllm.plan.edits import Visit
from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.requests import EngineRequest, Step
from nnsight_vllm.worker.lanes.lanes import as_ints, ranges
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors

Unit = EngineRequest | Group


@dataclass
class _Lane:
    """One edit of each row that has one: `slots` int32 [rows], -1 where it has none."""

    table: Table
    slots: Tensor


@dataclass
class _Laid:
    """The lanes of a visit for these units at these rows: `starts` and `counts`, a number a request. `cover`: all of them."""

    units: list[Unit]
    starts: Ints
    counts: Ints
    cover: slice
    lanes: list[_Lane]


class Visits:
    """What some units do at a site together, where at least `least` come. `forget` when requests end: lanes hold them."""

    def __init__(self, device: torch.device) -> None:
        # On a CPU one unit by itself is faster with torch's own operations.
        self.least = 2 if choose(device) == "reference" else 1
        self._laid: dict[tuple[str, int], _Laid] = {}

    def forget(self) -> None:
        self._laid.clear()

    def edit(self, site: Site, tensors: Tensors, units: list[Unit], step: Step, at_logits: bool) -> None:
        """All edits that these units, each with a visit due, have for the site; in each program's order."""
        laid = self._lay(site.info.name, units, step, at_logits)
        for lane in laid.lanes:
            addend = site.addend(tensors, laid.cover) if lane.table.operation == "add" else None
            if addend is not None and str(addend.dtype).removeprefix("torch.") == site.info.dtype:
                _edit(addend, lane)
            else:
                old = site.read(tensors, laid.cover)
                new = old.clone() if site.compares else old
                _edit(new, lane)
                site.write(tensors, laid.cover, old, new)

    def _lay(self, name: str, units: list[Unit], step: Step, at_logits: bool) -> _Laid:
        rows = [_rows(unit, step, at_logits) for unit in units]
        starts, counts = (np.concatenate(part) for part in zip(*rows, strict=True))
        key = name, units[0].number
        known = self._laid.get(key)
        if known is None or not _is_same(known, units, starts, counts):
            first, last = int(starts.min()), int((starts + counts).max())
            lanes = _lanes(units, [start - first for start, _ in rows], [count for _, count in rows], last - first)
            known = self._laid[key] = _Laid(units, starts, counts, slice(first, last), lanes)
        return known


def due(unit: Unit, site: Site) -> Visit | None:
    """What a unit that waits for this site does there, if that's nothing but edits whose lines are in tables."""
    visit = unit.program.visits.get(unit.pc)
    shape = site.info.shape
    if visit is None or len(shape) != 2 or getattr(torch, site.info.dtype) not in DTYPES:
        return None
    width = shape[1]
    return visit if width is not None and all(unit.lines(node).fit(width) for node in visit.edits) else None


def _rows(unit: Unit, step: Step, at_logits: bool) -> tuple[Ints, Ints]:
    """Where each request's rows begin, and how many it has."""
    if isinstance(unit, Group):
        layout = unit.layout(step, at_logits)
        return layout.starts, layout.ragged.counts
    rows = step.rows(step.index[unit.id], at_logits)
    return as_ints([rows.start]), as_ints([rows.stop - rows.start])


def _is_same(known: _Laid, units: list[Unit], starts: Ints, counts: Ints) -> bool:
    is_same = len(known.units) == len(units) and all(map(operator.is_, known.units, units))
    return is_same and np.array_equal(known.starts, starts) and np.array_equal(known.counts, counts)


def _lanes(units: list[Unit], starts: list[Ints], counts: list[Ints], total: int) -> list[_Lane]:
    visits = [unit.program.visits[unit.pc] for unit in units]
    lanes = []
    for number in range(max(len(visit.edits) for visit in visits)):
        by_table: dict[int, tuple[Table, Tensor]] = {}
        for unit, visit, start, count in zip(units, visits, starts, counts, strict=True):
            if number >= len(visit.edits):
                continue
            rows = torch.from_numpy(ranges(start, count))
            owner = torch.from_numpy(np.repeat(np.arange(len(count)), count))
            for table, numbers in unit.lines(visit.edits[number]).numbers:
                if id(table) not in by_table:
                    by_table[id(table)] = table, torch.full((total,), -1, dtype=torch.int32)
                mine = numbers[owner]
                by_table[id(table)][1][rows[mine >= 0]] = mine[mine >= 0]
        lanes += [_Lane(table, slots.to(table.device)) for table, slots in by_table.values()]
    return lanes


def _edit(rows: Tensor, lane: _Lane) -> None:
    edit(rows, lane.table.operation, lane.slots, lane.table.columns)
