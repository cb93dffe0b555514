"""Edited models and caches of sites in an engine: bit for bit what the same trace by hand gives. Float32, a tiny model."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nv
from nnsight_vllm import edits
from nnsight_vllm.errors import AdmissionError, InterventionError, RefusedError, UnknownEditError

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

BLOCK = 32
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True}
Change = Callable[["VLLM"], None]


@pytest.fixture
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    """An engine whose cache is empty, and a model without edits."""
    model = engines(tiny_checkpoint("llama"), enforce_eager=True, block_size=BLOCK, max_model_len=256)
    assert model.llm.reset_prefix_cache()
    model.clear_edits()
    for name in model.edits:
        del model.edits[name]
    return model


def prompt(seed: int, length: int = 20) -> list[int]:
    return random.Random(seed).choices(range(10, 400), k=length)


def vector(model: VLLM, seed: int) -> torch.Tensor:
    width = model.llm.llm_engine.model_config.get_hidden_size()
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def add(model: VLLM) -> None:
    h = model.model.layers[0].output[0]
    h += vector(model, 1)


def scale(model: VLLM) -> None:
    h = model.model.layers[0].output[0]
    h *= 1.5


def project(model: VLLM) -> None:
    edits.project_out(model.model.layers[0].output[0], vector(model, 2))


def mean(model: VLLM) -> None:
    h = model.model.layers[1].input
    model.model.layers[1].mlp.output[:] += h.mean(0)


def branch(model: VLLM) -> None:
    h = model.model.layers[1].mlp.output
    if h[-1].sum() > 0:
        h *= 2
    else:
        h += 1


def gates(model: VLLM) -> None:
    """Several sites that share a tap."""
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.output[:] *= 0.9
    mlp.act_fn.output[:] += 0.01
    mlp.up_proj.output[:, ::2] = 0.1


def up(model: VLLM) -> None:
    model.model.layers[0].mlp.up_proj.output[:] *= 3


def gate(model: VLLM) -> None:
    model.model.layers[0].mlp.gate_proj.output[:] -= 0.2


def ban(model: VLLM) -> None:
    model.logits.output[:, :200] = float("-inf")


def edited(model: VLLM, *changes: Change) -> VLLM:
    for change in changes:
        with model.edit() as model:
            change(model)
    return model


def look(model: VLLM, tracer: Any) -> list[Any]:
    rows, logits = nv.list().save(), nv.list().save()
    with tracer.all():
        rows.append(model.model.layers[1].output[0])
        logits.append(model.logits.output)
    return [rows, logits, tracer.result.save()]


def told(saved: list[Any]) -> tuple[list[torch.Tensor], list[int]]:
    rows, logits, result = saved
    return [*list(rows.value), *list(logits.value)], list(result.value.token_ids)


def ask(model: VLLM, ids: list[int], **more: Any) -> tuple[list[torch.Tensor], list[int]]:
    with model.trace(ids, **SAMPLING, **more) as tracer:
        saved = look(model, tracer)
    return told([*saved])


def by_hand(model: VLLM, ids: list[int], *changes: Change) -> tuple[list[torch.Tensor], list[int]]:
    """All of it in the request's own program, in this order."""
    rows, logits = [], []
    with model.trace(ids, **SAMPLING) as tracer:
        rows, logits = nv.list().save(), nv.list().save()
        with tracer.all():
            for change in changes:
                if change is not ban:
                    change(model)
            rows.append(model.model.layers[1].output[0])
            if ban in changes:
                ban(model)
            logits.append(model.logits.output)
        result = tracer.result.save()
    return [*rows, *logits], list(result.token_ids)


def equal(one: tuple[list[torch.Tensor], list[int]], other: tuple[list[torch.Tensor], list[int]]) -> bool:
    return one[1] == other[1] and len(one[0]) == len(other[0]) and all(map(torch.equal, one[0], other[0]))


ORDERS: list[tuple[Change, ...]] = [
    (add,),
    (add, scale),
    (scale, add),
    (project, add, scale, project),
    (add, mean),
    (gates, scale, mean, ban),
    (gate, up),
]


