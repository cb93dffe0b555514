"""Hugging Face's module tree, and where each of its modules lives in vLLM's model.

The tree is transformers' own, built on the meta device from the checkpoint's configuration: names, classes and what
they print come from there. A module is found in vLLM's model under the same path, under another name (`ALIASES`), or
as some columns of a fused linear (`packed_modules_mapping`).
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnsight_vllm.errors import EngineSettingError

ALIASES: dict[str, tuple[str, ...]] = {
    "mlp": ("block_sparse_moe",),
    "activation_fn": ("act_fn",),
}
"""Name of a Hugging Face module -> names that vLLM's models give it where they differ."""

_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@dataclass(frozen=True)
class Part:
    """One module of Hugging Face's tree and its place in vLLM's model.

    `host` is the vLLM path of the module that computes it, None where there is none. `columns` are its share of the
    host's output where vLLM fused several linears into one.
    """

    path: str
    module: nn.Module
    host: str | None
    columns: tuple[int, int] | None = None


def huggingface_tree(config: Any) -> nn.Module:
    """transformers' model for this configuration, without weights."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            tree: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise EngineSettingError(f"transformers has no causal language model for this checkpoint: {error}") from error
    return tree.eval()


def match(tree: nn.Module, model: nn.Module) -> dict[str, Part]:
    """Hugging Face path -> its part, parents first."""
    hosts = dict(model.named_modules(remove_duplicate=False))
    packed: dict[str, list[str]] = {**_PACKED, **getattr(model, "packed_modules_mapping", {})}
    parts: dict[str, Part] = {}
    for path, module in tree.named_modules():
        parts[path] = _find(path, module, parts, hosts, packed)
    return parts


def raw_modules(parts: dict[str, Part], model: nn.Module) -> dict[str, str]:
    """vLLM's own modules beside Hugging Face's: the path that users write -> vLLM's path.

    Only children of modules that both have, and only under names that Hugging Face doesn't use there.
    """
    hosted = {part.host for part in parts.values() if part.columns is None}
    found = {}
    for path, part in parts.items():
        if part.host is None or part.columns is not None:
            continue
        for name, _ in model.get_submodule(part.host).named_children():
            host, alias = _join(part.host, name), _join(path, name)
            if host not in hosted and alias not in parts:
                found[alias] = host
    return found


def firing_order(tree: nn.Module, num_tokens: int) -> list[str]:
    """Paths in the order in which transformers' model runs them, as far as it runs without values (on meta)."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in tree.named_modules()
    ]
    try:
        mask = torch.zeros(1, 1, num_tokens, num_tokens, device="meta")
        ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
        tree(ids, attention_mask=mask, position_ids=ids, use_cache=False)
    except Exception:  # some models look at values (routing), which meta tensors don't have
        return order
    finally:
        for handle in handles:
            handle.remove()
    return order


def blocks(tree: nn.Module) -> list[str]:
    """Paths of the decoder blocks: the longest list of modules."""
    lists = [(path, module) for path, module in tree.named_modules() if isinstance(module, nn.ModuleList)]
    path, longest = max(lists, key=lambda found: len(found[1]))
    return [f"{path}.{i}" for i in range(len(longest))]


def unshare(model: nn.Module) -> None:
    """Give each place its own copy of a shared module without weights.

    vLLM hands one activation object to all layers; a hook on it couldn't tell them apart. It hands the same one to a later
    model of this process, so no place keeps the original. Modules with buffers (rotary tables) stay shared: they are large.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and _is_bare(child)
    ]
    count = Counter(id(child) for _, _, child in places)
    for parent, name, child in places:
        if count[id(child)] > 1:
            setattr(parent, name, _twin(child))


def _is_bare(module: nn.Module) -> bool:
    """No weights, no buffers, nothing below."""
    return not list(module.children()) and not list(module.parameters()) and not list(module.buffers())


def _twin(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    for name, value in list(vars(twin).items()):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            setattr(twin, name, copy.copy(value))
    return twin


def _find(path: str, module: nn.Module, parts: dict[str, Part], hosts: dict[str, nn.Module], packed: Any) -> Part:
    parent, _, name = path.rpartition(".")
    if not path:
        return Part(path, module, "")
    above = parts[parent].host
    if above is None:
        return Part(path, module, None)
    for candidate in (name, *ALIASES.get(name, ())):
        if _join(above, candidate) in hosts:
            return Part(path, module, _join(above, candidate))
    for fused, names in packed.items():
        host = hosts.get(_join(above, fused))
        if name in names and host is not None:
            return Part(path, module, _join(above, fused), _columns(host, names.index(name)))
    return Part(path, module, None)


def _columns(fused: nn.Module, index: int) -> tuple[int, int]:
    sizes = [size // getattr(fused, "tp_size", 1) for size in fused.output_sizes]  # type: ignore[union-attr]
    return sum(sizes[:index]), sum(sizes[: index + 1])


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
