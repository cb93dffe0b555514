"""Operations on the lanes of a group, by the kinds of `plan/rows.py`.

Each function gives the result for all requests at once, or raises `Uncovered` with nothing done: then every request
runs the operation by itself. Results are bit for bit those of the requests one by one where the operation works element
by element; sums and products may add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.plan.rows import Kind, Rule
from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.lanes.lanes import (
    Each,
    Held,
    Items,
    Lane,
    Pick,
    Ragged,
    Rows,
    Several,
    Shared,
    View,
    as_ints,
    resolved,
)

Operation = Callable[..., Any]
_ARITHMETIC = {
    f"{space}.{name}"
    for space, names in {
        "py": "add sub mul truediv iadd isub imul itruediv",
        "tensor": "add sub mul div add_ sub_ mul_ div_",
        "torch": "add sub mul div",
    }.items()
    for name in names.split()
}
_SCALING = {name for name in _ARITHMETIC if "mul" in name or "div" in name}
_COMPARING = {f"{space}.{name}" for space in ("py", "tensor", "torch") for name in ["eq", "ne", "lt", "le", "gt", "ge"]}
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
MAX_REPEATED = 1 << 30  # bytes: what each request has once isn't copied to its rows beyond that
_HALF = (torch.bfloat16, torch.float16)


class Uncovered(Exception):
    """The requests of a group run this operation one by one."""


def compute(rule: Rule, name: str, operation: Operation, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
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


# -- element by element --------------------------------------------------------------------------------------------------


def pointwise(name: str, operation: Operation, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
    """Element by element with broadcasting, after every value is aligned with the rows of all requests."""
    lanes = [*args, *kwargs.values()]
    ragged, rank = frame(lanes)
    values = [_aligned(lane, ragged, rank) for lane in args]
    named = {key: _aligned(lane, ragged, rank) for key, lane in kwargs.items()}
    if not any(isinstance(lane, Items) for lane in lanes):
        return _wrapped(operation(*values, **named), ragged)
    return _wrapped(_with_numbers(name, operation, args, values, rank, kwargs), ragged)


def aligned(lanes: list[Lane]) -> list[Any]:
    """Values that broadcast with one another, [all rows, ...] or [requests, ...]."""
    ragged, rank = frame(lanes)
    return [_aligned(lane, ragged, rank) for lane in lanes]


def numbers_of(lane: Lane, dtype: torch.dtype) -> Lane:
    """A number a request as a tensor a request, rounded as torch rounds a number that is assigned."""
    if not isinstance(lane, Items) or not all(type(value) in (bool, int, float) for value in lane.values):
        return lane
    kind = torch.float64 if dtype.is_floating_point else torch.int64
    if kind is torch.int64 and any(type(value) is float for value in lane.values):
        raise Uncovered
    return Each(torch.tensor(lane.values, dtype=kind).to(dtype))


def change(name: str, operation: Operation, target: Lane, rest: list[Lane], kwargs: dict[str, Lane]) -> None:
    """Change `target`'s tensor in place, element by element."""
    rest = [resolved(lane) for lane in rest]
    named = {key: resolved(lane) for key, lane in kwargs.items()}
    if not isinstance(target, Rows | Each) or any(rank_of(lane) > rank_of(target) for lane in rest):
        raise Uncovered
    if isinstance(target, Each) and any(isinstance(lane, Rows) for lane in rest):
        raise Uncovered
    result = pointwise(name, operation, [target, *rest], named)
    assert isinstance(result, Rows | Each) and result.tensor.data_ptr() == target.tensor.data_ptr()


def frame(lanes: list[Lane]) -> tuple[Ragged | None, int]:
    """The rows that the result has (None: the requests have no rows), and a request's number of dimensions in it."""
    ragged: Ragged | None = None
    rank = max(rank_of(lane) for lane in lanes)
    for lane in lanes:
        if isinstance(lane, Rows):
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


def _aligned(lane: Lane, ragged: Ragged | None, rank: int) -> Any:
    """A lane's values so that they broadcast with [all rows, ...], or with [requests, ...] where there are no rows."""
    match lane:
        case Rows():
            return lane.tensor
        case Each():
            return spread(lane.tensor, ragged, rank)
        case Shared():
            value = lane.value
            if ragged is not None and isinstance(value, Tensor) and value.ndim == rank and value.shape[0] != 1:
                if not _has_rows_of(value.shape[0], ragged):
                    raise Uncovered
                if value.nbytes * len(ragged.counts) > MAX_REPEATED:
                    raise Uncovered
                return value.repeat(len(ragged.counts), *[1] * (rank - 1))  # the same rows for every request
            if isinstance(value, list | dict):
                raise Uncovered
            return value
        case Items():
            return lane.values
        case _:
            raise Uncovered


