"""Saved values as Python and torch have them, from how they travel."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import torch

from nnsight_vllm.graph.results import DictValue, DtypeValue, ListValue, TensorValue, TupleValue, Value


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
