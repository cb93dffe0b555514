"""Tensors in the worker, by content: each crosses once, however many requests use it.

A key is the sha256 (hex) of the tensor's safetensors bytes, so a key that fits proves what it names. The front end puts
and drops; it counts who uses what.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import torch
from safetensors.torch import load
from torch import Tensor

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.plan.template import Digest, Key, Parameter

NAME = "tensor"


class StoreInfo(msgspec.Struct, frozen=True):
    """`bytes` and `count` of what the store holds now; `received_bytes` of all that ever came."""

    bytes: int
    count: int
    received_bytes: int


class Store:
    """Constants of all requests, on the model's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}
        self._received = 0

    def put(self, files: Iterable[bytes]) -> None:
        """Take tensors, each as safetensors bytes with one tensor named `tensor`."""
        for data in files:
            self._received += len(data)
            key = digest(data)
            if key not in self._tensors:  # requests that share a tensor should find that they do
                self._tensors[key] = _load(data).to(self._device)

    def drop(self, digests: Iterable[str]) -> None:
        """Forget tensors. Requests that run keep theirs."""
        for key in digests:
            self._tensors.pop(key, None)

    def get(self, key: str) -> Tensor:
        tensor = self._tensors.get(key)
        if tensor is None:
            raise GraphError(f"constant {key[:12]} isn't in the engine's store")
        return tensor

    def value_of(self, parameter: Parameter) -> Tensor | str | int | float:
        """What a parameter is in the run. Raises for a tensor that isn't here."""
        match parameter:
            case Digest():
                return self.get(parameter.text)
            case Key():
                return parameter.text
            case _:
                return parameter

    def info(self) -> StoreInfo:
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        return StoreInfo(bytes=size, count=len(self._tensors), received_bytes=self._received)


def _load(data: bytes) -> Tensor:
    try:
        tensors = load(data)
    except Exception as error:
        raise GraphError(f"a constant isn't safetensors bytes: {error}") from None
    if set(tensors) != {NAME}:
        raise GraphError(f"a constant's file holds one tensor named {NAME!r}; got {sorted(tensors)[:5]}")
    return tensors[NAME]