@pytest.mark.parametrize("changes", ORDERS, ids=lambda changes: "-".join(change.__name__ for change in changes))
def test_edits_give_the_bits_of_the_same_trace_by_hand(model: VLLM, changes: tuple[Change, ...]) -> None:
    ids = prompt(0)
    expected = by_hand(model, ids, *changes)
    found = ask(edited(model, *changes), ids)
    assert equal(found, expected)
    assert not equal(found, ask(model, ids))
    model.check_integrity()


def test_the_order_of_edits_matters(model: VLLM) -> None:
    ids = prompt(1)
    assert not equal(ask(edited(model, add, scale), ids), ask(edited(model, scale, add), ids))


def test_edits_of_one_taps_sites_are_applied_in_the_models_order(model: VLLM) -> None:
    ids = prompt(2)
    assert equal(ask(edited(model, up, gate), ids), ask(edited(model, gate, up), ids))
    assert equal(ask(edited(model, up, gate), ids), by_hand(model, ids, gate, up))


def test_an_edit_with_a_branch_is_that_of_a_trace(model: VLLM) -> None:
    ids = prompt(3)
    with model.trace(ids, **SAMPLING) as tracer:
        rows, logits = nv.list().save(), nv.list().save()
        with tracer.all():
            h = model.model.layers[1].mlp.output
            if h[-1].sum() > 0:
                h *= 2
            else:
                h += 1
            rows.append(model.model.layers[1].output[0])
            logits.append(model.logits.output)
        result = tracer.result.save()
    with model.edit() as branching:
        h = model.model.layers[1].mlp.output
        if h[-1].sum() > 0:
            h *= 2
        else:
            h += 1
    assert equal(ask(branching, ids), ([*rows, *logits], list(result.token_ids)))


def test_edits_in_place_and_cleared(model: VLLM) -> None:
    ids = prompt(4)
    clean = ask(model, ids)
    with model.edit(inplace=True):
        add(model)
    with model.edit(inplace=True):
        scale(model)
    changed = ask(model, ids)
    model.clear_edits()
    assert equal(changed, by_hand(model, ids, add, scale)) and equal(ask(model, ids), clean)


def test_a_request_without_a_program_of_its_own_runs_edited(model: VLLM) -> None:
    ids = prompt(5)
    with edited(model, add, ban).trace(ids, **SAMPLING) as tracer:
        result = tracer.result.save()
    assert list(result.token_ids) == by_hand(model, ids, add, ban)[1]
    assert min(result.token_ids) >= 200


def test_an_edit_in_some_iterations(model: VLLM) -> None:
    ids = prompt(6)
    with model.edit() as later:
        with later.iter[1:3]:
            model.model.layers[0].output[0][:] *= -1
    rows, _ = ask(later, ids)
    with model.trace(ids, **SAMPLING) as tracer:
        kept = nv.list().save()
        with tracer.iter[0:1]:
            kept.append(model.model.layers[1].output[0])
        with tracer.iter[1:3]:
            model.model.layers[0].output[0][:] *= -1
            kept.append(model.model.layers[1].output[0])
        with tracer.iter[3:]:
            kept.append(model.model.layers[1].output[0])
    assert all(map(torch.equal, rows[:5], kept)) and len(kept) == 5


