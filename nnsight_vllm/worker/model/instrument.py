"""Put taps into a loaded model, before it is compiled, and report what graphs may touch.

In: vLLM's model, its configuration, which sites are wanted. Out: `Instrumented`, with the sites by name, the taps they
live on, and a fingerprint of both for vLLM's compile-cache key, which would otherwise ignore instrumentation.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.worker.layers.forwards import (
    Config,
    build_context,
    eager_forward,
    forward_context,
    run_activations_plainly,
)
from nnsight_vllm.worker.layers.head import Head, find_head
from nnsight_vllm.worker.layers.layer_kinds import first_tensor
from nnsight_vllm.worker.model import modules, taps
from nnsight_vllm.worker.model.hooks import install
from nnsight_vllm.worker.model.instrumented import Instrumented, Selection
from nnsight_vllm.worker.model.placement import Placement
from nnsight_vllm.worker.model.sites import Argument, Direct, Site, TensorSlice
from nnsight_vllm.worker.model.survey import survey

SURVEY_ROWS = 7
"""Rows of the surveying forward: few, and no usual size of another dimension."""

VERIFIED = frozenset(
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2"),
        *("opt", "phi3", "olmo2", "mixtral", "qwen3_moe", "granite"),
        *("starcoder2", "stablelm", "falcon", "cohere", "nemotron", "phi", "gptj", "olmo", "smollm3", "glm4"),
    ]
)
"""Model types whose every site was compared with transformers, reads, edits and calls. Tests do it for the first two lines."""

DIFFERENT = {
    "bloom": "vLLM puts the rows of its query_key_value in another order than Hugging Face",
    "gpt_neox": "vLLM puts the rows of its query_key_value in another order than Hugging Face",
}

_log = logging.getLogger(__name__)


def instrument(model: nn.Module, config: Config, selection: Selection = "all") -> Instrumented:
    """Survey the model, decide the taps, install them."""
    _require_known(config.model_config.hf_config.model_type)
    with build_context(config), forward_context(config, SURVEY_ROWS), torch.inference_mode():
        tree = modules.huggingface_tree(config.model_config.hf_config)
        reference = modules.firing_order(tree, SURVEY_ROWS)
    modules.unshare(model)
    run_activations_plainly(model)
    watched = survey(model, lambda: eager_forward(model, config, SURVEY_ROWS), SURVEY_ROWS)
    matched = modules.match(tree, model)
    raw = modules.raw_modules(matched, model)
    blocks = modules.blocks(tree)
    selected = _selector(selection, [*matched, *raw], blocks)
    hidden = first_tensor(watched.output)
    assert hidden is not None
    head = find_head(model, hidden)
    placement = Placement(matched, raw, blocks, model, watched, reference, selected)
    placement.walk()
    install(model, placement.taps)
    sites = list(placement.sites)
    if selected("lm_head"):
        sites += _head_sites(head, placement.next_tap, len(sites))
    return Instrumented(
        model=model,
        config=config,
        selection=selection,
        modules=matched,
        raw=raw,
        blocks=blocks,
        sites={site.info.name: site for site in sites},
        refusals=placement.refusals,
        selected=selected,
        num_taps=len(placement.taps),
        logits_taps=frozenset({placement.next_tap}),
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


def _head_sites(head: Head, tap: int, order: int) -> list[Site]:
    """`lm_head`'s input and output, on a tap outside the compiled graph."""
    head.tap(partial(taps.fire, tap))
    dtype = str(head.dtype).removeprefix("torch.")
    given, logits = TensorSlice(0), TensorSlice(1)
    before = SiteInfo("lm_head.input", "lm_head", "input", order, (None, head.width), dtype)
    after = SiteInfo("lm_head.output", "lm_head", "output", order + 1, (None, head.vocabulary), dtype)
    return [Argument(before, tap, given, logits, head.apply), Direct(after, tap, logits)]


def _fingerprint(placement: Placement, sites: list[Site]) -> str:
    text = repr(placement.taps)
    text += repr([(site.info.name, site.tap) for site in sites])
    return hashlib.sha256(text.encode()).hexdigest()
