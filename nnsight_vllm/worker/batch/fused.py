"""Fused sites: what programs of any structure do at a site in one go, where they do nothing but edit rows, or collect them.

What each row is edited with is in the tables, and which line in an `EditPlan`. A plan stays as it is from step to step as
long as the same units come to do the same to the same rows. Whoever has no line that fits, or lacks a row that it collects,
isn't done here: its program runs operation by operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.kernels.dispatch import added, edit
from nnsight_vllm.kernels.table import DTYPES, Table
from nnsight_vllm.plan.fused import FusedSite
from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.batch.group import Group, Unit
from nnsight_vllm.worker.batch.group_place import Layout
from nnsight_vllm.worker.batch.requests import EngineRequest
from nnsight_vllm.worker.batch.step import Step
from nnsight_vllm.worker.lanes.lanes import Shared, as_ints, ranges
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors

LOOK = 32
"""So many values of each request are collected before their bytes are looked at; those of the whole step are at its end."""

Coming = tuple[Unit, FusedSite, Layout | slice]  # who comes, to do what, with which rows
Done = dict[int, BaseException | None]  # units by `id`, and what went wrong


@dataclass(frozen=True)
class SlotMap:
    """One edit of each row that has one: `slots` int32 [rows], -1 where it has none. `added`: [rows or 1, H], if that's all."""

    table: Table
    slots: Tensor
    added: Tensor | None

    def edit(self, rows: Tensor) -> None:
        if self.added is None:
            edit(rows, self.table.operation, self.slots, self.table.columns)
        else:
            rows.add_(self.added)


@dataclass(frozen=True)
class EditPlan:
    """What those who come do to the rows of `cover`. `done`: those of them whose edits all have lines. `dtype`: the site's."""

    coming: list[Coming]
    done: Done
    dtype: torch.dtype
    cover: slice
    maps: list[SlotMap]

    def run(self, site: Site, tensors: Tensors) -> None:
        for slots in self.maps:
            addend = site.addend(tensors, self.cover) if slots.table.operation == "add" else None
            if addend is not None and addend.dtype is self.dtype:
                slots.edit(addend)
            else:
                old = site.read(tensors, self.cover)
                new = old.clone() if site.compares else old
                slots.edit(new)
                site.write(tensors, self.cover, old, new)


class FusedSites:
    """`max_saved`: bytes a request beyond which nothing is collected here. `forget` when requests end: plans hold them."""

    def __init__(self, sites: Mapping[str, Site], max_saved: int) -> None:
        self._sites = sites
        self._max_saved = max_saved
        self._plans: dict[tuple[str, int], EditPlan] = {}
        # Sites whose rows have the same lines share one, as long as it's part of a plan.
        self._maps: WeakValueDictionary[tuple[int, bytes], SlotMap] = WeakValueDictionary()

    def forget(self) -> None:
        self._plans.clear()
        self._maps.clear()

    def run(self, units: list[Unit], tensors: Tensors, step: Step, at_logits: bool) -> Done:
        """Do all that these units, who wait at a tap, have for their sites; edits in each program's order."""
        done: Done = {}
        editing: dict[str, list[Coming]] = {}
        for unit in units:
            fused = unit.program.fused.get(unit.pc)
            if fused is None:
                continue
            place = unit.layout(step, at_logits)
            if fused.edits:
                editing.setdefault(fused.site, []).append((unit, fused, place))
            else:
                done |= self._collected(unit, fused, place, tensors)
        for name, coming in editing.items():
            self._edit(name, coming, tensors, done)
        return done

    # -- edits -------------------------------------------------------------------------------------------------------

    def _edit(self, name: str, coming: list[Coming], tensors: Tensors, done: Done) -> None:
        key = name, coming[0][0].number
        plan = self._plans.get(key)
        plan = plan if plan is not None and plan.coming == coming else None
        try:
            plan = plan or self._planned(key, coming)
            plan.run(self._sites[name], tensors)
            done |= plan.done
        except BaseException as error:  # each raises it again, where it's that request's own failure
            done |= dict.fromkeys([id(unit) for unit, _, _ in coming] if plan is None else plan.done, error)

    def _planned(self, key: tuple[str, int], coming: list[Coming]) -> EditPlan:
        info = self._sites[key[0]].info
        dtype = getattr(torch, info.dtype)
        fitting = [one for one in coming if _fits(*one[:2], info)]
        if not fitting:
            return EditPlan(coming, {}, dtype, slice(0, 0), [])
        rows = [_rows_of(place) for _, _, place in fitting]
        starts, counts = (np.concatenate(part) for part in zip(*rows, strict=True))
        first, last = int(starts.min()), int((starts + counts).max())
        owned = [_owned(start - first, count) for start, count in rows]
        maps = [self._map(table, slots) for table, slots in _slots(fitting, owned, last - first)]
        plan = EditPlan(coming, {id(unit): None for unit, _, _ in fitting}, dtype, slice(first, last), maps)
        if bool((counts == 1).all()):  # else they are a prompt's, and never come again
            self._plans[key] = plan
        return plan

    def _map(self, table: Table, slots: Tensor) -> SlotMap:
        key = id(table), slots.numpy().tobytes()
        known = self._maps.get(key)
        if known is None:
            whole = added(slots, table.columns) if table.operation == "add" else None
            known = self._maps[key] = SlotMap(table, slots.to(table.device), whole)
        return known

    # -- saves -------------------------------------------------------------------------------------------------------

    def _collected(self, unit: Unit, fused: FusedSite, place: Layout | slice, tensors: Tensors) -> Done:
        try:
            return {id(unit): None} if self._collect(unit, fused, place, tensors) else {}
        except BaseException as error:
            return {id(unit): error}

    def _collect(self, unit: Unit, fused: FusedSite, place: Layout | slice, tensors: Tensors) -> bool:
        """False: nothing was done."""
        site = self._sites[fused.site]
        if isinstance(unit, Group):
            assert isinstance(place, Layout)
            sheet = unit.sheet
            is_full = len(sheet.columns) % LOOK == LOOK - 1 and sheet.num_bytes > self._max_saved
            return not is_full and _collect_together(unit, fused, site, place, tensors)
        assert isinstance(place, slice)
        return not unit.is_over and _collect_alone(unit, fused, site, place, tensors)


