"""What an operation would make and do, found out by running it on tensors without data.

Every elementary operation that torch comes to on the way counts: bytes of the tensors it makes, and its work. Products count
their multiplications and additions, sorting and decompositions more than one step an element, everything else 64 an element.
A few operations depend on data, which tensors without data can't tell; those have rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nnsight_vllm.worker.ops.containers import MAX_TENSORS, check_container

ELEMENT = 64  # work of touching one element
CALL = 1 << 22  # least work of an elementary operation, so that their number is bounded too
_SORTS = ("sort", "topk", "kthvalue", "median", "mode", "quantile", "unique")
_SLOW_INTEGERS = 32  # a product of integers has no fast kernel
_STEPS = 30  # how many times n³ a decomposition takes, about


@dataclass
class Cost:
    """`bytes` that are made; `work`, see the module. `is_of_data`: it isn't known of other arguments of the same shapes."""

    bytes: int = 0
    work: int = 0
    is_of_data: bool = False


class TooDear(Exception):
    """A cost is over its bounds already."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost


class Unforeseeable(Exception):
    """What the operation makes depends on data, and there is no rule for it."""


def cost_of(name: str, operation: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], most: Cost) -> Cost:
    """What the operation costs. Raises `TooDear` once it's over `most`, `Unforeseeable`, and what the operation itself raises."""
    bare = name.partition(".")[2]
    rule = _edited if name == "edit.clamp_" else _RULES.get(bare)
    if rule is not None and (cost := rule(args, kwargs)) is not None:
        return cost
    if name in _COMPARING and (name in _CHOOSING or not all(isinstance(arg, Tensor) for arg in args)):
        return _compared(args, kwargs)
    if name == "py.getitem":
        args = [args[0], _unmasked(args[1])]
    try:
        return _tried(name, operation, args, kwargs, most)
    except Unforeseeable:
        first = 1 if name.startswith("tensor.") else 0
        if not any(tensor.ndim == 0 for tensor in _tensors([*args[first:], *kwargs.values()])):
            raise
        numbers = [*args[:first], *_with_numbers(args[first:])]
        named = {key: _with_numbers(value) for key, value in kwargs.items()}
        return replace(_tried(name, operation, numbers, named, most), is_of_data=True)


def _tried(name: str, operation: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], most: Cost) -> Cost:
    """What was counted while the operation ran on tensors without data."""
    with torch.inference_mode(False), torch.no_grad():
        shadows, named = [_shadow(arg) for arg in args], {key: _shadow(value) for key, value in kwargs.items()}
        if not _has_tensor([*shadows, *named.values()]) and not name.startswith("py."):
            named["device"] = "meta"
        return _counted(name, partial(operation, *shadows, **named), most)


def _counted(name: str, work: Callable[[], Any], most: Cost) -> Cost:
    tally = _Tally(most)
    try:
        with tally:
            work()
    except NotImplementedError as error:
        raise Unforeseeable(name) from error
    except RuntimeError as error:
        if "meta" in str(error).lower() and "expanded size" not in str(error):
            raise Unforeseeable(name) from error
        raise
    return tally.cost


def _with_numbers(value: Any) -> Any:
    """Tensors without dimensions as the numbers they are: sizes and the like may be such."""
    match value:
        case Tensor() if value.ndim == 0 and not value.is_complex():
            return value.item()
        case list():
            return [_with_numbers(item) for item in value]
        case tuple():
            return tuple(_with_numbers(item) for item in value)
        case _:
            return value


def _shadow(value: Any) -> Any:
    match value:
        case Tensor():
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        case list():
            return [_shadow(item) for item in value]
        case tuple():
            return tuple(_shadow(item) for item in value)
        case dict():
            return {key: _shadow(item) for key, item in value.items()}
        case _:
            return value


def _unmasked(key: Any) -> Any:
    """An index in which masks are replaced by as many numbers as they could be."""
    found: list[Any] = []
    for item in key if isinstance(key, tuple) else [key]:
        if isinstance(item, Tensor) and item.ndim == 0:  # takes one, or as a mask adds a dimension
            found.append(None if item.dtype == torch.bool else slice(0, 1))
        elif isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
            found += [torch.zeros(item.numel(), dtype=torch.int64)] * max(1, item.ndim)
        else:
            found.append(item)
    return tuple(found)


def _has_tensor(values: list[Any]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, list | tuple) and _has_tensor(list(v))) for v in values)


