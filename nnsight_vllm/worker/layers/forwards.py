"""Running vLLM's model, or a block of it, outside a step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import CustomOp

from nnsight_vllm.worker.layers.layer_kinds import is_gated

Config: TypeAlias = VllmConfig


def build_context(config: Config) -> AbstractContextManager[None]:
    """Around building a transformers model: vLLM's transformers backend has patched some of its classes."""
    context: AbstractContextManager[None] = set_current_vllm_config(config)
    return context


def forward_context(config: Config, num_tokens: int) -> AbstractContextManager[None]:
    """What a forward needs around it when it isn't a step: no attention metadata, no compiled code."""
    context: AbstractContextManager[None] = set_forward_context(None, config, num_tokens=num_tokens, skip_compiled=True)
    return context


def eager_forward(model: nn.Module, config: Config, num_tokens: int) -> Any:
    """One small forward outside any step, as vLLM's profiling does it: attention writes no cache."""
    device = next(model.parameters()).device
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_tokens, device=device)
    with forward_context(config, num_tokens):
        return model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)


def run_activations_plainly(model: nn.Module) -> None:
    """Let gated activations run as written where vLLM compiled them on their own.

    Inside the model's compiled graph that changes nothing; called ad hoc, it saves a compilation in mid-step.
    """
    for module in filter(is_gated, model.modules()):
        if isinstance(module, CustomOp) and getattr(module._forward_method, "__self__", None) is not module:
            module._forward_method = module.forward_native