def _has_rows_of(num: int, ragged: Ragged) -> bool:
    """Whether each request has so many rows."""
    return ragged.is_even and int(ragged.counts[0]) == num


def spread(tensor: Tensor, ragged: Ragged | None, rank: int) -> Tensor:
    """[requests, ...] beside values of `rank` dimensions a request: a row each for all of a request's rows."""
    own = tensor.ndim - 1
    if ragged is None:
        return tensor.reshape(tensor.shape[0], *[1] * (rank - own), *tensor.shape[1:])
    if own == rank:
        if tensor.shape[1] != 1:
            if not _has_rows_of(tensor.shape[1], ragged):
                raise Uncovered
            return tensor.flatten(0, 1)
        tensor, own = tensor[:, 0], own - 1
    if not ragged.is_single:
        tensor = _repeated(tensor, ragged)
    return tensor.reshape(tensor.shape[0], *[1] * (rank - 1 - own), *tensor.shape[1:])


def _repeated(tensor: Tensor, ragged: Ragged) -> Tensor:
    """[requests, ...] -> [all rows, ...], unless that's very much."""
    if tensor.nbytes // max(1, tensor.shape[0]) * ragged.total > MAX_REPEATED:
        raise Uncovered
    return tensor.index_select(0, ragged.owner.to(tensor.device))


def _with_numbers(
    name: str, operation: Operation, lanes: list[Lane], values: list[Any], rank: int, kwargs: dict[str, Lane]
) -> Tensor:
    """`tensor op number` where the number is each request's own.

    With bfloat16 and float16, torch multiplies and divides by the exact number and rounds once; it adds, subtracts and
    compares with the number rounded first (measured on a CPU). A number divided by a tensor is neither, in any type.
    """
    if len(lanes) != 2 or kwargs or name not in _ARITHMETIC | _COMPARING:
        raise Uncovered
    (at,) = [i for i, lane in enumerate(lanes) if isinstance(lane, Items)] if _num_items(lanes) == 1 else [-1]
    if at < 0:
        raise Uncovered
    other = lanes[1 - at]
    tensor = values[1 - at]
    numbers = values[at]
    if not isinstance(other, Rows | Each) or not tensor.is_floating_point():
        raise Uncovered
    if not all(type(number) in (int, float) for number in numbers):
        raise Uncovered
    is_half = tensor.dtype in _HALF and name in _SCALING
    if at == 0 and "div" in name:
        raise Uncovered
    wide = torch.float32 if is_half else tensor.dtype
    column = torch.tensor(numbers, dtype=torch.float64, device=tensor.device).to(wide)
    ragged = other.ragged if isinstance(other, Rows) else None
    column = spread(column, ragged, rank)
    pair = (column, tensor.to(wide)) if at == 0 else (tensor.to(wide), column)
    if name.endswith("_") or name in {"py.iadd", "py.isub", "py.imul", "py.itruediv"}:
        changed: Tensor = tensor.copy_(_OUT_OF_PLACE[name](*pair)) if is_half else operation(*pair)
        return changed
    result: Tensor = operation(*pair)
    return result.to(tensor.dtype) if name in _ARITHMETIC else result


def _num_items(lanes: list[Lane]) -> int:
    return sum(isinstance(lane, Items) for lane in lanes)


_OUT_OF_PLACE: dict[str, Operation] = {
    **dict.fromkeys(("py.iadd", "tensor.add_"), torch.add),
    **dict.fromkeys(("py.isub", "tensor.sub_"), torch.sub),
    **dict.fromkeys(("py.imul", "tensor.mul_"), torch.mul),
    **dict.fromkeys(("py.itruediv", "tensor.div_"), torch.div),
}


# -- along dimensions ----------------------------------------------------------------------------------------------------


