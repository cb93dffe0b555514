"""The op table's names -> callables, and a node's arguments -> Python values.

Every name is resolved once, here, from the module that its prefix names; nothing else can be called. The `py.`
operations are Python's own operators and containers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.nodes import Arg, Dict, Dots, Dtype, List, Ref, Slice, Special, Tuple
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.kernels.single import edit_all
from nnsight_vllm.worker.ops.containers import MAX_PRINTED, check_container, check_length

Operation = Callable[..., Any]

MAX_POWER = 4096
MAX_BITS = 1 << 16
_ATTRIBUTES = """
values indices shape dtype ndim T mT Q R U S V Vh L eigenvalues eigenvectors sign logabsdet solution residuals rank
singular_values
"""
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
# These make new tensors from plain numbers, so on an accelerator they must be told where.
_FACTORIES = "arange eye full linspace logspace ones rand randint randn randperm range tensor zeros"
FACTORIES = frozenset(f"torch.{name}" for name in _FACTORIES.split())


def evaluate(arg: Arg, env: Mapping[int, Any]) -> Any:
    """The Python value of an argument; `env` has the values of nodes."""
    match arg:
        case Ref():
            if arg.id not in env:
                raise GraphError(f"value {arg.id} was never computed")
            return env[arg.id]
        case List():
            return [evaluate(item, env) for item in arg.items]
        case Tuple():
            return tuple(evaluate(item, env) for item in arg.items)
        case Dict():
            return {evaluate(key, env): evaluate(value, env) for key, value in arg.items}
        case Slice():
            return slice(evaluate(arg.start, env), evaluate(arg.stop, env), evaluate(arg.step, env))
        case Dots():
            return Ellipsis
        case Dtype():
            return _dtype(arg.name)
        case Special():
            return float(arg.text)
        case _:
            return arg


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise GraphError(f"no dtype {name!r}")
    return dtype


def _property(name: str) -> Operation:
    return lambda tensor: getattr(tensor, name)


def _resolve(name: str) -> Operation:
    space, _, bare = name.partition(".")
    if space == "py":
        return _PY[bare]
    if space == "edit":
        return partial(edit_all, bare.removesuffix("_"))
    found = getattr(_SPACES[space], bare)
    return found if callable(found) else _property(bare)


def _extend(items: list[Any], more: Iterable[Any]) -> None:
    items.extend(_joining(items, more))


def _joining(items: list[Any], more: Iterable[Any]) -> Iterable[Any]:
    """What is to be added to a list, unless the list would become too long."""
    more = more if isinstance(more, list | tuple | dict | str) else _listed(more)
    check_length(len(items) + len(more))
    return more


def _listed(values: Any = ()) -> list[Any]:
    """A new list. The rows of a tensor are counted before they are taken apart."""
    if isinstance(values, Tensor) and values.ndim:
        check_length(values.shape[0])
    return list(values)


def _tuple_of(values: Any = ()) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else tuple(_listed(values))


def _pop(container: Any, *args: Any) -> Any:
    return container.pop(*args)


def _set_item(target: Any, key: Any, value: Any) -> None:
    if isinstance(target, list) and isinstance(key, slice):
        value = list(_joining(target, value))
    operator.setitem(target, key, value)


def _text(*args: Any) -> str:
    if args and isinstance(args[0], list | tuple | dict) and check_container(args[0]) > MAX_PRINTED:
        raise OverflowError(f"the text of a container with more than {MAX_PRINTED} items")
    return str(*args)


def _sum(items: Any, *start: Any) -> Any:
    """Of lists too, but not of very many: their sum copies what is there already with each one."""
    items = _listed(items) if isinstance(items, Tensor) else items
    if len(items) > MAX_PRINTED and any(isinstance(value, list | tuple) for value in [*start, *items]):
        raise OverflowError(f"a sum of {len(items)} lists; the limit is {MAX_PRINTED}")
    return sum(items, *start)


def _of_rows(function: Operation) -> Operation:
    """For what goes through a container's items, or through a tensor's rows."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*[_listed(arg) if isinstance(arg, Tensor) and arg.ndim else arg for arg in args], **kwargs)

    return run


def _to_list(tensor: Tensor) -> Any:
    check_length(tensor.numel())
    return tensor.tolist()


def _round(value: Any, digits: int | None = None) -> Any:
    if isinstance(value, Tensor):
        return torch.round(value, decimals=digits or 0)
    if isinstance(digits, int) and abs(digits) > MAX_POWER:
        raise OverflowError(f"a number rounded to {digits} digits; the limit is {MAX_POWER}")
    return round(value, digits)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        if exponent > MAX_POWER:
            raise OverflowError(f"an integer to the power of {exponent}; the limit is {MAX_POWER}")
        _check_bits(base.bit_length() * abs(exponent))
    return operator.pow(base, exponent)


def _lshift(value: Any, count: Any) -> Any:
    if isinstance(value, int) and isinstance(count, int):
        if count > MAX_POWER:
            raise OverflowError(f"an integer shifted by {count} bits; the limit is {MAX_POWER}")
        _check_bits(value.bit_length() + count)
    return operator.lshift(value, count)


