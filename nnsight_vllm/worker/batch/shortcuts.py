"""The two most frequent things that a group does at a site, without a place and without running its operations one by one:
collecting rows for lists that go home, and adding a vector of each request's own.

Both give the bits that the operations give. What isn't of the simplest kind (rows that a request lacks, vectors that don't
fit) is left to them: then nothing was done.
"""

from __future__ import annotations

from torch import Tensor

from nnsight_vllm.plan.edits import Visit
from nnsight_vllm.plan.takes import Take
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.group_place import Layout
from nnsight_vllm.worker.lanes.lanes import Each, Shared
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors

LOOK = 32
"""So many values of each request are collected before their bytes are looked at; those of the whole step are at its end."""


def did_all(
    group: Group, site: Site, tensors: Tensors, layout: Layout, has_kernels: bool, max_saved: int
) -> Take | Visit | None:
    """Do all that the group does at the site where it stands. None: nothing was done.

    `has_kernels`: for edits. `max_saved`: bytes a request beyond which nothing is collected here.
    """
    take = group.program.takes.get(group.pc)
    if take is not None:
        sheet = group.sheet
        is_full = len(sheet.columns) % LOOK == LOOK - 1 and sheet.num_bytes > max_saved
        return take if not is_full and _collect(group, take, site, tensors, layout) else None
    visit = group.program.visits.get(group.pc)
    return visit if visit is not None and not has_kernels and _add(group, visit, site, tensors, layout) else None


def _collect(group: Group, take: Take, site: Site, tensors: Tensors, layout: Layout) -> bool:
    rows = {key: _rows(group, key, layout) for key, _ in take.columns}
    by_request = group.sheet.by_request
    if group.dead or any(at is None for at in rows.values()) or any(name in by_request for _, name in take.columns):
        return False
    value = site.read(tensors, layout.cover)
    if value.numel() == 0 or value.is_complex():
        return False
    for key, name in take.columns:
        at = rows[key]
        part = value if at is None or layout.is_cover(at) else value.index_select(0, at.to(value.device))
        group.sheet.append(name, part.reshape(len(group), -1, *value.shape[1:]) if key is None else part)
    return True


def _rows(group: Group, key: int | None, layout: Layout) -> Tensor | None:
    """The rows that the requests take, among those of the layout's cover. None: they can't be taken as one."""
    if key is None:
        return layout.all_rows if layout.ragged.is_even else None
    number = group.parameter(key)
    return layout.rows_at(number.value) if isinstance(number, Shared) and type(number.value) is int else None


def _add(group: Group, visit: Visit, site: Site, tensors: Tensors, layout: Layout) -> bool:
    """Where each request has one row and no others lie between: one addition for each of the visit's edits."""
    if group.dead or layout.index is not None or not layout.ragged.is_single:
        return False
    rows = site.addend(tensors, layout.cover)
    if rows is None or str(rows.dtype).removeprefix("torch.") != site.info.dtype:
        return False
    added: list[tuple[Tensor, int]] = []
    for node in visit.edits:
        edit = group.program.edits[node]
        vector, coefficient = edit.values if edit.operation == "add" else (None, None)
        lane = None if vector is None or coefficient is not None else group.parameter(vector)
        if not isinstance(lane, Each) or lane.tensor.shape != rows.shape:
            return False
        added.append((lane.tensor, edit.sign))
    for tensor, sign in added:
        rows.add_(tensor, alpha=sign)
    return True