def test_named_edits_run_as_groups_beside_plain_requests_that_they_do_not_touch(model: VLLM) -> None:
    with model.edit("calm"):
        add(model)
    with model.edit("loud"):
        scale(model)
    asked = [(), ("calm",), ("loud", "calm"), (), ("calm", "loud"), ("calm",), (), ("loud",)] * 2
    prompts = [prompt(10 + i, 9 + i % 3) for i in range(len(asked))]

    def run(wanted: list[tuple[str, ...]]) -> list[tuple[list[torch.Tensor], list[int]]]:
        model.llm.reset_prefix_cache()
        saved = []
        with model.trace(**SAMPLING) as tracer:
            for ids, names in zip(prompts, wanted, strict=True):
                with tracer.invoke(ids, edits=list(names)):
                    saved.append(look(model, tracer))
        return [told(each) for each in saved]

    clean, before = run([()] * len(asked)), model.stats()
    together, after = run(asked), model.stats()
    for found, plain, names in zip(together, clean, asked, strict=True):
        assert equal(found, plain) is not bool(names)
    changes: dict[str, Change] = {"calm": add, "loud": scale}
    for ids, found, names in zip(prompts, together, asked, strict=True):
        tensors, tokens = by_hand(model, ids, *(changes[name] for name in names))
        assert tokens == found[1]
        for one, other in zip(found[0], tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5 * float(other.abs().max()))
    assert after.batched - before.batched > after.one_by_one - before.one_by_one + after.alone - before.alone
    model.check_integrity()


def test_many_requests_with_one_edit_are_one_group(model: VLLM) -> None:
    with model.edit("calm"):
        add(model)
    before = model.stats()
    with model.trace(temperature=0.0, max_tokens=4, ignore_eos=True, edits=["calm"]) as tracer:
        for i in range(64):
            with tracer.invoke(prompt(i, 5)):
                pass
    after = model.stats()
    assert after.batched - before.batched > 60 * 4  # the first ones may come before the others
    assert after.program_misses == before.program_misses or after.program_hits - before.program_hits == 63
    model.check_integrity()


def test_each_tensor_of_an_edit_crosses_once(model: VLLM) -> None:
    direction = torch.randn(vector(model, 0).shape[0])
    with model.edit() as steered:
        model.model.layers[0].output[0][:] += direction
    engine: Any = model._engine
    before = engine.store()["received_bytes"]
    first = ask(steered, prompt(7))
    once = engine.store()["received_bytes"]
    assert once > before
    direction += 1  # the edit keeps what it was recorded with
    assert equal(ask(steered, prompt(7)), first)
    assert engine.store()["received_bytes"] == once
    assert engine.tensors.in_use == 0


def test_samples_of_a_request_run_edited_each(model: VLLM) -> None:
    with edited(model, ban).trace(prompt(8), max_tokens=6, temperature=1.0, seed=0, n=3) as tracer:
        kept = nv.list().save()
        with tracer.all():
            kept.append(model.samples.output)
        result = tracer.result.save()
    assert len(result.outputs) == 3 and all(min(output.token_ids) >= 200 for output in result.outputs)
    assert [[int(token) for token in sample] for sample in kept] == [list(o.token_ids) for o in result.outputs]


def test_a_failing_edit_fails_its_requests_only_and_names_its_line(model: VLLM) -> None:
    with model.edit("short") as failing:
        with failing.iter[:1]:
            model.model.layers[0].output[0][30] = 0
    with pytest.raises(InterventionError, match=r"IndexError.*layers\[0\].output\[0\]\[30\] = 0, in the edit 'short'"):
        with model.trace(**SAMPLING) as tracer:
            with tracer.invoke(prompt(1), edits=["short"]):
                lost = look(model, tracer)
            with tracer.invoke(prompt(1)):
                kept = look(model, tracer)
            with tracer.invoke(prompt(1, 40), edits=["short"]):
                long = look(model, tracer)
    assert equal(told(kept), ask(model, prompt(1)))
    assert len(told(long)[1]) == 5 and lost[2].value.finish_reason == "error"
    model.check_integrity()


def test_a_stop_ends_a_request_with_edits(model: VLLM) -> None:
    with edited(model, add).trace(prompt(2), **{**SAMPLING, "max_tokens": 50}) as tracer:
        with tracer.iter[2:]:
            row = model.model.layers[0].output[0].save()
            tracer.stop()
        result = tracer.result.save()
    assert len(result.token_ids) == 2 and row.shape[0] == 1 and result.finish_reason == "stop"
    model.check_integrity()


def test_scans_of_an_edited_model_run_nothing(model: VLLM) -> None:
    with edited(model, add).scan(prompt(3)):
        shape = model.model.layers[0].output[0].shape
    assert shape[0] == 20
    with pytest.raises(UnknownEditError):
        model.scan(prompt(3), edits=["nobody"])


