"""Evicted requests start again: their answers are those of requests that nobody disturbed. Float32, far too small a cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nv
from nnsight_vllm.errors import PreemptedError
from nnsight_vllm.frontend import listener
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.trace.backend import Sample

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

BLOCK = 32
NUM_TOKENS = 60
TOLERANCE = 2e-5  # other shapes, other sums
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
Program = Callable[["VLLM", Any], list[Any]]


@pytest.fixture
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    """Twelve blocks: four requests need sixteen in the end."""
    model = engines(
        tiny_checkpoint("llama"),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        num_gpu_blocks_override=12,
        block_size=BLOCK,
    )
    assert model.llm.reset_prefix_cache()
    return model


def prompts() -> list[list[int]]:
    return [random.Random(i).choices(range(10, 400), k=60 + i) for i in range(4)]


def saves_every_step(model: VLLM, tracer: Any) -> list[Any]:
    rows = nv.list().save()
    with tracer.all():
        rows.append(model.model.layers[1].output[0][-1])
    return [rows]


def edits_every_step(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.all():
        model.model.layers[0].output[0][:] += 0.1
    return []


def edits_the_last_row(model: VLLM, tracer: Any) -> list[Any]:
    h = model.model.layers[0].output[0]
    h[-1] *= 2
    return [h.save()]


def spreads_a_mean(model: VLLM, tracer: Any) -> list[Any]:
    h = model.model.layers[0].output[0]
    h += h.mean(0)
    return [model.model.layers[1].output[0].save()]


def carries_state(model: VLLM, tracer: Any) -> list[Any]:
    state = model.model.layers[0].output[0][-1].clone()
    sums = nv.list().save()
    with tracer.iter[1:]:
        h = model.model.layers[0].output[0]
        state += h[-1]
        h += state * 0.01
        sums.append(state.sum())
    return [sums]


def edits_logits(model: VLLM, tracer: Any) -> list[Any]:
    tops = nv.list().save()
    with tracer.all():
        scores = model.logits.output
        scores[:, 7] += 3.0
        tops.append(scores.topk(3).indices)
    return [tops]


def edits_tokens(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[5:20]:
        model.samples.output[0] = 11
    return []


def branches(model: VLLM, tracer: Any) -> list[Any]:
    taken = nv.list().save()
    with tracer.all():
        h = model.model.layers[1].output[0]
        with tracer.cond(h[-1].sum() > 0):
            h *= 0.5
            taken.append(h[-1].sum())
    return [taken]


def ends_early(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[50:]:
        last = model.model.layers[0].output[0][-1].save()
        tracer.stop()
    return [last]


def draws(model: VLLM, tracer: Any) -> list[Any]:
    noise = nv.list().save()
    with tracer.all():
        h = model.model.layers[0].output[0]
        h += torch.randn_like(h) * 0.01
        noise.append(h[-1])
    return [noise]


PROGRAMS = [
    pytest.param(saves_every_step, marks=pytest.mark.v2),
    pytest.param(edits_every_step, marks=pytest.mark.v2),
    edits_the_last_row,
    spreads_a_mean,
    carries_state,
    edits_logits,
    edits_tokens,
    branches,
    ends_early,
    draws,
]


def run(model: VLLM, program: Program, ids: list[list[int]]) -> list[tuple[list[int], list[Any]]]:
    found = []
    with model.trace(**SAMPLING, seed=3) as tracer:
        for prompt in ids:
            with tracer.invoke(prompt):
                saved = program(model, tracer)
                found.append((tracer.result.save(), saved))
    return [(list(result.token_ids), [proxy.value for proxy in saved]) for result, saved in found]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_an_evicted_request_answers_as_if_it_were_alone(model: VLLM, program: Program) -> None:
    before = model.stats().restarted
    together = run(model, program, prompts())
    assert model.stats().restarted > before
    for ids, (tokens, saved) in zip(prompts(), together, strict=True):
        assert model.llm.reset_prefix_cache()
        ((alone_tokens, alone),) = run(model, program, [ids])
        assert tokens == alone_tokens
        torch.testing.assert_close(saved, alone, rtol=0, atol=TOLERANCE * _largest(alone))
    model.check_integrity()


def _largest(values: list[Any]) -> float:
    tensors = [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]
    return max((float(tensor.abs().max()) for tensor in tensors), default=1.0)


def test_logs_come_once(model: VLLM, capsys: pytest.CaptureFixture[str]) -> None:
    with model.trace(**SAMPLING) as tracer:
        for i, ids in enumerate(prompts()):
            with tracer.invoke(ids):
                with tracer.iter[NUM_TOKENS - 2 :]:
                    model.model.layers[0].output[0][:] += 0.1
                    tracer.log(f"end of {i}")
    assert sorted(tracer.logs) == [f"end of {i // 2}" for i in range(8)]
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_several_samples_of_a_request_start_again_together(model: VLLM) -> None:
    before = model.stats().restarted
    with model.trace(**{**SAMPLING, "temperature": 1.0}, n=2, seed=0) as tracer:
        results = []
        for ids in prompts()[:2]:
            with tracer.invoke(ids):
                rows = saves_every_step(model, tracer)[0]
                results.append((tracer.result.save(), rows))
    assert model.stats().restarted > before
    for result, rows in results:
        assert [len(output.token_ids) for output in result.outputs] == [NUM_TOKENS] * 2
        assert [len(sample) for sample in rows] == [NUM_TOKENS] * 2


@pytest.mark.v2
def test_requests_without_graphs_are_evicted_first(model: VLLM) -> None:
    before = model.stats().restarted
    results = []
    with model.trace(**SAMPLING) as tracer:
        for i, ids in enumerate(prompts()):
            with tracer.invoke(ids):
                if i >= 2:  # the later ones: first come, first served would take these
                    edits_every_step(model, tracer)
                results.append(tracer.result.save())
    assert model.stats().restarted == before
    for i, (ids, result) in enumerate(zip(prompts(), results, strict=True)):
        model.llm.reset_prefix_cache()
        program: Program = edits_every_step if i >= 2 else lambda model, tracer: []
        assert list(result.token_ids) == run(model, program, [ids])[0][0]
    model.check_integrity()


def test_where_even_one_has_no_room_each_fails_retryably(model: VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = listener.outcome_of

    def evicted(output: Any, collected: Any) -> Any:
        outcome = settle(output, collected)
        outcome.samples = [Sample(failure=Failure("PreemptedError", "evicted", None, True))]
        return outcome

    monkeypatch.setattr(listener, "outcome_of", evicted)
    with pytest.raises(PreemptedError, match="evicted") as caught:
        with model.trace([1, 2, 3], max_tokens=2):
            model.model.layers[0].output[0].save()
    assert caught.value.retryable


def test_evicted_requests_run_again_with_all_their_edits_and_caches(model: VLLM) -> None:
    with model.edit() as edited:
        model.model.layers[0].output[0][:] += 0.1
    with edited.edit() as edited:
        edited.model.layers[0].output[0][:] *= 1.2

    def answers(ids: list[list[int]]) -> list[tuple[list[int], Any]]:
        found = []
        with edited.trace(**SAMPLING) as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    cache = tracer.cache(model.model.layers[1].mlp)
                    with tracer.all():
                        model.model.layers[1].output[0][:] *= 0.9
                    found.append((tracer.result.save(), cache))
        return [(list(result.token_ids), cache.model.layers[1].mlp.output) for result, cache in found]

    before = model.stats().restarted
    together = answers(prompts())
    assert model.stats().restarted > before
    for ids, (tokens, values) in zip(prompts(), together, strict=True):
        assert model.llm.reset_prefix_cache()
        ((alone_tokens, alone),) = answers([ids])
        assert tokens == alone_tokens and len(values) == len(alone) == NUM_TOKENS
        torch.testing.assert_close(values, alone, rtol=0, atol=TOLERANCE * _largest(alone))
    model.check_integrity()


def test_evicted_requests_that_use_others_values_start_again_with_them(model: VLLM) -> None:
    before = model.stats().restarted
    answers = []
    with model.trace(**SAMPLING) as tracer:
        with tracer.invoke(prompts()[0]):
            vector = model.model.layers[0].output[0][-1]
            saved = vector.save()
            answers.append(tracer.result.save())
        for prompt in prompts()[1:]:
            with tracer.invoke(prompt):
                with tracer.iter[2:]:
                    model.model.layers[1].output[0][-1] += 0.1 * vector
                answers.append(tracer.result.save())
    assert model.stats().restarted > before
    for prompt, answer in zip(prompts(), answers, strict=True):
        with model.trace(prompt, **SAMPLING) as tracer:
            if prompt != prompts()[0]:
                with tracer.iter[2:]:
                    model.model.layers[1].output[0][-1] += 0.1 * saved
            expected = tracer.result.save()
        assert answer.token_ids == expected.token_ids
    model.check_integrity()
    assert model.stats().num_kept == 0


def test_held_requests_that_take_all_seats_make_room_for_the_one_they_wait_for(model: VLLM) -> None:
    """Four seats, and the fifth needs a value of each of the four: one of them has to go, however often it's tried."""
    layers = model.model.layers
    results = []
    with pytest.raises(PreemptedError), model.trace(temperature=0.0, max_tokens=4, ignore_eos=True) as tracer:
        four = [tracer.invoke(prompt[:20]) for prompt in prompts()]
        fifth = tracer.invoke(prompts()[0][:10])
        rows = []
        for one in four:
            with one:
                rows.append(layers[0].output[0][-1])
        with fifth:
            layers[0].output[0][-1] = sum(rows)
            answer = layers[1].output[0][-1]
            results.append(tracer.result.save())
        for one in four:
            with one, tracer.iter[1]:
                layers[0].output[0][-1] += answer
                results.append(tracer.result.save())
    assert [len(result.value.token_ids) for result in results].count(4) == 4
    model.check_integrity()
