"""Hugging Face's module tree, and where each of its modules lives in vLLM's model.

The tree is transformers' own, built on the meta device from the checkpoint's configuration: names, classes and what
they print come from there.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.worker.layers.functions import Columns
from nnsight_vllm.worker.layers.hosts import Hosts, join


@dataclass(frozen=True)
class HFModule:
    """One module of Hugging Face's tree and its place in vLLM's model.

    `host` is the vLLM path of the module that computes it, None where there is none. `columns` are its share of the
    host's output where vLLM fused several linears into one.
    """

    path: str
    module: nn.Module
    host: str | None
    columns: Columns | None = None


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


def match(tree: nn.Module, model: nn.Module) -> dict[str, HFModule]:
    """Hugging Face path -> its module there and its host, parents first."""
    hosts = Hosts(model)
    found = {"": HFModule("", tree, "")}
    for path, module in tree.named_modules():
        if path:
            parent, _, name = path.rpartition(".")
            found[path] = HFModule(path, module, *hosts.find(found[parent].host, name))
    return found


def raw_modules(modules: dict[str, HFModule], model: nn.Module) -> dict[str, str]:
    """vLLM's own modules beside Hugging Face's: the path that users write -> vLLM's path.

    Only children of modules that both have, and only under names that Hugging Face doesn't use there.
    """
    hosted = {hf.host for hf in modules.values() if hf.columns is None}
    children = (pair for hf in modules.values() for pair in _children_of_host(hf, model))
    return {path: host for path, host in children if host not in hosted and path not in modules}


def _children_of_host(hf: HFModule, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Below its Hugging Face path, and below its host."""
    if hf.host is not None and hf.columns is None:
        for name, _ in model.get_submodule(hf.host).named_children():
            yield join(hf.path, name), join(hf.host, name)


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
