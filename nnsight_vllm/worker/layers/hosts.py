"""Where vLLM's model has what Hugging Face calls by a name: under it, under another one, or as columns of a fused linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nnsight_vllm.worker.layers.functions import Columns

ALIASES: dict[str, tuple[str, ...]] = {
    "mlp": ("block_sparse_moe",),
    "activation_fn": ("act_fn",),
}
"""Name of a Hugging Face module -> names that vLLM's models give it where they differ."""

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Hosts:
    """vLLM's modules by path, and which of them are several of Hugging Face's in one."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._fused: Mapping[str, list[str]] = {**_FUSED, **getattr(model, "packed_modules_mapping", {})}

    def find(self, parent: str | None, name: str) -> tuple[str | None, Columns | None]:
        """The path of the host of `name` below the host `parent`, and its columns there; no path where there is none."""
        if parent is None:
            return None, None
        for candidate in (name, *ALIASES.get(name, ())):
            if join(parent, candidate) in self._modules:
                return join(parent, candidate), None
        for fused, names in self._fused.items():
            host = self._modules.get(join(parent, fused))
            if name in names and host is not None:
                return join(parent, fused), _columns(host, names.index(name))
        return None, None


def join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _columns(fused: Any, index: int) -> Columns:
    sizes = [size // getattr(fused, "tp_size", 1) for size in fused.output_sizes]
    return sum(sizes[:index]), sum(sizes[: index + 1])
