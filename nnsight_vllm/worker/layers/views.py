"""What vLLM's layers are and compute, in Hugging Face's terms. The only file here that imports vLLM's layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from nnsight_vllm.worker.model.sites import Apply

_EMBEDDINGS = (VocabParallelEmbedding, nn.Embedding)
_TUPLES = ("Attention", "Router")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (LinearBase, nn.Linear))


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, _EMBEDDINGS)


def is_activation(module: nn.Module) -> bool:
    """An elementwise function: one of transformers' or torch's activations."""
    home = type(module).__module__
    return home in ("transformers.activations", "torch.nn.modules.activation") and not any(module.children())


def is_leaf(host: nn.Module, module: nn.Module) -> bool:
    """Whether the module works row by row on one tensor: linear, norm, embedding, activation."""
    return is_linear(host) or is_norm(host) or is_embedding(host) or is_activation(module)


def is_gated(module: nn.Module) -> bool:
    """vLLM's `activation(gate) * up` in one module."""
    return type(module).__name__.endswith("AndMul")


def is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")


def is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Router")


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def returns_tuple(module: nn.Module) -> bool:
    """Whether the Hugging Face module returns a tuple whose element 0 is the value."""
    return type(module).__name__.endswith(_TUPLES)


def first_tensor(output: Any) -> Tensor | None:
    """The value of a module that returns it alone or first in a tuple."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def columns_of(module: nn.Module, columns: tuple[int, int] | None = None) -> Apply:
    """A leaf module as a function of its input: linear, norm (without residual) or embedding; its first output.

    `forward` is called past the module's hooks. With `columns`, that share of a fused linear's output.
    """

    def apply(value: Tensor) -> Tensor:
        if is_embedding(module):
            _check_ids(module, value)
        result = first_tensor(module.forward(value))
        assert result is not None
        return result if columns is None else result[..., columns[0] : columns[1]]

    return apply


def _check_ids(module: nn.Module, ids: Tensor) -> None:
    """Ids outside the table: an error here, where it is one request's; on a GPU the lookup itself would end them all."""
    size: Any = getattr(module, "org_vocab_size", None) or module.num_embeddings
    limit = int(size) - int(getattr(module, "offset", 0))
    if ids.is_floating_point():
        raise TypeError(f"an embedding takes integer ids, not {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
        raise IndexError(f"an embedding id is out of range: {int(ids.min())}..{int(ids.max())}, the table has {limit}")


def activation_of(module: nn.Module) -> Apply:
    """transformers' activation: it has no weights, so the tree's own serves."""

    def apply(value: Tensor) -> Tensor:
        result: Tensor = module(value)
        return result

    return apply


@dataclass(frozen=True)
class Head:
    """How a model computes logits: its processor, and what it gives the processor. `vocabulary` is unpadded."""

    processor: LogitsProcessor
    weights: nn.Module
    bias: Tensor | None
    width: int
    vocabulary: int
    dtype: torch.dtype

    def apply(self, value: Tensor) -> Tensor:
        """`lm_head` as a plain product, with its bias where it has one: no soft cap, no scale, no padded tokens."""
        logits = type(self.processor)._get_logits(self.processor, value, self.weights, self.bias)
        assert isinstance(logits, Tensor)
        return logits


def find_head(model: nn.Module, hidden: Tensor) -> Head:
    """What `compute_logits` hands to the processor, seen by calling it once on [rows, width]."""
    processor = next(module for module in model.modules() if isinstance(module, LogitsProcessor))
    found: list[Head] = []
    inner = processor._get_logits

    def watch(given: Tensor, weights: nn.Module, bias: Tensor | None, *rest: Any, **more: Any) -> Tensor | None:
        logits: Tensor | None = inner(given, weights, bias, *rest, **more)
        assert logits is not None
        found.append(Head(processor, weights, bias, given.shape[-1], logits.shape[-1], logits.dtype))
        return logits

    processor._get_logits = watch
    try:
        with torch.inference_mode():
            model.compute_logits(hidden)  # type: ignore[operator]
    finally:
        del processor._get_logits
    return found[0]


def run_plainly(module: nn.Module) -> None:
    """Let an activation run as written where vLLM compiled it on its own.

    Inside the model's compiled graph that changes nothing; called ad hoc, it saves a compilation in mid-step.
    """
    if isinstance(module, CustomOp) and getattr(module._forward_method, "__self__", None) is not module:
        module._forward_method = module.forward_native


def modules_to_run_plainly(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if is_gated(module))


def build_context(config: VllmConfig) -> AbstractContextManager[None]:
    """Around building a transformers model: vLLM's transformers backend has patched some of its classes."""
    context: AbstractContextManager[None] = set_current_vllm_config(config)
    return context


def forward_context(config: VllmConfig, num_tokens: int) -> AbstractContextManager[None]:
    """What a forward needs around it when it isn't a step: no attention metadata, no compiled code."""
    context: AbstractContextManager[None] = set_forward_context(None, config, num_tokens=num_tokens, skip_compiled=True)
    return context


def eager_forward(model: nn.Module, config: VllmConfig, num_tokens: int) -> Any:
    """One small forward outside any step, as vLLM's profiling does it: attention writes no cache."""
    device = next(model.parameters()).device
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_tokens, device=device)
    with forward_context(config, num_tokens):
        return model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
