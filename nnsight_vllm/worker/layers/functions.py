"""Layers as functions of their one input, past the hooks on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nnsight_vllm.worker.layers.layer_kinds import first_tensor, is_activation, is_embedding, is_linear, is_norm

Apply = Callable[[Tensor], Tensor]
"""A module as a function of its one input, [n, ...] -> [n, ...]; never changes its argument."""

Columns = tuple[int, int]
"""A share of a fused linear's output: first column and end."""


def leaf_function(host: nn.Module, module: nn.Module, columns: Columns | None = None) -> Apply:
    """A leaf of Hugging Face's tree, which `host` computes. An activation has no weights, so the tree's own serves."""
    return module if is_activation(module) else function_of(host, columns)


def function_of(host: nn.Module, columns: Columns | None = None) -> Apply:
    """vLLM's linear, norm (without residual), embedding or block; its first output. With `columns`, those of a fused linear."""

    def apply(value: Tensor) -> Tensor:
        if is_embedding(host):
            _check_ids(host, value)
        result = first_tensor(host.forward(value))
        assert result is not None
        return result if columns is None else result[..., columns[0] : columns[1]]

    return apply


def widths_of(host: nn.Module, module: nn.Module) -> tuple[int | None, int] | None:
    """Last dimensions of what a linear, norm or embedding (which takes ids: None) takes and gives; None for other modules."""
    layer: Any = host
    if is_embedding(host):
        return None, int(layer.embedding_dim)
    if is_linear(host):
        return int(layer.input_size), int(layer.output_size)
    if is_norm(host):
        weight = next(host.parameters(), None)
        shape: Any = module.normalized_shape if weight is None else weight.shape
        return shape[-1], shape[-1]
    return None


def _check_ids(module: nn.Module, ids: Tensor) -> None:
    """Ids outside the table: an error here, where it is one request's; on a GPU the lookup itself would end them all."""
    size: Any = getattr(module, "org_vocab_size", None) or module.num_embeddings
    limit = int(size) - int(getattr(module, "offset", 0))
    if ids.is_floating_point():
        raise TypeError(f"an embedding takes integer ids, not {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
        raise IndexError(f"an embedding id is out of range: {int(ids.min())}..{int(ids.max())}, the table has {limit}")