class _Tally(TorchDispatchMode):
    """Adds up elementary operations while it is entered."""

    def __init__(self, most: Cost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = Cost()
        self._most = most
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors([*args, *(kwargs or {}).values()])
        for tensor in given:
            self._note(tensor)
        result = func(*args, **(kwargs or {}))
        made = _tensors([result])
        if len(made) > MAX_TENSORS:
            raise TooDear(Cost(len(made), self._most.work + 1))
        for tensor in made:
            num_bytes = tensor.numel() * tensor.element_size()
            if self._note(tensor):
                self.cost.bytes += num_bytes
            elif num_bytes > self._most.bytes:  # a view, with its elements counted as if it had them
                raise TooDear(Cost(num_bytes, self.cost.work))
        self.cost.work += max(CALL, _work(func, args, kwargs or {}, result, given, made))
        if self.cost.bytes > self._most.bytes or self.cost.work > self._most.work:
            raise TooDear(self.cost)
        return result

    def _note(self, tensor: Tensor) -> bool:
        """Whether its memory is new."""
        storage = tensor.untyped_storage()
        is_new = storage._cdata not in self._storages
        self._storages[storage._cdata] = storage
        return is_new


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _work(func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor]) -> int:
    name = func._schema.name.partition("::")[2]
    packet = func.overloadpacket
    if packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
        return flops if made and made[0].is_floating_point() else flops * _SLOW_INTEGERS
    elements = sum(tensor.numel() for tensor in [*given, *made])
    if "linalg" in name or "cholesky" in name:
        return max((_STEPS * tensor.numel() * max(tensor.shape[-2:], default=1) for tensor in given), default=0)
    if any(word in name for word in _SORTS):
        return ELEMENT * elements * max(1, elements.bit_length())
    if name == "_cdist_forward":
        return 4 * made[0].numel() * given[0].shape[-1]
    if name in ("addbmm", "_trilinear"):
        return 2 * math.prod(max(1, tensor.numel()) for tensor in given[-2:])
    if "pool" in name:
        return ELEMENT * elements * max(1, int(math.prod(args[1])))
    return ELEMENT * elements


_CHOOSING = frozenset(["py.min", "py.max", "py.sorted"])
_COMPARING = _CHOOSING | {f"py.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge")}


# -- what depends on data -------------------------------------------------------------------------------------------------

CostRule = Callable[[list[Any], dict[str, Any]], Cost | None]


