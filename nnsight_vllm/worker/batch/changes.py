"""How a group's tensors are changed in place: all of a lane, or picked rows and columns of the memory it looks at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.nodes import Op
from nnsight_vllm.kernels.table import DTYPES
from nnsight_vllm.plan.edits import PREFIX
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.tables import TableLines
from nnsight_vllm.worker.lanes import alignment, pointwise
from nnsight_vllm.worker.lanes.alignment import Uncovered
from nnsight_vllm.worker.lanes.lanes import Each, Lane, Rows, Shared, View, resolved


def in_place(name: str, operation: Callable[..., Any], target: Lane, rest: list[Lane], kwargs: dict[str, Lane]) -> None:
    """Change a lane's tensors in place; rows that were picked are changed as a copy and put back."""
    _on_part(target, lambda part: pointwise.change(name, operation, part, rest, kwargs))


def _on_part(target: Lane, change: Callable[[Lane], None]) -> None:
    """Have `change` change a lane's tensors in place; what isn't a view of its memory is changed as a copy and put back."""
    if not isinstance(target, View):
        change(target)
        return
    memory = target.memory.tensor
    if target.own is not None:
        at = target.elements
        part = target.read()
        change(part)
        memory[at] = part.tensor
        return
    if target.pick is None:
        change(target.read())
        return
    rows = target.picked(memory)
    narrowed = target.narrowed(rows)
    change(Each(narrowed) if target.pick.ragged is None else Rows(narrowed, target.pick.ragged))
    if not target.pick.is_all:
        memory.index_copy_(0, target.pick.rows.to(memory.device), rows)


def by_kernel(group: Group, node: Op, target: Lane) -> bool:
    """Do an edit of `nnsight_vllm.edits` by the lines that the requests have in tables. False: it isn't one, or they don't fit."""
    if not node.name.startswith(PREFIX) or node.id not in group.program.edits:
        return False
    tensor = target.memory.tensor if isinstance(target, View) else getattr(target, "tensor", None)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.dtype not in DTYPES:
        return False
    if isinstance(target, View) and (target.columns or target.own is not None):
        return False
    lines = group.lines(node.id)
    if not lines.fit(tensor.shape[1]):
        return False
    _on_part(target, partial(_edit_part, lines))
    return True


def _edit_part(lines: TableLines, part: Lane) -> None:
    assert isinstance(part, Rows | Each)
    lines.edit(part.tensor, part.ragged.owner if isinstance(part, Rows) else torch.arange(len(part.tensor)))


def fitted(site: str, lane: Lane, rows: Each | Rows, work: Tensor) -> Tensor:
    """A value for a whole site, broadcast to [all rows, ...]."""
    if isinstance(lane, Shared) and not isinstance(lane.value, Tensor | int | float):
        raise InterventionError(f"{site} takes a tensor or a number")
    values = alignment.aligned([rows, lane])
    value = values[1]
    return value.expand(work.shape) if isinstance(value, Tensor) else torch.as_tensor(value).expand(work.shape)


def dtype_of(lane: View | Rows | Each) -> torch.dtype:
    return lane.memory.tensor.dtype if isinstance(lane, View) else lane.tensor.dtype


def spread_value(lane: Lane, ragged: Any, rank: int, dtype: torch.dtype) -> Any:
    lane = resolved(lane)
    match lane:
        case Each():
            return alignment.spread(lane.tensor, ragged, rank).to(dtype)
        case Rows() if lane.tensor.ndim == rank and lane.ragged.fits(ragged):
            return lane.tensor.to(dtype)
        case Shared(value=bool() | int() | float()):
            return lane.value
        case Shared(value=Tensor() as value) if value.ndim < rank:
            return value.to(dtype)
        case _:
            raise Uncovered