def test_too_many_edits_are_refused_with_both_numbers(model: VLLM) -> None:
    with model.edit("calm"):
        add(model)
    with pytest.raises(AdmissionError, match=r"66 graphs in one request; the limit is 64.*test_edited.py:\d+"):
        with model.trace(prompt(3), **SAMPLING, edits=["calm"] * 65):
            model.model.layers[0].output[0].save()


def test_threads_with_edits_of_their_own(model: VLLM) -> None:
    ids = prompt(9)
    models = [edited(model, add), edited(model, scale), model]
    expected = [ask(each, ids) for each in models]
    found: list[Any] = [None] * len(models)

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = ask(models[i], ids)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(equal, found, expected))
    model.check_integrity()


# -- the prefix cache --------------------------------------------------------------------------------------------------


def cached(model: VLLM, ids: list[int], saves: bool = False, **more: Any) -> int:
    with model.trace(ids, **SAMPLING, **more) as tracer:
        if saves:
            model.model.layers[1].output[0][-1].save()
        result = tracer.result.save()
    return result.num_cached_tokens or 0


def test_equal_edits_in_equal_order_share_blocks_and_no_others_do(model: VLLM) -> None:
    ids = prompt(20, 100)
    first, second = edited(model, add, scale), edited(model, add, scale)
    other = edited(model, scale, add)
    assert [cached(each, ids) for each in (first, second, other, other)] == [0, 3 * BLOCK, 0, 3 * BLOCK]
    assert [cached(each, ids) for each in (model, edited(model, add), model)] == [0, 0, 3 * BLOCK]


def test_what_a_request_reads_besides_does_not_keep_it_from_its_edits_blocks(model: VLLM) -> None:
    ids = prompt(21, 100)
    steered = edited(model, add)
    assert cached(steered, ids) == 0
    assert cached(steered, ids, saves=True) == 3 * BLOCK
    assert cached(steered, [*ids, *prompt(22, 30)], saves=True) == 3 * BLOCK
    longer = edited(model, add, ban)  # changes logits only: the rows are those of `add`
    assert cached(longer, ids) == 3 * BLOCK


def test_hits_give_what_an_empty_cache_gives(model: VLLM) -> None:
    draw = random.Random(0)
    base = prompt(23, 96)
    models = [model, edited(model, add), edited(model, add, scale), edited(model, scale, add), edited(model, mean, add)]
    cases = [
        ([*base[: draw.choice([32, 64, 96])], *prompt(draw.randrange(3), 7)], draw.choice(models)) for _ in range(24)
    ]

    def answer(each: VLLM, ids: list[int]) -> tuple[torch.Tensor, list[int], int]:
        with each.trace(ids, **SAMPLING) as tracer:
            row = model.model.layers[1].output[0][-1].save()
            result = tracer.result.save()
        return row, list(result.token_ids), result.num_cached_tokens or 0

    together = [answer(each, ids) for ids, each in cases]
    assert sum(hits > 0 for _, _, hits in together) >= 5
    for (ids, each), (row, tokens, _) in zip(cases, together, strict=True):
        model.llm.reset_prefix_cache()
        expected, others, _ = answer(each, ids)
        assert tokens == others
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    model.check_integrity()


def test_a_request_that_fails_leaves_its_edits_blocks_whole(model: VLLM) -> None:
    ids = prompt(24, 100)
    steered = edited(model, add, mean)
    simple = edited(model, add)
    with pytest.raises(InterventionError), simple.trace(ids, **SAMPLING):
        h = model.model.layers[0].input
        h[torch.tensor([1000])].save()
    assert cached(simple, ids) == 3 * BLOCK
    found, _ = ask(simple, [*ids, 7])
    model.llm.reset_prefix_cache()
    expected, _ = ask(simple, [*ids, 7])
    torch.testing.assert_close(found[-5:], expected[-5:], rtol=0, atol=1e-3)
    assert cached(steered, ids) == cached(steered, ids) == 0  # a mean over rows is nobody else's