def _mul(left: Any, right: Any) -> Any:
    _check_size(left, right)
    return operator.mul(left, right)


def _in_place_mul(left: Any, right: Any) -> Any:
    _check_size(left, right)
    return operator.imul(left, right)


def _add(left: Any, right: Any) -> Any:
    _check_joined(left, right)
    return operator.add(left, right)


def _in_place_add(left: Any, right: Any) -> Any:
    if isinstance(left, list):
        right = _joining(left, right)
    _check_joined(left, right)
    return operator.iadd(left, right)


def _check_joined(left: Any, right: Any) -> None:
    if not isinstance(left, Tensor) and isinstance(left, list | str | tuple) and isinstance(right, list | str | tuple):
        check_length(len(left) + len(right), isinstance(left, str))


def _mod(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        raise TypeError("text can't be formatted in a graph")
    return operator.mod(left, right)


def _check_size(left: Any, right: Any) -> None:
    """Products of plain Python values grow without bound where tensors would run out of shape."""
    match left, right:
        case (list() | str() | tuple() as items, int() as count) | (int() as count, list() | str() | tuple() as items):
            check_length(len(items) * count, isinstance(items, str))
        case (int(), int()):
            _check_bits(left.bit_length() + right.bit_length())


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        raise OverflowError(f"an integer of more than {MAX_BITS} bits")


def _guarded_division(divide: Operation) -> Operation:
    """The smallest integer divided by -1 has no integer result, and with `rounding_mode` the processor traps."""

    def run(left: Any, right: Any, *args: Any, **kwargs: Any) -> Any:
        values = [torch.as_tensor(left), torch.as_tensor(right)]
        if kwargs.get("rounding_mode") and not any(value.is_floating_point() for value in values):
            smallest = torch.iinfo(torch.result_type(*values)).min
            if bool((values[0] == smallest).any()) and bool((values[1] == -1).any()):
                raise OverflowError(f"{smallest} / -1 isn't an integer of this type")
        return divide(left, right, *args, **kwargs)

    return run


def _in_place_power(base: Any, exponent: Any) -> Any:
    return base.__ipow__(exponent) if isinstance(base, Tensor) else _power(base, exponent)


def _in_place_lshift(value: Any, count: Any) -> Any:
    return value.__ilshift__(count) if isinstance(value, Tensor) else _lshift(value, count)


def _ndim(value: Tensor) -> int:
    return value.ndim


def _dtype_of(value: Tensor) -> torch.dtype:
    return value.dtype


def _attribute(value: Any, name: str) -> Any:
    if name not in ATTRIBUTES or not isinstance(value, Tensor | tuple):
        raise AttributeError(f"no attribute {name!r} of a {type(value).__name__} in a graph")
    return getattr(value, name)


_SPACES: dict[str, Any] = {
    "tensor": Tensor,
    "torch": torch,
    "nn": torch.nn.functional,
    "linalg": torch.linalg,
    "special": torch.special,
}
_PY: dict[str, Operation] = {
    "getitem": operator.getitem,
    "setitem": _set_item,
    "add": _add,
    "sub": operator.sub,
    "mul": _mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": _mod,
    "pow": _power,
    "matmul": operator.matmul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": _lshift,
    "rshift": operator.rshift,
    "neg": operator.neg,
    "pos": operator.pos,
    "invert": operator.invert,
    "abs": operator.abs,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "not": operator.not_,
    "iadd": _in_place_add,
    "isub": operator.isub,
    "imul": _in_place_mul,
    "itruediv": operator.itruediv,
    "ifloordiv": operator.ifloordiv,
    "imod": operator.imod,
    "ipow": _in_place_power,
    "imatmul": operator.imatmul,
    "iand": operator.iand,
    "ior": operator.ior,
    "ixor": operator.ixor,
    "ilshift": _in_place_lshift,
    "irshift": operator.irshift,
    "list": _listed,
    "dict": _of_rows(dict),
    "tuple": _tuple_of,
    "int": int,
    "float": float,
    "str": _text,
    "bool": bool,
    "append": lambda items, item: items.append(item),
    "extend": _extend,
    "insert": lambda items, index, item: items.insert(index, item),
    "pop": _pop,
    "update": lambda mapping, *args, **kwargs: mapping.update(*args, **kwargs),
    "keys": lambda mapping: list(mapping.keys()),
    "values": lambda mapping: list(mapping.values()),
    "items": lambda mapping: list(mapping.items()),
    "len": len,
    "sum": _sum,
    "min": _of_rows(min),
    "max": _of_rows(max),
    "sorted": _of_rows(sorted),
    "round": _round,
    "size": lambda tensor, *args: tensor.size(*args),
    "ndim": _ndim,
    "dtype": _dtype_of,
    "attr": _attribute,
}

OPERATIONS: dict[str, Operation] = {name: _resolve(name) for name in sorted(OPS)}
for _name in ("torch.div", "torch.divide", "tensor.div", "tensor.divide", "tensor.div_", "tensor.divide_"):
    OPERATIONS[_name] = _guarded_division(OPERATIONS[_name])
OPERATIONS["tensor.tolist"] = _to_list
