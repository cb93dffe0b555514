"""How a model computes its logits: vLLM's processor of them, and what the model gives to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor


@dataclass(frozen=True)
class Head:
    """The processor and its arguments. `vocabulary` is unpadded."""

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

    def tap(self, fire: Callable[[tuple[Tensor, Tensor]], None]) -> None:
        """Call `fire` with the head's input and output, on every computation of logits from now on."""
        _watch(self.processor, lambda given, weights, bias, logits: fire((given, logits)))


def find_head(model: nn.Module, hidden: Tensor) -> Head:
    """What `compute_logits` hands to the processor, seen by calling it once on [rows, width]."""
    processor = next(module for module in model.modules() if isinstance(module, LogitsProcessor))
    found: list[Head] = []

    def look(given: Tensor, weights: nn.Module, bias: Tensor | None, logits: Tensor) -> None:
        found.append(Head(processor, weights, bias, given.shape[-1], logits.shape[-1], logits.dtype))

    _watch(processor, look)
    try:
        with torch.inference_mode():
            model.compute_logits(hidden)  # type: ignore[operator]
    finally:
        del processor._get_logits
    return found[0]


def _watch(processor: LogitsProcessor, look: Callable[[Tensor, nn.Module, Tensor | None, Tensor], None]) -> None:
    inner = processor._get_logits

    def get_logits(given: Tensor, weights: nn.Module, bias: Tensor | None, *rest: Any, **more: Any) -> Tensor | None:
        logits: Tensor | None = inner(given, weights, bias, *rest, **more)
        if logits is not None:
            look(given, weights, bias, logits)
        return logits

    processor._get_logits = get_logits