def _first(args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    found = _tensors([*args, *kwargs.values()])
    if not found:
        raise TypeError("expected a tensor among the arguments")
    return found[0]


def _sized(args: list[Any], kwargs: dict[str, Any], factor: int, each: int = 1) -> Cost:
    """`factor` bytes for each element that goes in, `each` times over."""
    tensors = _tensors([*args, *kwargs.values()])
    elements = max((tensor.numel() for tensor in tensors), default=0)
    if len(tensors) > 1 and len({tensor.shape for tensor in tensors}) > 1:
        elements = math.prod(max(1, tensor.numel()) for tensor in tensors[:2])
    work = ELEMENT * elements * max(1, elements.bit_length()) * each
    return Cost(elements * factor, max(CALL, work))


def _nothing(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    return _sized(args, kwargs, 0)


def _indices(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    tensors = _tensors([*args, *kwargs.values()])
    return _sized(args, kwargs, 8 * max((max(1, tensor.ndim) for tensor in tensors), default=1))


def _masked(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    return _sized(args, kwargs, 16)


def _sorted(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    return _sized(args, kwargs, 64)


def _where(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    return _indices(args, kwargs) if len(args) + len(kwargs) == 1 else None


def _covariance(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    tensor = _first(args, kwargs)
    rows, columns = (tensor.shape[0] if tensor.ndim > 1 else 1), (tensor.shape[-1] if tensor.ndim else 1)
    return Cost(16 * (rows * rows + 4 * tensor.numel()), CALL + ELEMENT * tensor.numel() + 2 * rows * rows * columns)


def _counts(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    """As many as the largest value says."""
    tensor = _first(args, kwargs)
    given = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
    least = given if isinstance(given, int) else 0
    num = max(least, int(tensor.max()) + 1 if tensor.numel() else 0)
    return Cost(8 * num, CALL + ELEMENT * (num + tensor.numel()))


def _one_hot(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    tensor = _first(args, kwargs)
    given = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
    if not isinstance(given, int):
        return None
    num = given if given > 0 else int(tensor.max()) + 1 if tensor.numel() else 0
    return Cost(16 * num * tensor.numel(), CALL + ELEMENT * num * tensor.numel())


def _repeated(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    """A tensor of repeats: as many as their sum."""
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
    if not isinstance(repeats, Tensor):
        return None
    tensor = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), repeats)
    total, size = int(repeats.sum()), max(1, tensor.element_size())
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    rest = 1
    if tensor is not repeats and isinstance(dim, int) and -tensor.ndim <= dim < tensor.ndim:
        rest = tensor.numel() // max(1, tensor.shape[dim])
        total = total if repeats.numel() > 1 else total * tensor.shape[dim]
    elif tensor is not repeats and repeats.numel() <= 1:
        total *= tensor.numel()
    return Cost((max(size, 8)) * max(0, total) * rest, CALL + ELEMENT * max(0, total) * rest)


def _combinations(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    """torch makes a grid of all tuples first."""
    num = kwargs.get("r", args[1] if len(args) > 1 else 2)
    size = _first(args, kwargs).numel()
    if not isinstance(num, int) or num > 64:
        raise OverflowError(f"combinations of {num}; the limit is 64")
    grid = size ** max(0, num) * max(1, num)
    return Cost(24 * grid, CALL + ELEMENT * grid)


def _least_squares(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    left, right = _first(args, kwargs), _tensors([*args, *kwargs.values()])[-1]
    size = left.numel() + right.numel()
    batch = math.prod(left.shape[:-2]) * math.prod(right.shape[:-2])
    return Cost(32 * size * batch, CALL + _STEPS * size * max(left.shape[-2:], default=1) * batch)


def _put(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    """Values at indices, masks among them: a copy of the tensor at most."""
    elements = sum(max(1, tensor.numel()) for tensor in _tensors([*args, *kwargs.values()]))
    return Cost(16 * elements, CALL + ELEMENT * elements)


def _compared(args: list[Any], kwargs: dict[str, Any]) -> Cost:
    """Items of containers, each of them with another one."""
    tensors = _tensors([*args, *kwargs.values()])
    sizes = sorted((max(1, tensor.numel()) for tensor in tensors), reverse=True)
    pairs = math.prod(sizes[:2]) if len(sizes) > 1 else 0
    return Cost(pairs, CALL + ELEMENT * (pairs + sum(sizes)), is_of_data=True)


def _literal(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    values = [*args, *kwargs.values()]
    num_items = check_container(values) + sum(tensor.numel() for tensor in _tensors(values))
    return Cost(16 * num_items, CALL + ELEMENT * num_items)


def _edited(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    """Rows [rows, width] and vectors or matrices of that width: each row meets each of them."""
    rows, rest = _first(args, kwargs), _tensors([*args, *kwargs.values()])[1:]
    width = max(1, rows.shape[-1] if rows.ndim else 1)
    elements = sum(tensor.numel() for tensor in rest)
    num_rows = max(1, rows.numel() // width)
    return Cost(4 * (2 * rows.numel() + num_rows * (elements // width)), CALL + 4 * num_rows * (width + elements))


def _taken_apart(count: Callable[[Tensor, Any], int]) -> CostRule:
    """The views would be made before they could be counted, so they are counted by the tensor's longest side."""

    def rule(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
        values = [*args, *kwargs.values()]
        if len(values) > 1 and isinstance(values[0], Tensor):
            how = len(values[1]) + 1 if isinstance(values[1], list | tuple) else values[1]
            how = values[1].numel() + 1 if isinstance(values[1], Tensor) else how
            num_parts = count(values[0], how if isinstance(how, int) else 0)
            if num_parts > MAX_TENSORS:
                raise OverflowError(f"a tensor taken apart into {num_parts}; the limit is {MAX_TENSORS}")
        return None

    return rule


def _longest(tensor: Tensor) -> int:
    return max(tensor.shape, default=1)


def _rows_of(args: list[Any], kwargs: dict[str, Any]) -> Cost | None:
    tensor, dim = args[0] if args else None, kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not isinstance(tensor, Tensor) or not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
        return None
    if tensor.shape[dim] > MAX_TENSORS:
        raise OverflowError(f"a tensor taken apart into {tensor.shape[dim]}; the limit is {MAX_TENSORS}")
    return None


_RULES: dict[str, CostRule] = {
    **dict.fromkeys(["equal", "allclose", "cpu", "item", "tolist", "is_nonzero"], _nothing),
    **dict.fromkeys(["nonzero"], _indices),
    "masked_select": _masked,
    **dict.fromkeys(["unique", "unique_consecutive"], _sorted),
    "where": _where,
    **dict.fromkeys(["cov", "corrcoef"], _covariance),
    "bincount": _counts,
    "one_hot": _one_hot,
    "repeat_interleave": _repeated,
    "combinations": _combinations,
    "lstsq": _least_squares,
    **dict.fromkeys(["index_put", "index_put_"], _put),
    **dict.fromkeys(["tensor", "new_tensor"], _literal),
    **dict.fromkeys(["project_out_", "norm_matched_add_", "low_rank_", "sae_clamp_"], _edited),
    "unbind": _rows_of,
    "chunk": _taken_apart(lambda tensor, how: min(how, _longest(tensor))),
    "split": _taken_apart(lambda tensor, how: -(-_longest(tensor) // max(1, how))),
    **dict.fromkeys(
        ["tensor_split", "hsplit", "vsplit", "dsplit", "split_with_sizes"], _taken_apart(lambda _, how: how)
    ),
}
FORESEEN = frozenset(_RULES)
"""Operations with a rule, without their prefix: what they cost may depend on more than shapes."""
