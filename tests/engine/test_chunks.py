"""Prompts longer than a step's token budget, against the same requests in an engine that computes them whole. Float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nv
from nnsight_vllm import edits
from nnsight_vllm.errors import AdmissionError

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

BUDGET = 64
BLOCK = 32
TOLERANCE = 2e-5  # of the largest value: other shapes, other sums
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
Program = Callable[["VLLM", Any], object]
Requests = list[tuple[list[int], Program | None]]


@pytest.fixture
def whole(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    model = engines(tiny_checkpoint("llama"), enforce_eager=True, block_size=BLOCK, max_model_len=256)
    assert model.llm.reset_prefix_cache()
    return model


@pytest.fixture
def cut(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    model = _cut(engines, tiny_checkpoint)
    assert model.llm.reset_prefix_cache()
    return model


def _cut(engines: Engines, tiny_checkpoint: Callable[[str], str], **more: Any) -> VLLM:
    return engines(
        tiny_checkpoint("llama"),
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=256,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=16,
        **more,
    )


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(10, 400), k=length)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(seed))


def nothing(model: VLLM, tracer: Any) -> object:
    return model.logits.output.save()


def adds_everywhere(model: VLLM, tracer: Any) -> object:
    with tracer.all():
        for layer in model.model.layers:
            layer.output[0][:] += 0.1 * vector(1)
    return None


def saves_sites(model: VLLM, tracer: Any) -> object:
    embedded = model.model.embed_tokens.output.save()
    first = [model.model.layers[0].self_attn.q_proj.output.save(), model.model.layers[0].mlp.down_proj.input.save()]
    return [embedded, *first, model.model.layers[1].output[0].save(), model.model.norm.output.save()]


def saves_the_last_row(model: VLLM, tracer: Any) -> object:
    return [
        model.model.layers[1].output[0][-1].save(),
        model.lm_head(model.model.norm(model.model.layers[2].output[0][-1:])).save(),
    ]


def edits_the_last_row(model: VLLM, tracer: Any) -> object:
    h = model.model.layers[1].output[0]
    h[-1] *= 10 / h[-1].norm()
    return [h.save(), model.logits.output.save()]


def edits_positions(model: VLLM, tracer: Any) -> object:
    h = model.model.layers[0].output[0]
    h[3] = vector(2)
    h[60:70] += vector(3)  # on both sides of a border
    h[100] *= 0.5
    h[-30:] *= 1.1
    after = h.save()
    part = model.model.layers[1].mlp.output[62:66].save()
    one = model.model.layers[1].mlp.output[63].save()
    return [after, part, one, model.logits.output.save()]


def edits_features(model: VLLM, tracer: Any) -> object:
    with tracer.all():
        edits.project_out(model.model.layers[0].output[0], vector(4))
        h = model.model.layers[1].output[0]
        gate = torch.relu(h @ vector(5))
        h += gate[:, None] * 0.01 * vector(6)
    return None


def keeps_top_features(model: VLLM, tracer: Any) -> object:
    h = model.model.layers[1].output[0]
    found = (h @ torch.stack([vector(i) for i in range(20, 40)], -1)).topk(3)
    return [found.values.save(), found.indices.save()]


def collects(model: VLLM, tracer: Any) -> object:
    rows, last, tokens = nv.list().save(), nv.list().save(), nv.list().save()
    with tracer.all():
        h = model.model.layers[0].output[0]
        h *= 1.05
        rows.append(h)
        last.append(model.model.layers[1].output[0][-1])
        tokens.append(model.samples.output)
    return [rows, last, tokens]


def edits_logits(model: VLLM, tracer: Any) -> object:
    with tracer.all():
        model.logits.output[:, 7:] -= 3.0
    return None


def branches(model: VLLM, tracer: Any) -> object:
    h = model.model.layers[0].output[0]
    with tracer.cond(h[-1].norm() > 0):
        h[-1] *= 2
    return [model.model.layers[1].output[0].save()]


def averages(model: VLLM, tracer: Any) -> object:
    h = model.model.layers[0].output[0]
    h += h.mean(0)
    return [model.model.layers[1].output[0].save()]


CUTTABLE: dict[str, Program] = {
    program.__name__: program
    for program in (
        nothing,
        adds_everywhere,
        saves_sites,
        saves_the_last_row,
        edits_the_last_row,
        edits_positions,
        edits_features,
        keeps_top_features,
        collects,
        edits_logits,
        branches,
    )
}


def run(model: VLLM, requests: Requests) -> list[tuple[list[int], object]]:
    """Tokens, and what was saved, of requests that run together."""
    saved, results = [], []
    with model.trace(**SAMPLING) as tracer:
        for ids, program in requests:
            with tracer.invoke(ids):
                saved.append(None if program is None else program(model, tracer))
                results.append(tracer.result.save())
    return [(result.token_ids, _values(one)) for result, one in zip(results, saved, strict=True)]


def _values(saved: Any) -> object:
    if isinstance(saved, list | tuple) or type(saved).__name__ == "ListProxy":
        return [_values(one) for one in saved]
    return getattr(saved, "value", saved)


def same(found: object, expected: object) -> None:
    if isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, float(expected.abs().max())))
    else:
        assert found == expected


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_long_prompt_in_pieces_gives_what_it_gives_whole(cut: VLLM, whole: VLLM, name: str) -> None:
    requests: Requests = [(prompt(1, 200), CUTTABLE[name])]
    same(run(cut, requests), run(whole, requests))
    cut.check_integrity()


def test_pieces_of_many_prompts_share_steps_with_plain_ones_and_with_prompts_that_are_whole(
    cut: VLLM, whole: VLLM
) -> None:
    lengths = [150, 20, 90, 33, 64, 130, 5, 70, 101, 40, 97, 60]
    programs: list[Program | None] = [*CUTTABLE.values(), None]
    requests: Requests = [
        (prompt(10 + i, length), program) for i, (length, program) in enumerate(zip(lengths, programs, strict=True))
    ]
    requests += [(prompt(30, 50), averages), (prompt(31, 120), edits_positions), (prompt(32, 64), averages)]
    expected = [run(whole, [request])[0] for request in requests]
    assert cut.llm.reset_prefix_cache()
    for found, alone in zip(run(cut, requests), expected, strict=True):
        same(found, alone)
    cut.check_integrity()


def test_what_needs_all_rows_at_once_is_refused_with_both_numbers(cut: VLLM) -> None:
    with (
        pytest.raises(
            AdmissionError, match=r"mean takes rows of the prompt together: it has 65 tokens.*is 64; .*test_chunks"
        ),
        cut.trace(prompt(1, 65), **SAMPLING) as tracer,
    ):
        averages(cut, tracer)
    cut.check_integrity()


def test_edits_and_caches_of_long_prompts_in_pieces_give_what_they_give_whole(cut: VLLM, whole: VLLM) -> None:
    found = []
    for model in (cut, whole):
        with model.edit() as edited:
            model.model.layers[0].output[0][:] += 0.1 * vector(1)
        with edited.edit() as edited:
            edits.project_out(edited.model.layers[0].output[0], vector(2))
        caches = []
        with edited.trace(**SAMPLING) as tracer:
            for i in range(3):
                with tracer.invoke(prompt(50 + i, 140 + i)):
                    cache = tracer.cache([model.model.layers[0], model.model.layers[1].mlp])
                    model.model.layers[1].output[0][-1] *= 1.5
                    caches.append((cache, tracer.result.save()))
        values = [[[v[0] for v in c.model.layers[0].output], c.model.layers[1].mlp.output] for c, _ in caches]
        found.append((values, [list(result.token_ids) for _, result in caches]))
        model.check_integrity()
    assert found[0][1] == found[1][1]
    assert [len(rows) for rows in found[0][0][0][0]] == [140, 1, 1, 1]
    same(found[0][0], found[1][0])


def test_edited_blocks_of_long_prompts_are_shared_between_requests_that_read_different_things(cut: VLLM) -> None:
    with cut.edit() as edited:
        cut.model.layers[0].output[0][:] += 0.1 * vector(1)
    ids = prompt(60, 150)

    def ask(model: VLLM, saves: bool) -> tuple[list[int], int]:
        with model.trace(ids, **SAMPLING) as tracer:
            if saves:
                model.model.layers[1].output[0][-1].save()
            result = tracer.result.save()
        return list(result.token_ids), result.num_cached_tokens or 0

    (tokens, first), (again, second), (_, clean) = ask(edited, False), ask(edited, True), ask(cut, False)
    assert (first, second, clean) == (0, 4 * BLOCK, 0) and tokens == again