def along(rule: Rule, name: str, operation: Operation, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
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
    return _wrapped(operation(target.tensor, *rest, **named), target.ragged if isinstance(target, Rows) else None)


def _plain(lane: Lane) -> Any:
    if not isinstance(lane, Shared) or isinstance(lane.value, Tensor | list | dict):
        raise Uncovered
    return lane.value


def _whole(name: str, operation: Operation, target: Each | Rows, rest: list[Any], named: dict[str, Any]) -> Lane:
    """A reduction of all that a request has to one number."""
    tensor = _dense(target).flatten(1)
    if rest or named or name.partition(".")[2] in {"norm", "vector_norm", "prod"} or tensor.shape[1] == 0:
        raise Uncovered
    result = operation(tensor, dim=1)
    return Each(result if isinstance(result, Tensor) else result[0])  # `max(dim)` gives positions too


def _over_rows(bare: str, operation: Operation, target: Rows, rest: list[Any], named: dict[str, Any]) -> Lane:
    """A reduction over each request's rows: a dimension of its own where all have as many, else segments."""
    if target.ragged.is_even:
        dense = _dense(target)
        moved = {**named, "dim": 1} if "dim" in named else named
        given = rest if "dim" in named else [1, *rest[1:]]
        if bare not in _REDUCING and bare not in {"softmax", "cumsum", "cumprod", "log_softmax"}:
            raise Uncovered
        result = _wrapped(operation(dense, *given, **moved), None)
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


def _dense(lane: Each | Rows) -> Tensor:
    """[requests, rows, ...] of what has as many rows for each request; what has none as it is."""
    if isinstance(lane, Each):
        return lane.tensor
    if not lane.ragged.is_even:
        raise Uncovered
    counts = lane.ragged.counts
    return lane.tensor.reshape(len(counts), int(counts[0]), *lane.tensor.shape[1:])


# -- products ------------------------------------------------------------------------------------------------------------


def matmul(operation: Operation, args: list[Lane], kwargs: dict[str, Lane]) -> Lane:
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
        return _wrapped(operation(left.tensor, right.value), ragged)
    if not isinstance(right, Each) or left.tensor.dtype != right.tensor.dtype:
        raise Uncovered
    own, rank = right.tensor, rank_of(right)
    if isinstance(left, Rows) and not left.ragged.is_single:
        if rank == 1:
            own = _repeated(own, left.ragged)
        elif left.ragged.is_even:
            return Rows(torch.bmm(_dense(left), own).flatten(0, 1), left.ragged)
        else:
            raise Uncovered
    if rank == 1 and left.tensor.ndim == 2:
        wide = torch.float64 if own.dtype == torch.float64 else torch.float32  # products of bf16 are exact in float32
        return _wrapped((left.tensor.to(wide) * own.to(wide)).sum(-1).to(own.dtype), ragged)
    if rank == 2 and left.tensor.ndim == 2:
        return _wrapped(torch.bmm(left.tensor.unsqueeze(1), own)[:, 0], ragged)
    raise Uncovered


# -- parts ---------------------------------------------------------------------------------------------------------------


def part(target: Lane, key: list[Any], is_kept: bool) -> Lane:
    """`target[key]`, where the elements of `key` are lanes, slices of lanes, None or `...`.

    With `is_kept` the result must share the target's memory, as it does for a request alone.
    """
    match target:
        case View():
            return _part_of_view(target, key, is_kept)
        case Rows():
            return _part_of_view(View(Held(target.tensor, target.ragged)), key, is_kept)
        case Each():
            return _part_of_each(target, key)
        case Several():
            (index,) = key
            if not isinstance(index, Shared) or type(index.value) is not int:
                raise Uncovered
            return target.lanes[index.value]
        case _:
            raise Uncovered


def _part_of_view(view: View, key: list[Any], is_kept: bool) -> Lane:
    if view.own is not None:
        raise Uncovered
    own = _own_column(key, view)
    if own is not None:
        first = key[0] if len(key) == 2 else slice(None)
        picked = View(view.memory, view.pick) if is_full(first) else _part_of_view(view, [first], is_kept)
        assert isinstance(picked, View)
        return View(picked.memory, picked.pick, (), own)
    if view.pick is not None and view.pick.ragged is None:
        if view.columns:
            raise Uncovered
        return View(view.memory, view.pick, _basic(key))
    if view.columns:
        value = view.read()
        first, *rest = key
        if view.pick is None and is_full(first) and not has_tensors(rest) and isinstance(value, Rows):
            return Rows(value.tensor[(slice(None), *_basic(rest))], value.ragged)  # a view of the memory too
        if is_kept:
            raise Uncovered
        return _part_of_view(View(Held(value.tensor, _ragged_of(value))), key, is_kept)
    first, *rest = key
    ragged = view.memory.ragged if view.pick is None else view.pick.ragged
    assert ragged is not None
    if first is Ellipsis and not has_tensors(rest):
        return View(view.memory, view.pick, (Ellipsis, *_basic(rest)))  # too many for the columns: torch says so
    if first is Ellipsis or first is None:
        raise Uncovered
    if not is_full(first):
        if view.pick is not None:
            raise Uncovered
        return View(view.memory, _pick(ragged, first), _basic(rest))
    if not has_tensors(rest):
        return View(view.memory, view.pick, _basic(rest))
    value = view.read()
    assert isinstance(value, Rows)
    return Rows(value.tensor[column_index(rest, value.ragged)], value.ragged)


def _own_column(key: list[Any], view: View) -> Ints | None:
    """The column that each request names for itself, if the key's last element is that."""
    is_row = view.pick is not None and view.pick.ragged is None
    if view.columns or len(key) != (1 if is_row else 2) or not isinstance(key[-1], Items):
        return None
    width, tensor = view.memory.tensor.shape[-1], view.memory.tensor
    if tensor.ndim != 2 or not all(type(value) is int and -width <= value < width for value in key[-1].values):
        raise Uncovered
    return as_ints(key[-1].values)


def _part_of_each(target: Each, key: list[Any]) -> Lane:
    return Each(target.tensor[(slice(None), *_basic(key))])


def _ragged_of(value: Lane) -> Ragged:
    if not isinstance(value, Rows):
        raise Uncovered
    return value.ragged


def column_index(key: list[Any], ragged: Ragged) -> tuple[Any, ...]:
    """The index [all rows, ...] for one tensor of column numbers, everybody's or each request's own."""
    if len(key) != 1:
        raise Uncovered
    match resolved(key[0]):
        case Shared(value=Tensor() as ids) if not ids.is_floating_point() and ids.dtype != torch.bool and ids.ndim == 1:
            return (slice(None), ids)
        case Each(tensor=ids) if not ids.is_floating_point() and ids.dtype != torch.bool and ids.ndim == 2:
            own = ids if ragged.is_single else ids.index_select(0, ragged.owner.to(ids.device))
            return (torch.arange(ragged.total, device=ids.device).unsqueeze(1), own)
        case _:
            raise Uncovered


def _pick(ragged: Ragged, first: Any) -> Pick:
    """Rows by an integer or a slice, each request's own or everybody's."""
    num = len(ragged.counts)
    if isinstance(first, slice):
        if first.step is not None and _numbers(first.step, num) != [1] * num:
            raise Uncovered
        starts, stops = _numbers(first.start, num), _numbers(first.stop, num)
        bounds = [slice(a, b).indices(n)[:2] for a, b, n in zip(starts, stops, ragged.counts.tolist(), strict=True)]
        counts = [max(stop - start, 0) for start, stop in bounds]
        return Pick(ragged.starts + as_ints([start for start, _ in bounds]), Ragged(as_ints(counts)))
    known = first.value if isinstance(first, Shared) else None
    if type(known) is int and known in ragged.picks:
        return ragged.picks[known]
    rows = as_ints(_numbers(first, num))
    rows = rows + (rows < 0) * ragged.counts
    if bool(((rows < 0) | (rows >= ragged.counts)).any()):
        raise Uncovered  # the requests that are out of range find out by themselves
    pick = Pick(ragged.starts + rows, None, ragged.is_single)
    if type(known) is int:
        ragged.picks[known] = pick
    return pick


def _numbers(lane: Any, num: int) -> list[Any]:
    """An integer or None a request."""
    match lane:
        case None:
            return [None] * num
        case Shared(value=value) if type(value) is int or value is None:
            return [value] * num
        case Items(values=values) if all(type(value) is int for value in values):
            return values
        case _:
            raise Uncovered


def is_full(first: Any) -> bool:
    return isinstance(first, slice) and first == slice(None)


def has_tensors(key: list[Any]) -> bool:
    return any(isinstance(element, Each | Rows | View | Items) or _is_tensor(element) for element in key)


def _is_tensor(element: Any) -> bool:
    return isinstance(element, Shared) and not (type(element.value) is int or element.value is None)


def _basic(key: list[Any]) -> tuple[Any, ...]:
    """Integers, slices, None and `...`, the same for everybody."""
    return tuple(_basic_element(element) for element in key)


def _basic_element(element: Any) -> Any:
    match element:
        case None:
            return None
        case Shared(value=value) if type(value) is int or value is None:
            return value
        case slice():
            parts = [_basic_element(part) for part in (element.start, element.stop, element.step)]
            return slice(*parts)
        case _ if element is Ellipsis:
            return element
        case _:
            raise Uncovered


def _wrapped(result: Any, ragged: Ragged | None) -> Lane:
    """A result as a lane; several tensors as several lanes under torch's names."""
    if isinstance(result, Tensor):
        return Each(result) if ragged is None else Rows(result, ragged)
    if isinstance(result, tuple) and all(isinstance(item, Tensor) for item in result):
        kind: Any = type(result)
        make = kind if kind is not tuple else tuple
        lanes = [Each(item) if ragged is None else Rows(item, ragged) for item in result]
        return Several(tuple(lanes), make)
    raise Uncovered
