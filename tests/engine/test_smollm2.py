"""The real model, compiled, in float32, against transformers with forward hooks, through the public interface.

Tolerances, of a value's largest element: 2e-5 for reads (5.6e-6 measured) and 2e-4 after an edit (9.8e-5 measured): float32
products are added in another order on both sides, and over 30 blocks an edit's rounding grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

READ, EDIT = 2e-5, 2e-4
PROMPT = "The Eiffel Tower is located in the city of"
BLOCKS = (0, 15, 29)


@pytest.fixture
def model(engines: Engines, smollm2: str) -> Iterator[VLLM]:
    engine = engines(smollm2)
    yield engine
    engine.check_integrity()


@pytest.fixture(scope="module")
def reference(smollm2: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager").eval()


def first(value: Any) -> torch.Tensor:
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value[0] if value.ndim == 3 or not value.is_floating_point() else value


def run_reference(
    model: VLLM, reference: Any, names: list[str], edits: dict[str, Callable[[Any], Any]]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        port = name.rpartition(".")[2]
        value = first(output if port == "output" else args[0] if args else next(iter(kwargs.values())))
        if name not in edits:
            seen[name] = value.clone()
            return None
        seen[name] = edits[name](value.clone())
        new = seen[name][None]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    for name in [*names, *edits]:
        path = name.rpartition(".")[0]
        module = reference.get_submodule(path)
        handles.append(module.register_forward_hook(lambda *given, name=name: keep(name, *given), with_kwargs=True))
    ids = torch.tensor([model.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        logits = reference(ids, use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return seen, logits


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0))


def test_sites_of_three_blocks_and_around_read_what_hooks_see(model: VLLM, reference: Any) -> None:
    modules = dict(reference.named_modules())
    blocks = tuple(f"model.layers.{i}." for i in BLOCKS)
    names = [
        site.name
        for site in model._tree.catalogue.sites
        if site.path in modules
        and not site.path.startswith("lm_head")
        and (site.name.startswith(blocks) or not site.name.startswith("model.layers."))
    ]
    assert len(names) > 80
    saved = {}
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        for name in names:
            path, _, port = name.rpartition(".")
            value = getattr(model.get(path), port)
            saved[name] = (value[0] if isinstance(value, tuple) else value).save()
        logits = model.logits.output.save()
    seen, expected = run_reference(model, reference, names, {})
    wrong = {name: error(saved[name].value, seen[name]) for name in names}
    assert {name: e for name, e in wrong.items() if not e < READ} == {}
    assert error(logits[0], expected) < READ


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.output",
        "model.layers.3.self_attn.q_proj.output",
        "model.layers.9.self_attn.output",
        "model.layers.15.mlp.act_fn.output",
        "model.layers.20.post_attention_layernorm.output",
        "model.layers.24.output",
        "model.norm.output",
    ],
)
def test_an_edit_has_the_effect_of_the_hook(model: VLLM, reference: Any, name: str) -> None:
    def edit(value: Any) -> Any:
        value[1:4] *= 0.5
        value[-1, ::3] += 0.1
        return value

    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        place = model.get(name.rpartition(".")[0]).output
        edit(place[0] if isinstance(place, tuple) else place)
        late = model.model.norm.output.save()
        logits = model.logits.output.save()
    watched = [] if name == "model.norm.output" else ["model.norm.output"]
    seen, expected = run_reference(model, reference, watched, {name: edit})
    assert error(late, seen["model.norm.output"]) < EDIT
    assert error(logits[0], expected) < EDIT
