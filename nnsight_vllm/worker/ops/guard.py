"""Stands before every operation of a graph: what it would make and do is bounded, and known before it runs.

Most operations on the values of a model are small: where the elements of all arguments multiplied with one another are
few, so is whatever comes out. The others are tried on tensors without data (`cost.py`), once for arguments of the same
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.plan.rows import Kind, rule_of
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.ops.containers import check_container
from nnsight_vllm.worker.ops.cost import FORESEEN, Cost, TooDear, Unforeseeable, cost_of
from nnsight_vllm.worker.ops.operations import OPERATIONS, Operation

_FEW = 1 << 24  # elements
_MAX_KNOWN = 4096
_MAX_KEY = 64
_COMPLEX = 16  # bytes of the largest element

# Looks at a value, or gives a view with no more elements than the value has; or watches itself (`operations.py`).
_FREE = """
py.append py.insert py.pop py.keys py.values py.items py.len py.size py.ndim py.dtype py.attr py.not py.bool py.int py.float
py.str py.list py.tuple py.dict py.extend py.update py.setitem tensor.view tensor.view_as tensor.T tensor.mT tensor.H tensor.mH
tensor.t tensor.transpose tensor.permute tensor.squeeze tensor.unsqueeze tensor.narrow tensor.select tensor.movedim
tensor.moveaxis tensor.swapaxes tensor.swapdims tensor.detach tensor.dim tensor.ndimension tensor.numel tensor.size
tensor.is_floating_point tensor.real torch.numel torch.t torch.transpose torch.permute torch.squeeze torch.unsqueeze torch.narrow
torch.select torch.movedim torch.moveaxis torch.swapaxes torch.swapdims
"""
FREE = frozenset(_FREE.split())
# Their results and work follow from their tensors' elements, whatever numbers stand beside them.
_BOUNDED = """
reshape reshape_as flatten unflatten ravel contiguous diagonal gather take take_along_dim index_select index_add index_copy
index_fill scatter scatter_add scatter_reduce masked_fill masked_scatter roll rot90 fliplr flipud trace dot vdot inner
outer bmm baddbmm addmm addmv addr expand_as broadcast_tensors tril triu layer_norm rms_norm group_norm linear embedding
cosine_similarity pairwise_distance mse_loss l1_loss cross_entropy dist std_mean var_mean cummax cummin aminmax equal allclose cpu
item tolist
"""
_NOT_BOUNDED = frozenset(["tensor.median", "torch.median", "py.sum"])


def _is_bounded(name: str) -> bool:
    space, _, bare = name.partition(".")
    if name in _NOT_BOUNDED or space == "edit":
        return False
    return (
        rule_of(name).kind in (Kind.POINTWISE, Kind.LAST, Kind.MATMUL) or bare in _BOUNDED.split() or bare.endswith("_")
    )


class Guard:
    """The operations as they may be called. Each raises `InterventionError` for what would be too much."""

    def __init__(self, limits: Limits) -> None:
        self._most = Cost(limits.value_bytes, limits.work)
        self._few = min(_FEW, limits.value_bytes // _COMPLEX, limits.work // _COMPLEX)
        self._known: dict[object, None] = {}
        self._bounded = frozenset(name for name in OPS if _is_bounded(name))
        self._checks: dict[str, Callable[[str, tuple[Any, ...], dict[str, Any]], None]] = {}
        for name in OPS - FREE:
            self._checks[name] = self._check_bounded if name in self._bounded else self._check
        self._checks["py.getitem"] = self._check_index

    def warm_up(self) -> None:
        """Have torch load what it needs for running operations without data: it takes seconds the first time."""
        self.allow("torch.zeros", [1], {})
        self.allow("linalg.svd", [torch.ones(2, 2)], {})

    def allow(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Raise unless the operation may run on these arguments."""
        check = self._checks.get(name)
        if check is not None:
            check(name, tuple(args), kwargs)

    def operation(self, name: str) -> Operation:
        """The operation, which is allowed first whenever it's called."""
        check = self._checks.get(name)
        return OPERATIONS[name] if check is None else partial(self._checked, name, check)

    def judge(self, what: str, cost: Cost) -> None:
        """Raise where the cost is over its bounds."""
        if cost.bytes > self._most.bytes:
            raise InterventionError(
                f"{what} would make values of {cost.bytes} bytes or more; the limit `value_bytes` is {self._most.bytes}"
            )
        if cost.work > self._most.work:
            raise InterventionError(
                f"{what} is too much work at once, {cost.work} or more; the limit `work` is {self._most.work}"
            )

    def _checked(self, name: str, check: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        check(name, args, kwargs)
        return OPERATIONS[name](*args, **kwargs)

    def _check_bounded(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        elements = 1
        for arg in args:
            if isinstance(arg, Tensor):
                elements *= arg.numel() or 1
            elif isinstance(arg, list | tuple | dict):
                return self._check(name, args, kwargs)
        for arg in kwargs.values():
            if isinstance(arg, Tensor | list | tuple | dict):
                return self._check(name, args, kwargs)
        if elements > self._few:
            self._check(name, args, kwargs)
        return None

    def _check_index(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target, key = args
        if not isinstance(target, Tensor):
            return
        for item in key if type(key) is tuple else (key,):
            if isinstance(item, list | tuple) or (isinstance(item, Tensor) and item.ndim):
                self._check(name, args, kwargs)
                return

    def _check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        num_items = check_container([args, *kwargs.values()])
        is_known = num_items <= _MAX_KEY and name.partition(".")[2] not in FORESEEN
        key = _key(name, args, kwargs) if is_known else None
        if key is not None and key in self._known:
            return
        if name.startswith("py.") and not _has_tensor(args):
            return
        try:
            cost = cost_of(name, OPERATIONS[name], list(args), kwargs, self._most)
        except TooDear as error:
            cost = error.cost
        except Unforeseeable:
            raise InterventionError(f"what {name} would make of these arguments can't be told beforehand") from None
        self.judge(name, cost)
        if key is not None and not cost.is_of_data:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = None


def _key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object | None:
    """All that the cost depends on. None: some of it can't be looked up by."""
    key = (name, _kinds(args), tuple(kwargs), _kinds(kwargs.values()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _kinds(values: Iterable[Any]) -> tuple[object, ...]:
    return tuple(_kind(value) for value in values)


def _kind(value: Any) -> object:
    match value:
        case Tensor():
            return value.shape, value.dtype
        case list() | tuple():
            return type(value), _kinds(value)
        case slice():
            return slice, _kinds((value.start, value.stop, value.step))
        case dict():
            return dict, _kinds(value.items())
        case torch.dtype() | None:
            return value
        case _:
            return type(value), value


def _has_tensor(values: Any) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, list | tuple) and _has_tensor(v)) for v in values)
