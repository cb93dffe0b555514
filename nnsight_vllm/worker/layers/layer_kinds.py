"""What kind of layer a module of vLLM's or of Hugging Face's model is, by its class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

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
