"""Functions along a dimension, for all requests at once: sums may add up in another order than those of a request alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.plan.rows import Rule
from nnsight_vllm.worker.lanes.alignment import Function, Uncovered, dense, rank_of, wrapped
from nnsight_vllm.worker.lanes.lanes import Each, Lane, Ragged, Rows, Shared

_REDUCING = frozenset(
    [
        "sum",
        "mean",
        "amax",
        "amin",
        "argmax",
        "argmin",
        "prod",
        "all",
        "any",
        "max",
        "min",
        "median",
        "std",
        "var",
        "nansum",
        "norm",
    ]
)
_REDUCING |= {"vector_norm", "count_nonzero"}


def along(rule: Rule, name: str, operation: Function, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
    """Along a dimension that isn't the rows'; over all of a request where it has no rows, or as many as the others."""
    target = args[0] if args else None
    if not isinstance(target, Each | Rows):
        raise Uncovered
    rest = [_plain(lane) for lane in args[1:]]
    named = {key: _plain(lane) for key, lane in kwargs.items()}
    bare = name.partition(".")[2]
    rank = rank_of(target)
    is_named = "dim" in named
    dim = rule.default
    if is_named or len(args) > rule.dim:
        dim = named["dim"] if is_named else rest[rule.dim - 1]
    if dim is None and bare in _REDUCING and not is_named and not named.get("keepdim"):
        return _whole(name, operation, target, rest, named)
    if type(dim) is not int or not -rank <= dim < rank or rank == 0:
        raise Uncovered
    back = dim if dim < 0 else dim - rank
    if isinstance(target, Rows) and back == -rank:
        return _over_rows(bare, operation, target, rest, named)
    if is_named or len(args) <= rule.dim:
        named["dim"] = back
    else:
        rest[rule.dim - 1] = back
    return wrapped(operation(target.tensor, *rest, **named), target.ragged if isinstance(target, Rows) else None)


def _plain(lane: Lane) -> Any:
    if not isinstance(lane, Shared) or isinstance(lane.value, Tensor | list | dict):
        raise Uncovered
    return lane.value


def _whole(name: str, operation: Function, target: Each | Rows, rest: list[Any], named: dict[str, Any]) -> Lane:
    """A reduction of all that a request has to one number."""
    tensor = dense(target).flatten(1)
    if rest or named or name.partition(".")[2] in {"norm", "vector_norm", "prod"} or tensor.shape[1] == 0:
        raise Uncovered
    result = operation(tensor, dim=1)
    return Each(result if isinstance(result, Tensor) else result[0])  # `max(dim)` gives positions too


def _over_rows(bare: str, operation: Function, target: Rows, rest: list[Any], named: dict[str, Any]) -> Lane:
    """A reduction over each request's rows: a dimension of its own where all have as many, else segments."""
    if target.ragged.is_even:
        rows = dense(target)
        moved = {**named, "dim": 1} if "dim" in named else named
        given = rest if "dim" in named else [1, *rest[1:]]
        if bare not in _REDUCING and bare not in {"softmax", "cumsum", "cumprod", "log_softmax"}:
            raise Uncovered
        result = wrapped(operation(rows, *given, **moved), None)
        return result if bare in _REDUCING and not named.get("keepdim") else _as_rows(result)
    segment = {"sum": "sum", "mean": "mean", "amax": "max", "amin": "min"}.get(bare)
    if segment is None or not target.tensor.is_floating_point() or set(named) - {"dim"} or len(rest) > 1:
        raise Uncovered
    lengths = torch.from_numpy(target.ragged.counts).to(target.tensor.device)
    wide = torch.segment_reduce(target.tensor.float(), segment, lengths=lengths)
    return Each(wide.to(target.tensor.dtype))


def _as_rows(lane: Lane) -> Lane:
    """[requests, rows, ...] as rows."""
    match lane:
        case Each():
            num, count = lane.tensor.shape[:2]
            counts = torch.full((num,), count).numpy()
            return Rows(lane.tensor.flatten(0, 1), Ragged(counts))
        case _:
            raise Uncovered
