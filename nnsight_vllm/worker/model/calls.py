"""Ad hoc calls: apply one module of the model to a value, in Hugging Face's terms.

A call bypasses the sites, passes no residual, never modifies its argument and takes any leading dimensions. The
argument is cast to the module's own dtype (activations take any): `lm_head(norm(h))` works on a float32 value too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.wire.limits import DEFAULT, Limits
from nnsight_vllm.worker.layers import views
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.modules import Part
from nnsight_vllm.worker.model.sites import Apply
from nnsight_vllm.worker.ops.cost import ELEMENT, Cost
from nnsight_vllm.worker.ops.guard import Guard

if TYPE_CHECKING:
    from nnsight_vllm.worker.model.instrument import Instrumented

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
        num_weights = sum(weight.numel() for weight in self.model.parts[path].module.parameters())
        return Cost(rows * max(width, num_weights // width) * value.element_size(), 2 * rows * num_weights)

    def facts(self, path: str) -> Facts:
        """Whether and how the module at `path` can be called."""
        part = self.model.parts.get(path)
        if part is None:
            return Facts(_RAW.format(path=path))
        refusal = self._refusal(part)
        if refusal:
            return Facts(refusal)
        width_in, width_out = self._widths(part)
        return Facts("", width_in, width_out, self._dtype(part))

    def _refusal(self, part: Part) -> str:
        module = part.module
        if part.path == "lm_head" or views.is_activation(module):
            return ""
        if not part.path or views.is_attention(module) or part.path in self.model.blocks:
            return (_STATEFUL if views.is_attention(module) else _CONTAINER).format(path=part.path or "the model")
        if part.host is None or views.is_experts(module):
            return _ABSENT.format(path=part.path)
        host = self.model.model.get_submodule(part.host)
        if views.is_linear(host) or views.is_norm(host) or views.is_embedding(host):
            return ""
        inside = [p for p in self.model.parts.values() if p.path.startswith(f"{part.path}.")]
        feeds_forward = any(views.is_linear(self.model.model.get_submodule(p.host)) for p in inside if p.host)
        holds_attention = any(views.is_attention(p.module) for p in inside)
        return "" if feeds_forward and not holds_attention else _CONTAINER.format(path=part.path)

    def _widths(self, part: Part) -> tuple[int | None, int | None]:
        if part.path == "lm_head":
            return self.model.head.width, self.model.head.vocabulary
        if views.is_activation(part.module):
            return None, None
        assert part.host is not None
        host = self.model.model.get_submodule(part.host)
        if views.is_embedding(host):
            return None, int(host.embedding_dim)  # type: ignore[arg-type]
        if views.is_linear(host):
            width = part.columns[1] - part.columns[0] if part.columns else int(host.output_size)  # type: ignore[arg-type]
            return int(host.input_size), width  # type: ignore[arg-type]
        if views.is_norm(host):
            weight = next(host.parameters(), None)
            shape: Any = part.module.normalized_shape if weight is None else weight.shape
            return shape[-1], shape[-1]
        width = self.model.config.model_config.get_hidden_size()
        return width, width

    def _dtype(self, part: Part) -> str:
        if views.is_activation(part.module):
            return ""
        if part.path == "lm_head":
            return str(self.model.config.model_config.dtype).removeprefix("torch.")
        assert part.host is not None
        host = self.model.model.get_submodule(part.host)
        if views.is_embedding(host):
            return "int64"
        weight = next(host.parameters(), None)
        floating = weight is not None and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        dtype = weight.dtype if weight is not None and floating else self.model.config.model_config.dtype
        return str(dtype).removeprefix("torch.")

    def _run(self, path: str, value: Tensor, facts: Facts) -> Tensor:
        part = self.model.parts[path]
        apply = self._apply(part)
        if facts.width_in is None:
            return self._scale(part, apply(value))
        leading = value.shape[:-1]
        if value.shape[-1] != facts.width_in:
            raise RefusedError(f"{path} takes [..., {facts.width_in}], not {list(value.shape)}")
        result = apply(value.reshape(-1, facts.width_in))
        return result.reshape(*leading, result.shape[-1])

    def _apply(self, part: Part) -> Apply:
        if part.path == "lm_head":
            return self.model.head.apply
        if views.is_activation(part.module):
            return views.activation_of(part.module)
        assert part.host is not None
        host = self.model.model.get_submodule(part.host)
        if any(part.module.children()):
            return self._block_of(host)
        return views.columns_of(host, part.columns)

    def _block_of(self, host: nn.Module) -> Apply:
        """An MLP or a mixture: vLLM's own forward, with a forward's context around it."""

        def apply(value: Tensor) -> Tensor:
            with views.forward_context(self.model.config, value.shape[0]):
                result = views.first_tensor(host.forward(value))
            assert result is not None
            return result

        return apply

    def _scale(self, part: Part, value: Tensor) -> Tensor:
        """Gemma's embedding scales inside in Hugging Face's model and outside in vLLM's."""
        scale = getattr(part.module, "scalar_embed_scale", None)
        return value if scale is None else value * torch.tensor(scale, dtype=value.dtype, device=value.device)