# -- tracer.cache ------------------------------------------------------------------------------------------------------


def test_a_cache_has_the_bits_that_a_trace_saves(model: VLLM) -> None:
    ids = prompt(30)
    steered = edited(model, add)
    names = [
        "model.layers.0",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.act_fn",
        "model.norm",
        "logits",
        "samples",
    ]
    with steered.trace(ids, **SAMPLING) as tracer:
        cache = tracer.cache(names, include_inputs=True)
        with tracer.all():
            model.model.layers[0].output[0][:] *= 1.5
    with steered.trace(ids, **SAMPLING) as tracer:
        kept = {name: nv.list().save() for name in names}
        given = nv.list().save()
        with tracer.all():
            h = model.model.layers[0].output[0]
            h *= 1.5
            for name in names:
                if name == "model.layers.0":
                    kept[name].append(h)
                elif name == "model.layers.0.self_attn.q_proj":
                    pass
                else:
                    kept[name].append(model.get(name).output)
    with steered.trace(ids, **SAMPLING) as tracer:
        given = nv.list().save()
        queries = nv.list().save()
        with tracer.all():
            given.append(model.model.layers[0].self_attn.q_proj.input)
            queries.append(model.model.layers[0].self_attn.q_proj.output)
            model.model.layers[0].output[0][:] *= 1.5
    for name in names:
        found = cache[name].output
        expected = queries if name.endswith("q_proj") else kept[name].value
        assert len(found) == len(expected) == 5
        for value, other in zip(found, expected, strict=True):
            assert torch.equal(value[0] if name == "model.layers.0" else value, other)
    assert all(map(torch.equal, cache.model.layers[0].self_attn.q_proj.input, given))
    assert cache.model.layers[0].output[0][0].shape[0] == 20 and cache.model.layers[0].output[1][0].shape[0] == 1
    model.check_integrity()


def test_a_cache_of_all_modules(model: VLLM) -> None:
    with model.trace(prompt(31), **SAMPLING) as tracer:
        cache = tracer.cache()
        result = tracer.result.save()
    outputs = {site.path for site in model._tree.catalogue.sites if site.port == "output"}
    assert set(cache) == outputs
    assert all(len(entry.output) == 5 for entry in cache.values())
    assert [int(token) for token in cache.samples.output] == list(result.token_ids)
    model.check_integrity()


def test_caches_run_as_groups_and_each_has_its_own_requests_values(model: VLLM) -> None:
    def run(invokes: list[int], before: Any) -> tuple[list[Any], Any]:
        caches = []
        with model.trace(**SAMPLING) as tracer:
            for i in invokes:
                with tracer.invoke(prompt(40 + i, 8)):
                    caches.append(tracer.cache([model.model.layers[0], model.model.layers[1].mlp]))
        return caches, model.stats()

    before = model.stats()
    together, after = run(list(range(6)), before)
    assert after.batched - before.batched > after.one_by_one - before.one_by_one
    for i in range(6):
        (alone,), _ = run([i], None)
        for path in alone:
            for one, other in zip(together[i][path].output, alone[path].output, strict=True):
                one, other = (value[0] if isinstance(value, tuple) else value for value in (one, other))
                torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5 * float(other.abs().max()))


def test_a_cache_that_is_too_large_fails_with_both_numbers(
    engines: Engines, tiny_checkpoint: Callable[[str], str]
) -> None:
    model = engines(tiny_checkpoint("llama"), enforce_eager=True, block_size=BLOCK, max_model_len=256)
    model._engine  # noqa: B018
    with pytest.raises(RefusedError, match="only available inside"):
        with model.trace() as tracer:
            tracer.cache()
    with model.trace(prompt(32), **SAMPLING) as tracer:
        cache = tracer.cache(model.model.norm)
        with tracer.iter[2]:
            model.model.layers[0].output[0].save()
            tracer.stop()
    assert len(cache.model.norm.output) == 2  # the third iteration ended before
