"""Put taps into a loaded model, before it is compiled, and report what graphs may touch.

In: vLLM's model, its configuration, which sites are wanted. Out: `Instrumented`, with the sites by name, the taps they
live on, and a fingerprint of both for vLLM's compile-cache key, which would otherwise ignore instrumentation.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.graph.catalogue import Catalogue, SiteInfo
from nnsight_vllm.worker.layers import views
from nnsight_vllm.worker.model import modules, taps
from nnsight_vllm.worker.model.catalogue import describe
from nnsight_vllm.worker.model.hooks import install, wrap_head
from nnsight_vllm.worker.model.modules import Part
from nnsight_vllm.worker.model.placement import Placement
from nnsight_vllm.worker.model.sites import Argument, Direct, Site, TensorSlice
from nnsight_vllm.worker.model.survey import survey

SURVEY_ROWS = 7
"""Rows of the surveying forward: few, and no usual size of another dimension."""

Selection = str | list[str]

VERIFIED = frozenset(
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "opt",
        "phi3",
        "olmo2",
        "mixtral",
        "qwen3_moe",
        "granite",
        "starcoder2",
        "stablelm",
        "falcon",
        "cohere",
        "nemotron",
        "phi",
        "gptj",
        "olmo",
        "smollm3",
        "glm4",
    ]
)
"""Model types whose every site was compared with transformers, reads, edits and calls. Tests do it for the first line."""

DIFFERENT = {
    "bloom": "vLLM puts the rows of its query_key_value in another order than Hugging Face",
    "gpt_neox": "vLLM puts the rows of its query_key_value in another order than Hugging Face",
}

_log = logging.getLogger(__name__)


@dataclass
class Instrumented:
    """A model with taps. `logits_taps` fire outside the model's forward, on rows that get logits."""

    model: nn.Module
    config: VllmConfig
    selection: Selection
    parts: dict[str, Part]
    raw: dict[str, str]
    blocks: list[str]
    sites: dict[str, Site]
    refusals: dict[str, str]
    selected: Callable[[str], bool]
    num_taps: int
    logits_taps: frozenset[int]
    head: views.Head
    fingerprint: str

    def probe(self, run: Callable[[], None]) -> Catalogue:
        """The catalogue, from one real forward: `run` does it. Sites whose tap stays silent are dropped and refused."""
        seen: dict[str, Tensor] = {}
        by_tap: dict[int, list[Site]] = {}
        for site in self.sites.values():
            by_tap.setdefault(site.tap, []).append(site)
        taps.ACTIVE.update({tap: _recorder(served, seen) for tap, served in by_tap.items()})
        try:
            run()
        finally:
            for tap in by_tap:
                taps.ACTIVE.pop(tap, None)
        failures = taps.take_failures()
        if failures:
            raise failures[0]
        self._settle(seen)
        return describe(self)

    def _settle(self, seen: dict[str, Tensor]) -> None:
        orders = [self.sites[name].info.order for name in seen]
        assert orders == sorted(orders), "taps fired in another order than their sites have"
        for name, site in list(self.sites.items()):
            if name in seen:
                value = seen[name]
                site.info = msgspec.structs.replace(
                    site.info, shape=(None, *value.shape[1:]), dtype=str(value.dtype).removeprefix("torch.")
                )
            elif site.tap not in self.logits_taps:
                del self.sites[name]
                self.refusals[name] = f"{site.info.path} didn't run in the engine's probing forward"


def instrument(model: nn.Module, config: VllmConfig, selection: Selection = "all") -> Instrumented:
    """Survey the model, decide the taps, install them."""
    _require_known(config.model_config.hf_config.model_type)
    with views.build_context(config), views.forward_context(config, SURVEY_ROWS), torch.inference_mode():
        tree = modules.huggingface_tree(config.model_config.hf_config)
        reference = modules.firing_order(tree, SURVEY_ROWS)
    modules.unshare(model)
    for activation in views.modules_to_run_plainly(model):
        views.run_plainly(activation)
    watched = survey(model, lambda: views.eager_forward(model, config, SURVEY_ROWS), SURVEY_ROWS)
    parts = modules.match(tree, model)
    raw = modules.raw_modules(parts, model)
    blocks = modules.blocks(tree)
    selected = _selector(selection, [*parts, *raw], blocks)
    hidden = views.first_tensor(watched.output)
    assert hidden is not None
    head = views.find_head(model, hidden)
    placement = Placement(parts, raw, blocks, model, watched, reference, selected)
    placement.walk()
    install(model, placement.taps)
    sites = list(placement.sites)
    if selected("lm_head"):
        sites += _head_sites(head, placement.numbers, len(sites))
    return Instrumented(
        model=model,
        config=config,
        selection=selection,
        parts=parts,
        raw=raw,
        blocks=blocks,
        sites={site.info.name: site for site in sites},
        refusals=placement.refusals,
        selected=selected,
        num_taps=len(placement.taps),
        logits_taps=frozenset({placement.numbers}),
        head=head,
        fingerprint=_fingerprint(placement, sites),
    )


def _require_known(kind: str) -> None:
    if kind in DIFFERENT:
        raise EngineSettingError(f"sites of a {kind} model would be wrong: {DIFFERENT[kind]}")
    if kind not in VERIFIED:
        _log.warning("sites of a %s model were never compared with transformers; verified: %s", kind, sorted(VERIFIED))


def _selector(selection: Selection, paths: list[str], blocks: list[str]) -> Callable[[str], bool]:
    if selection == "all":
        return lambda path: True
    if selection == "blocks":
        main = {*blocks, "lm_head", *_stems(paths, blocks)}
        return lambda path: path in main
    if isinstance(selection, str):
        raise EngineSettingError(f"sites must be 'all', 'blocks' or a list of patterns, not {selection!r}")
    patterns = list(selection)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise EngineSettingError(
                f"sites={patterns!r}: the pattern {pattern!r} matches no module of this model; {blocks[0]!r} is one"
            )
    return lambda path: any(fnmatchcase(path, pattern) for pattern in patterns)


def _stems(paths: list[str], blocks: list[str]) -> list[str]:
    """Embeddings, final norm and base models: what stands beside or above the list of blocks."""
    home = blocks[0].rpartition(".")[0].rpartition(".")[0]
    return [path for path in paths if path and (path.rpartition(".")[0] == home or f"{home}.".startswith(f"{path}."))]


def _head_sites(head: views.Head, tap: int, order: int) -> list[Site]:
    """`lm_head`'s input and output, on a tap outside the compiled graph."""
    wrap_head(head.processor, tap)
    dtype = str(head.dtype).removeprefix("torch.")
    given, logits = TensorSlice(0), TensorSlice(1)
    before = SiteInfo("lm_head.input", "lm_head", "input", order, (None, head.width), dtype)
    after = SiteInfo("lm_head.output", "lm_head", "output", order + 1, (None, head.vocabulary), dtype)
    return [Argument(before, tap, given, logits, head.apply), Direct(after, tap, logits)]


def _recorder(served: list[Site], seen: dict[str, Tensor]) -> taps.Handler:
    def record(tensors: taps.Tensors) -> None:
        for site in served:
            seen.setdefault(site.info.name, site.read(tensors, slice(0, 1)))

    return record


def _fingerprint(placement: Placement, sites: list[Site]) -> str:
    text = repr([tap for tap in placement.taps])
    text += repr([(site.info.name, site.tap) for site in sites])
    return hashlib.sha256(text.encode()).hexdigest()
