"""Saved values on their way home: what Python and torch have, as data, and back."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.graph.results import DictValue, DtypeValue, ListValue, TensorValue, TupleValue, Value


def names_of(value: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of the items of one of torch's results, such as `values` and `indices`."""
    kind: Any = type(value)
    return tuple(kind.__match_args__) if kind.__module__ == "torch.return_types" else ()


def encode_value(value: Any) -> Value:
    """A value as it travels. Raises TypeError for what can't."""
    match value:
        case Tensor():
            return _encode_tensor(value)
        case list():
            return ListValue([encode_value(item) for item in value])
        case tuple():
            names = names_of(value) or tuple(
                getattr(value, "_fields", ())
            )  # those of torch, and what came home of them
            return TupleValue([encode_value(item) for item in value], names)
        case dict():
            return DictValue([(encode_value(key), encode_value(item)) for key, item in value.items()])
        case torch.dtype():
            return DtypeValue(str(value).removeprefix("torch."))
        case int() if not -(2**63) <= value < 2**64:
            raise TypeError(f"an integer of {value.bit_length()} bits")
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"a {type(value).__name__} can't leave the engine")


def _encode_tensor(tensor: Tensor) -> TensorValue:
    host = tensor.detach().cpu().contiguous()
    flat = (torch.view_as_real(host) if host.is_complex() else host).reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return TensorValue(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def decode_value(value: Value) -> object:
    """A saved value; tensors are writable and the caller's own."""
    match value:
        case TensorValue():
            dtype: torch.dtype = getattr(torch, value.dtype)
            if not value.data:
                return torch.empty(value.shape, dtype=dtype)
            return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)
        case ListValue():
            return [decode_value(item) for item in value.items]
        case TupleValue():
            items = tuple(decode_value(item) for item in value.items)
            return named(value.names, items) if value.names else items
        case DictValue():
            return {decode_value(key): decode_value(item) for key, item in value.items}
        case DtypeValue():
            return getattr(torch, value.name)
        case _:
            return value


def named(names: tuple[str, ...], items: tuple[object, ...]) -> object:
    """A tuple whose items have names."""
    return _kind(names)(*items)


@functools.cache
def _kind(names: tuple[str, ...]) -> Any:
    return namedtuple("Result", names)
