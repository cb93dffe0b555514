"""Describe an instrumented model to the client: its module tree, its sites, and a reason for all that is refused."""

from __future__ import annotations

from torch import nn

from nnsight_vllm.graph.catalogue import Catalogue, ModuleInfo
from nnsight_vllm.worker.layers.layer_kinds import is_experts
from nnsight_vllm.worker.model.calls import Calls
from nnsight_vllm.worker.model.instrumented import Instrumented
from nnsight_vllm.worker.model.modules import HFModule

_PORTS = ("input", "output")
_ROTARY = (
    "one rotary embedding serves every layer, so it fires many times in one forward; "
    "read q_proj.output or k_proj.output of a layer"
)
_ABSENT = "vLLM has no such module"
_DROPOUT = "dropout does nothing when serving, and vLLM has no such module; use the module before it"
_EXPERT = "vLLM computes all experts in one fused operation; use the mixture's own .input and .output, or its router"
_LIST = "a list of modules doesn't run by itself; index it"
_RAW = "vLLM's own module, called with vLLM's own arguments; use the Hugging Face modules beside it"
_UNKNOWN = "vLLM computes it in a way that can't be told in Hugging Face's terms"
_BASE_INPUT = "vLLM compiles the base model as a whole; use the embedding's input, or the first block's"
_ROOT = {"input": "vLLM's own arguments; use the embedding's input", "output": "use model.logits.output"}


def describe(model: Instrumented) -> Catalogue:
    """The catalogue, modules in tree order, sites in firing order."""
    calls = Calls(model)
    config = model.config
    return Catalogue(
        modules=[_module(model, calls, path) for path in _tree_order(model)],
        sites=sorted((site.info for site in model.sites.values()), key=lambda info: info.order),
        vocab_size=config.model_config.get_vocab_size(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        max_model_len=config.model_config.max_model_len,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        instrumented=model.selection if isinstance(model.selection, str) else ", ".join(model.selection),
    )


def _tree_order(model: Instrumented) -> list[str]:
    """Hugging Face's order, vLLM's own modules after their Hugging Face siblings."""
    children: dict[str, list[str]] = {}
    for path in filter(None, [*model.modules, *model.raw]):
        children.setdefault(path.rpartition(".")[0], []).append(path)
    order: list[str] = []

    def visit(path: str) -> None:
        order.append(path)
        for child in children.get(path, []):
            visit(child)

    visit("")
    return order


def _module(model: Instrumented, calls: Calls, path: str) -> ModuleInfo:
    hf = model.modules.get(path)
    module = hf.module if hf is not None else model.model.get_submodule(model.raw[path])
    refusals = {port: _refusal(model, path, hf, port) for port in _PORTS if f"{path}.{port}" not in model.sites}
    facts = calls.facts(path)
    return ModuleInfo(
        path=path,
        kind=type(module).__name__,
        detail=module.extra_repr(),
        refusals=refusals,
        refuse_call=facts.refusal,
        call_in=facts.width_in,
        call_out=facts.width_out,
        call_dtype=facts.dtype,
    )


def _refusal(model: Instrumented, path: str, hf: HFModule | None, port: str) -> str:
    """Why there is no such site."""
    if f"{path}.{port}" in model.refusals:
        return model.refusals[f"{path}.{port}"]
    if not path:
        return _ROOT[port]
    if hf is None:
        return _RAW
    if isinstance(hf.module, nn.ModuleList):
        return _LIST
    if isinstance(hf.module, nn.Dropout):
        return _DROPOUT
    if "Rotary" in type(hf.module).__name__:
        return _ROTARY
    if (is_experts(hf.module) and port == "input") or _is_in_experts(model, path):
        return _EXPERT
    if hf.host is None:
        return _ABSENT
    if port == "input" and any(block.startswith(f"{path}.") for block in model.blocks):
        return _BASE_INPUT
    if model.selected(path):
        return _UNKNOWN
    return f"not instrumented in this engine (sites={model.selection!r}); start it with sites='all' or a list with {path!r}"


def _is_in_experts(model: Instrumented, path: str) -> bool:
    parent = path.rpartition(".")[0]
    return parent in model.modules and is_experts(model.modules[parent].module)
