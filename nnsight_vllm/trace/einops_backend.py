"""Lets `einops` work on proxies. Importing this module is enough: einops looks for subclasses of its backend class."""

from __future__ import annotations

from typing import Any

import torch
from einops._backends import AbstractBackend

from nnsight_vllm.trace.proxy import Proxy

_REDUCTIONS = {"min": "amin", "max": "amax", "sum": "sum", "mean": "mean", "prod": "prod", "any": "any", "all": "all"}


class ProxyBackend(AbstractBackend):  # type: ignore[misc]
    """einops in terms of recorded tensor methods."""

    framework_name = "nnsight_vllm"

    def is_appropriate_type(self, tensor: object) -> bool:
        return isinstance(tensor, Proxy)

    def shape(self, x: Any) -> tuple[Any, ...]:
        return tuple(x.shape)

    def reshape(self, x: Any, shape: Any) -> Any:
        return x.reshape(tuple(shape))

    def transpose(self, x: Any, axes: Any) -> Any:
        return x.permute(tuple(axes))

    def reduce(self, x: Any, operation: str, axes: Any) -> Any:
        for axis in sorted(axes, reverse=True):
            x = getattr(x, _REDUCTIONS[operation])(dim=axis)
        return x

    def stack_on_zeroth_dimension(self, tensors: list[Any]) -> Any:
        return torch.stack(tensors)

    def add_axis(self, x: Any, new_position: int) -> Any:
        return x.unsqueeze(new_position)

    def add_axes(self, x: Any, n_axes: int, pos2len: dict[int, int]) -> Any:
        sizes = [-1] * n_axes
        for position, length in pos2len.items():
            x = self.add_axis(x, position)
            sizes[position] = length
        return x.expand(tuple(sizes))

    def tile(self, x: Any, repeats: Any) -> Any:
        return x.repeat(tuple(repeats))

    def concat(self, tensors: list[Any], axis: int) -> Any:
        return torch.cat(tensors, dim=axis)

    def is_float_type(self, x: Any) -> bool:
        return bool(x.dtype.is_floating_point)

    def einsum(self, pattern: str, *x: Any) -> Any:
        return torch.einsum(pattern, *x)
