"""Functions on the lanes of a group, by the kinds of `plan/rows.py`.

Each function gives the result for all requests at once, or raises `Uncovered` with nothing done: then every request
runs the operation by itself. Results are bit for bit those of the requests one by one where the operation works element
by element; sums and products may add up in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnsight_vllm.plan.rows import Kind, Rule
from nnsight_vllm.worker.lanes.alignment import Function, Uncovered, dense, rank_of, repeated, wrapped
from nnsight_vllm.worker.lanes.lanes import Each, Lane, Rows, Shared, resolved
from nnsight_vllm.worker.lanes.pointwise import pointwise
from nnsight_vllm.worker.lanes.reductions import along


def compute(rule: Rule, name: str, operation: Function, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
    """A new value. `args` and `kwargs` are lanes; nothing is changed in place."""
    args = [resolved(arg) for arg in args]
    kwargs = {key: resolved(value) for key, value in kwargs.items()}
    if not any(isinstance(lane, Each | Rows) for lane in [*args, *kwargs.values()]):
        raise Uncovered
    match rule.kind:
        case Kind.POINTWISE:
            return pointwise(name, operation, args, kwargs)
        case Kind.LAST:
            return along(rule, name, operation, args, kwargs)
        case Kind.MATMUL:
            return matmul(operation, args, kwargs)
        case _:
            raise Uncovered


def matmul(operation: Function, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
    """Rows or vectors times one matrix or vector for all, or times each request's own."""
    if len(args) != 2 or kwargs:
        raise Uncovered
    left, right = args
    if not isinstance(left, Each | Rows) or rank_of(left) not in (1, 2):
        raise Uncovered
    ragged = left.ragged if isinstance(left, Rows) else None
    if isinstance(left, Rows) and left.tensor.ndim != 2:
        raise Uncovered
    if isinstance(right, Shared) and isinstance(right.value, Tensor) and right.value.ndim in (1, 2):
        return wrapped(operation(left.tensor, right.value), ragged)
    if not isinstance(right, Each) or left.tensor.dtype != right.tensor.dtype:
        raise Uncovered
    own, rank = right.tensor, rank_of(right)
    if isinstance(left, Rows) and not left.ragged.is_single:
        if rank == 1:
            own = repeated(own, left.ragged)
        elif left.ragged.is_even:
            return Rows(torch.bmm(dense(left), own).flatten(0, 1), left.ragged)
        else:
            raise Uncovered
    if rank == 1 and left.tensor.ndim == 2:
        wide = torch.float64 if own.dtype == torch.float64 else torch.float32  # products of bf16 are exact in float32
        return wrapped((left.tensor.to(wide) * own.to(wide)).sum(-1).to(own.dtype), ragged)
    if rank == 2 and left.tensor.ndim == 2:
        return wrapped(torch.bmm(left.tensor.unsqueeze(1), own)[:, 0], ragged)
    raise Uncovered
