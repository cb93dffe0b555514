"""Ad hoc calls: apply one module of the model to a value, in Hugging Face's terms.

A call bypasses the sites, passes no residual, never modifies its argument and takes any leading dimensions. The
argument is cast to the module's own dtype (activations take any): `lm_head(norm(h))` works on a float32 value too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.wire.limits import DEFAULT, Limits
from nnsight_vllm.worker.layers import layer_kinds
from nnsight_vllm.worker.layers.forwards import forward_context
from nnsight_vllm.worker.layers.functions import Apply, function_of, widths_of
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.instrumented import Instrumented
from nnsight_vllm.worker.model.modules import HFModule
from nnsight_vllm.worker.ops.cost import ELEMENT, Cost
from nnsight_vllm.worker.ops.guard import Guard

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # weights that aren't quantized
_STATEFUL = "{path} can't be called ad hoc: attention reads the request's cache, which only a step of the engine has"
_CONTAINER = "{path} can't be called ad hoc: it runs attention, or other modules that do"
_ABSENT = "{path} can't be called ad hoc: vLLM has no such module on its own"
_RAW = "{path} can't be called ad hoc: it is vLLM's own; call the Hugging Face modules beside it"


@dataclass(frozen=True)
class Facts:
    """How a module can be called: last dimension in and out (None: any, or an index tensor), its dtype."""

    refusal: str = ""
    width_in: int | None = None
    width_out: int | None = None
    dtype: str = ""


class Calls:
    """The modules of one instrumented model as functions."""

    def __init__(self, model: Instrumented, limits: Limits = DEFAULT) -> None:
        self.model = model
        self._guard = Guard(limits)

    def call(self, path: str, args: list[Tensor]) -> Tensor:
        """Apply the module at `path` to its one argument [..., width]."""
        facts = self.facts(path)
        if facts.refusal:
            raise RefusedError(facts.refusal)
        if len(args) != 1:
            raise RefusedError(f"{path} takes one tensor, not {len(args)}")
        value = args[0]
        if facts.dtype and value.is_floating_point() == (facts.dtype != "int64"):
            value = value.to(getattr(torch, facts.dtype))
        self._guard.judge(f"{path}(...)", self._cost(path, value, facts))
        with taps.suspended(), torch.inference_mode():
            return self._run(path, value.clone(), facts)

    def _cost(self, path: str, value: Tensor, facts: Facts) -> Cost:
        """Each row meets each weight once, and makes as many elements on the way as the weights have rows."""
        if facts.width_in is None:
            elements = value.numel() * (facts.width_out or 1)
            return Cost(elements * 8, ELEMENT * elements)
        rows, width = value.numel() // max(1, facts.width_in), max(1, facts.width_in)
        num_weights = sum(weight.numel() for weight in self.model.modules[path].module.parameters())
        return Cost(rows * max(width, num_weights // width) * value.element_size(), 2 * rows * num_weights)

    def facts(self, path: str) -> Facts:
        """Whether and how the module at `path` can be called."""
        hf = self.model.modules.get(path)
        if hf is None:
            return Facts(_RAW.format(path=path))
        refusal = self._refusal(hf)
        return Facts(refusal) if refusal else self._signature(hf)

    def _refusal(self, hf: HFModule) -> str:
        if hf.path == "lm_head" or layer_kinds.is_activation(hf.module):
            return ""
        if layer_kinds.is_attention(hf.module):
            return _STATEFUL.format(path=hf.path)
        if not hf.path or hf.path in self.model.blocks:
            return _CONTAINER.format(path=hf.path or "the model")
        if hf.host is None or layer_kinds.is_experts(hf.module):
            return _ABSENT.format(path=hf.path)
        if layer_kinds.is_leaf(self.model.host_of(hf), hf.module):
            return ""
        inside = [other for path, other in self.model.modules.items() if path.startswith(f"{hf.path}.")]
        feeds_forward = any(layer_kinds.is_linear(self.model.host_of(other)) for other in inside if other.host)
        holds_attention = any(layer_kinds.is_attention(other.module) for other in inside)
        return "" if feeds_forward and not holds_attention else _CONTAINER.format(path=hf.path)

    def _signature(self, hf: HFModule) -> Facts:
        """Of a module that can be called."""
        config, head = self.model.config.model_config, self.model.head
        if hf.path == "lm_head":
            return Facts("", head.width, head.vocabulary, str(config.dtype).removeprefix("torch."))
        if layer_kinds.is_activation(hf.module):
            return Facts()
        host, hidden = self.model.host_of(hf), config.get_hidden_size()
        width_in, width_out = widths_of(host, hf.module) or (hidden, hidden)
        width_out = width_out if hf.columns is None else hf.columns[1] - hf.columns[0]
        weight = next(host.parameters(), None)
        dtype = weight.dtype if weight is not None and weight.dtype in _PLAIN else config.dtype
        dtype = torch.int64 if layer_kinds.is_embedding(host) else dtype
        return Facts("", width_in, width_out, str(dtype).removeprefix("torch."))

    def _run(self, path: str, value: Tensor, facts: Facts) -> Tensor:
        hf = self.model.modules[path]
        apply = self._apply(hf)
        if facts.width_in is None:
            return self._scale(hf, apply(value))
        leading = value.shape[:-1]
        if value.shape[-1] != facts.width_in:
            raise RefusedError(f"{path} takes [..., {facts.width_in}], not {list(value.shape)}")
        result = apply(value.reshape(-1, facts.width_in))
        return result.reshape(*leading, result.shape[-1])

    def _apply(self, hf: HFModule) -> Apply:
        if hf.path == "lm_head":
            return self.model.head.apply
        if layer_kinds.is_activation(hf.module):
            return hf.module
        host = self.model.host_of(hf)
        return self._block_of(host) if any(hf.module.children()) else function_of(host, hf.columns)

    def _block_of(self, host: nn.Module) -> Apply:
        """An MLP or a mixture: vLLM's own forward, with a forward's context around it."""

        def apply(value: Tensor) -> Tensor:
            with forward_context(self.model.config, value.shape[0]):
                return function_of(host)(value)

        return apply

    def _scale(self, hf: HFModule, value: Tensor) -> Tensor:
        """Gemma's embedding scales inside in Hugging Face's model and outside in vLLM's."""
        scale = getattr(hf.module, "scalar_embed_scale", None)
        return value if scale is None else value * torch.tensor(scale, dtype=value.dtype, device=value.device)
