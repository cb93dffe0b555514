"""The prefix cache under graphs: what may be shared is, and nobody reads what another's edit wrote. Float32, in a small engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nnsight_vllm import edits

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

pytestmark = pytest.mark.v2
BLOCK = 32
TOLERANCE = 2e-5  # a prompt's end alone and the whole prompt: other shapes, other sums
Program = Callable[["VLLM", Any], Any]


@pytest.fixture
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    """An engine whose cache is empty."""
    model = engines(tiny_checkpoint("llama"), enforce_eager=True, block_size=BLOCK, max_model_len=256)
    assert model.llm.reset_prefix_cache()
    return model


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(10, 400), k=length)


def vector(model: VLLM, seed: int) -> torch.Tensor:
    width = model.llm.llm_engine.model_config.get_hidden_size()
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def plain(model: VLLM, tracer: Any) -> None:
    return None


def saving(model: VLLM, tracer: Any) -> Any:
    return model.model.layers[0].output[0].save()


def last_saved(model: VLLM, tracer: Any) -> Any:
    return model.model.layers[1].output[0][-1].save()


def steering(seed: int) -> Program:
    def program(model: VLLM, tracer: Any) -> None:
        with tracer.all():
            h = model.model.layers[0].output[0]
            h += vector(model, seed)

    return program


def projecting(model: VLLM, tracer: Any) -> None:
    with tracer.all():
        edits.project_out(model.model.layers[0].output[0], vector(model, 7))


def setting_last(model: VLLM, tracer: Any) -> None:
    model.model.layers[0].output[0][-1] = vector(model, 3)


def spreading(model: VLLM, tracer: Any) -> None:
    h = model.model.layers[0].output[0]
    h += h.mean(0)


def setting_row(model: VLLM, tracer: Any) -> None:
    model.model.layers[0].output[0][5] = vector(model, 3)


def adding_from(row: int) -> Program:
    def program(model: VLLM, tracer: Any) -> Any:
        h = model.model.layers[0].output[0]
        h[row:] += vector(model, 6)
        return model.model.layers[1].output[0][row:].save()

    return program


def rows_from(row: int) -> Program:
    def program(model: VLLM, tracer: Any) -> Any:
        return model.model.layers[1].output[0][row:].save()

    return program


def a_row(model: VLLM, tracer: Any) -> Any:
    return model.model.layers[1].output[0][70].save()


def doubting(model: VLLM, tracer: Any) -> Any:
    h = model.model.layers[0].output[0]
    with tracer.cond(h[-1].sum() < 1000):
        h[-1] = vector(model, 8)
    return model.model.layers[1].output[0][-1].save()


def later(model: VLLM, tracer: Any) -> None:
    with tracer.iter[1:]:
        h = model.model.layers[0].output[0]
        h += vector(model, 4)


def banning(model: VLLM, tracer: Any) -> None:
    with tracer.all():
        model.logits.output[:, :100] = float("-inf")


def noise(model: VLLM, tracer: Any) -> None:
    h = model.model.layers[0].output[0]
    h += torch.randn_like(h)


def run(model: VLLM, ids: list[int], program: Program, max_tokens: int = 2) -> tuple[Any, Any, Any]:
    """The result, the first logits and what the program saved."""
    with model.trace(ids, temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0) as tracer:
        saved = program(model, tracer)
        logits = model.logits.output[0].save() if program in FIRST_LOGITS else None
        result = tracer.result.save()
    return result, logits, saved


FIRST_LOGITS = {plain, saving, last_saved, setting_last, spreading, noise}


def cached(result: Any) -> int:
    return result.num_cached_tokens or 0


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * max(1.0, float(other.abs().max())))


def test_graphs_of_logits_use_plain_blocks_fully(model: VLLM) -> None:
    ids = prompt(0, 100)
    first, logits, _ = run(model, ids, plain)
    again, other, _ = run(model, ids, plain)
    assert (cached(first), cached(again)) == (0, 3 * BLOCK)
    close(other, logits)
    banned, _, _ = run(model, ids, banning)
    assert cached(banned) == 3 * BLOCK
    assert all(id >= 100 for id in banned.token_ids)


def test_a_read_of_the_last_row_uses_the_cache_and_gives_the_same(model: VLLM) -> None:
    ids = prompt(1, 100)
    first, _, row = run(model, ids, last_saved)
    again, _, other = run(model, ids, last_saved)
    assert (cached(first), cached(again)) == (0, 3 * BLOCK)
    close(other, row)


def test_reads_of_the_prompt_see_all_of_it_and_leave_plain_blocks(model: VLLM) -> None:
    ids = prompt(2, 100)
    first, logits, rows = run(model, ids, saving)
    again, _, other = run(model, ids, saving)
    assert (cached(first), cached(again)) == (0, 0)
    assert torch.equal(rows, other) and len(rows) == 100
    after, others, _ = run(model, ids, plain)
    assert cached(after) == 3 * BLOCK
    close(others, logits)


@pytest.mark.parametrize("edited", [steering(1), projecting], ids=["steering", "projecting"])
def test_equal_edits_share_blocks_and_nobody_else_reads_them(model: VLLM, edited: Program) -> None:
    ids = prompt(3, 100)
    first, _, _ = run(model, ids, edited, 8)
    again, _, _ = run(model, ids, edited, 8)
    longer, _, _ = run(model, [*ids, *prompt(9, 40)], edited, 8)
    assert [cached(result) for result in (first, again, longer)] == [0, 3 * BLOCK, 3 * BLOCK]
    assert first.token_ids == again.token_ids
    other, _, _ = run(model, ids, steering(2), 8)
    clean, _, _ = run(model, ids, plain)
    assert [cached(result) for result in (other, clean)] == [0, 0]


def test_an_edit_at_the_end_of_a_prompt_is_not_its_continuations(model: VLLM) -> None:
    short = prompt(4, 2 * BLOCK)
    long = [*short, *prompt(5, 20)]
    run(model, short, setting_last)
    result, logits, _ = run(model, long, setting_last)
    assert cached(result) == BLOCK  # what comes before the edit
    again, other, _ = run(model, long, setting_last)
    assert cached(again) == 2 * BLOCK
    close(other, logits)
    model.llm.reset_prefix_cache()
    alone, other, _ = run(model, long, setting_last)
    assert cached(alone) == 0
    close(other, logits)


def test_an_edit_at_a_position_is_shared_by_longer_prompts(model: VLLM) -> None:
    ids = prompt(20, 100)
    first, _, _ = run(model, ids, setting_row, 8)
    longer, _, _ = run(model, [*ids, *prompt(21, 40)], setting_row, 8)
    clean, _, _ = run(model, ids, plain)
    assert [cached(result) for result in (first, longer, clean)] == [0, 3 * BLOCK, 0]
    again, _, _ = run(model, ids, setting_row, 8)
    assert cached(again) == 3 * BLOCK and again.token_ids == first.token_ids
    model.llm.reset_prefix_cache()
    alone, _, _ = run(model, [*ids, *prompt(21, 40)], setting_row, 8)
    assert (cached(alone), alone.token_ids) == (0, longer.token_ids)


def test_edits_share_the_plain_blocks_before_them_and_leave_some(model: VLLM) -> None:
    ids = prompt(22, 110)
    edited = adding_from(70)
    first, _, rows = run(model, ids, edited)
    clean, logits, _ = run(model, ids, plain)
    again, _, same = run(model, ids, edited)
    other, _, _ = run(model, ids, adding_from(80))
    doubted, _, last = run(model, ids, doubting)
    assert [cached(result) for result in (first, clean, again, other, doubted)] == [0, *[2 * BLOCK] * 3, 3 * BLOCK]
    close(same, rows)
    model.llm.reset_prefix_cache()
    alone, others, _ = run(model, ids, plain)
    assert cached(alone) == 0
    close(logits, others)
    model.llm.reset_prefix_cache()
    close(run(model, ids, doubting)[2], last)


def test_many_edits_of_one_prompts_end_compute_its_beginning_once(model: VLLM) -> None:
    ids = prompt(24, 110)

    def send(seeds: list[int]) -> list[tuple[Any, Any]]:
        found = []
        with model.trace(temperature=0.0, max_tokens=2, ignore_eos=True) as tracer:
            for seed in seeds:
                with tracer.invoke(ids):
                    model.model.layers[0].output[0][-1] = vector(model, seed)
                    found.append((tracer.result.save(), model.logits.output.save()))
        return found

    together = send([0, 1, 2, 3, 4, 5])
    assert [cached(result) for result, _ in together] == [0, *[3 * BLOCK] * 5]
    model.llm.reset_prefix_cache()
    for seed, (_, logits) in enumerate(together):
        ((_, expected),) = send([seed])
        close(logits.value, expected.value)


@pytest.mark.parametrize(("looking", "hits"), [(rows_from(70), 2), (a_row, 2), (rows_from(31), 0), (rows_from(96), 3)])
def test_reads_from_a_position_on_use_plain_blocks_before_it(model: VLLM, looking: Program, hits: int) -> None:
    ids = prompt(23, 120)
    first, _, rows = run(model, ids, looking)
    again, _, same = run(model, ids, looking)
    assert (cached(first), cached(again)) == (0, hits * BLOCK)
    assert same.shape == rows.shape
    close(same, rows)
    assert cached(run(model, ids, plain)[0]) == 3 * BLOCK


def test_the_second_turn_of_a_chat(model: VLLM) -> None:
    ids = prompt(6, BLOCK + 10)
    for program, hits in ((later, BLOCK), (steering(1), 2 * BLOCK)):
        first, _, _ = run(model, ids, program, 40)
        second = [*ids, *first.token_ids, *prompt(7, 5)]
        result, _, _ = run(model, second, program, 8)
        assert cached(result) == hits
        model.llm.reset_prefix_cache()
        alone, _, _ = run(model, second, program, 8)
        assert alone.token_ids == result.token_ids


def test_what_depends_on_the_whole_prompt_or_on_chance_is_read_by_nobody(model: VLLM) -> None:
    ids = prompt(8, 100)
    other = [*ids[:64], *prompt(9, 36)]
    for program in (spreading, noise):
        results = [run(model, each, program)[0] for each in (ids, ids, other)]
        assert [cached(result) for result in results] == [0, 0, 0]
    assert cached(run(model, ids, plain)[0]) == 0


PROGRAMS: list[Program] = [
    plain,
    saving,
    last_saved,
    setting_last,
    spreading,
    banning,
    later,
    setting_row,
    adding_from(10),
    rows_from(15),
    doubting,
    projecting,
    steering(1),
    steering(2),
]


def test_any_order_of_graphs_over_shared_prefixes_gives_what_an_empty_cache_gives(model: VLLM) -> None:
    draw = random.Random(0)
    bases = [prompt(seed, 96) for seed in range(2)]
    cases = []
    for _ in range(40):
        base = draw.choice(bases)
        cut = draw.choice([20, 32, 64, 90, 96])
        ids = [*base[:cut], *(prompt(draw.randrange(3), 12) if draw.random() < 0.4 else [])]
        cases.append((ids, draw.choice(PROGRAMS)))
    together = [run(model, ids, program, 6) for ids, program in cases]
    assert sum(cached(result) > 0 for result, _, _ in together) >= 8
    for (ids, program), (result, logits, saved) in zip(cases, together, strict=True):
        model.llm.reset_prefix_cache()
        expected, other, value = run(model, ids, program, 6)
        assert cached(expected) == 0
        assert result.token_ids == expected.token_ids
        if other is not None:
            close(logits, other)
        if value is not None:
            close(saved, value)
    model.check_integrity()


def test_a_salt_of_the_users_own_is_kept_apart(model: VLLM) -> None:
    ids = prompt(10, 100)
    edited = steering(1)

    def send(salt: str) -> Any:
        with model.trace({"prompt_token_ids": ids, "cache_salt": salt}, max_tokens=1, temperature=0.0) as tracer:
            edited(model, tracer)
            result = tracer.result.save()
        return result

    assert [cached(send(salt)) for salt in ("a", "b", "a")] == [0, 0, 3 * BLOCK]


def test_samples_of_one_request_share_its_blocks_or_not(model: VLLM) -> None:
    ids = prompt(11, 100)
    with model.trace(ids, max_tokens=2, temperature=1.0, n=3, seed=0) as tracer:
        rows = model.model.layers[0].output[0].save()
        result = tracer.result.save()
    assert len(result.outputs) == 3
    assert all(torch.equal(each, rows[0]) and len(each) == 100 for each in rows)


def test_what_was_computed_for_an_evicted_request_is_found_by_nobody(
    engines: Engines, tiny_checkpoint: Callable[[str], str]
) -> None:
    model = engines(
        tiny_checkpoint("llama"),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        num_gpu_blocks_override=12,
        block_size=BLOCK,
    )
    model.llm.reset_prefix_cache()
    edited = steering(5)
    prompts = [[i + 3, *prompt(12, 70)] for i in range(4)]
    before = model.stats().restarted
    with model.trace(temperature=0.0, max_tokens=100, ignore_eos=True) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                edited(model, tracer)
    assert model.stats().restarted > before
    after = [run(model, ids, edited, 6)[0] for ids in prompts]
    model.llm.reset_prefix_cache()
    alone = [run(model, ids, edited, 6)[0] for ids in prompts]
    assert [result.token_ids for result in after] == [result.token_ids for result in alone]
    model.check_integrity()