def _fits(unit: Unit, fused: FusedSite, info: SiteInfo) -> bool:
    """Whether all edits have lines in tables, of the width of the site's rows."""
    if len(info.shape) != 2 or getattr(torch, info.dtype) not in DTYPES:
        return False
    width = info.shape[1]
    return width is not None and all(unit.lines(node).fit(width) for node in fused.edits)


def _rows_of(place: Layout | slice) -> tuple[Ints, Ints]:
    """Where each request's rows begin, and how many it has."""
    if isinstance(place, Layout):
        return place.starts, place.ragged.counts
    return as_ints([place.start]), as_ints([place.stop - place.start])


def _owned(starts: Ints, counts: Ints) -> tuple[Tensor, Tensor]:
    """All rows of some requests, and of each row whose it is."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return torch.from_numpy(ranges(starts, counts)), torch.from_numpy(owner)


def _slots(coming: list[Coming], owned: list[tuple[Tensor, Tensor]], total: int) -> list[tuple[Table, Tensor]]:
    """The slots of all rows, on the host: for the first edit of each, by table; then for the second, and so on."""
    found: list[tuple[Table, Tensor]] = []
    for number in range(max(len(fused.edits) for _, fused, _ in coming)):
        by_table: dict[int, tuple[Table, Tensor]] = {}
        wanted = [
            (table, rows, numbers[owner])
            for (unit, fused, _), (rows, owner) in zip(coming, owned, strict=True)
            if number < len(fused.edits)
            for table, numbers in unit.lines(fused.edits[number]).numbers
        ]
        for table, rows, mine in wanted:
            _, slots = by_table.setdefault(id(table), (table, torch.full((total,), -1, dtype=torch.int32)))
            slots[rows[mine >= 0]] = mine[mine >= 0]
        found += by_table.values()
    return found


def _collect_together(group: Group, fused: FusedSite, site: Site, layout: Layout, tensors: Tensors) -> bool:
    rows: dict[int | None, Tensor] = {}
    for save in fused.saves:
        at = _rows(group, save.row, layout)
        if at is None or save.name in group.sheet.by_request:
            return False
        rows[save.row] = at
    value = site.read(tensors, layout.cover)
    if value.numel() == 0 or value.is_complex():
        return False
    for save in fused.saves:
        at = rows[save.row]
        part = value if layout.is_cover(at) else value.index_select(0, at.to(value.device))
        part = part.reshape(group.size, -1, *value.shape[1:]) if save.row is None else part
        group.sheet.append(save.name, part)
    return True


def _rows(group: Group, row: int | None, layout: Layout) -> Tensor | None:
    """The rows that the requests take, among those of the layout's cover. None: they can't be taken as one."""
    if row is None:
        return layout.all_rows if layout.ragged.is_even else None
    number = group.parameter(row)
    return layout.rows_at(number.value) if isinstance(number, Shared) and type(number.value) is int else None


def _collect_alone(request: EngineRequest, fused: FusedSite, site: Site, rows: slice, tensors: Tensors) -> bool:
    numbers = [None if save.row is None else request.parameters[save.row] for save in fused.saves]
    count = rows.stop - rows.start
    if not all(number is None or (type(number) is int and -count <= number < count) for number in numbers):
        return False
    value = site.read(tensors, rows)
    for save, number in zip(fused.saves, numbers, strict=True):
        request.node = save.node
        request.outbox.append(save.name, value if number is None else value[number])
    return True
