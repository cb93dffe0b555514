"""The worker in vLLM, with graphs written by hand: what the executor's own tests can't show."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checkpoints import VOCAB
from raw_engine import Answer, RawEngine
from toy import graph, value_of

from nnsight_vllm.graph.nodes import Block, Call, Iterations, Op, Read, Ref, Save, Slice, Stop, Tuple, Write
from nnsight_vllm.wire.extras import RequestExtras, encode_extras

pytestmark = pytest.mark.v2
RESIDUAL = "model.layers.1.output"
PROMPT = [1, 5, 9, 40]
PUSH = graph(
    Iterations(
        0,
        0,
        None,
        1,
        1,
        Block([Read(2, RESIDUAL, None), Op(3, "py.iadd", [Ref(2), 3.0], writes=RESIDUAL)]),
    )
)

MEAN = graph(
    Read(0, RESIDUAL, 0), Op(1, "tensor.mean", [Ref(0), 0]), Op(2, "py.iadd", [Ref(0), Ref(1)], writes=RESIDUAL)
)
KEEP = graph(Read(0, RESIDUAL, 0), Save(1, "rows", Ref(0)))


@pytest.fixture(scope="module", params=["sync", "async"])
def engine(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], str]) -> Iterator[RawEngine]:
    """A token budget of 64 a step and room for five KV blocks of 32."""
    checkpoint = tiny_checkpoint("llama")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "async":
            _schedule_asynchronously(patch)
        engine = RawEngine(
            checkpoint,
            max_model_len=128,
            max_num_batched_tokens=64,
            max_num_seqs=4,
            block_size=32,
            num_gpu_blocks_override=6,
        )
        yield engine
        assert engine.leftovers() == []
        engine.close()


def _schedule_asynchronously(patch: pytest.MonkeyPatch) -> None:
    """vLLM turns it off on CPUs; the runner is the same."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def check_and_update_config(config: Any) -> None:
        update(config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))


def saves(answer: Answer) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for delta in answer.deltas:
        for saved in delta.saves:
            found.setdefault(saved.name, []).append(value_of(saved.value))
    return found


def plain(ids: list[int], **params: Any) -> tuple[list[int], None, dict[str, Any]]:
    return (ids, None, params)


def test_neighbours_keep_their_tokens_and_an_edit_changes_its_own(engine: RawEngine) -> None:
    params = {"max_tokens": 6}
    one, two = engine.generate(plain(PROMPT, **params), plain(PROMPT[::-1], **params))
    same, edited, other = engine.generate(
        plain(PROMPT, **params), (PROMPT, PUSH, params), plain(PROMPT[::-1], **params)
    )
    assert (same.tokens, other.tokens) == (one.tokens, two.tokens)
    assert edited.tokens != one.tokens
    assert edited.tokens == engine.generate((PROMPT, PUSH, params))[0].tokens


def test_iterations_cover_the_prompt_once_and_then_one_row_each(engine: RawEngine) -> None:
    body = Block([Read(2, RESIDUAL, None), Op(3, "py.size", [Ref(2), 0]), Op(4, "py.append", [Ref(0), Ref(3)])])
    data = graph(Op(0, "py.list"), Save(5, "rows", Ref(0)), Iterations(6, 0, None, 1, 1, body))
    (answer,) = engine.generate((PROMPT, data, {"max_tokens": 4}))
    assert saves(answer)["rows"] == [[4], [1], [1], [1]]


def test_the_engine_goes_on_from_an_edited_token_and_reports_it(engine: RawEngine) -> None:
    data = graph(
        Read(0, "logits.output", 0),
        Save(1, "logits", Ref(0)),
        Write(2, "samples.output", 77, 0),
        Read(3, "model.embed_tokens.input", 1),
        Save(4, "fed", Ref(3)),
    )
    (answer,) = engine.generate((PROMPT, data, {"max_tokens": 3, "logprobs": 2}))
    found = saves(answer)
    assert answer.tokens[0] == 77
    assert found["fed"] == [[77]]
    (row,) = torch.tensor(found["logits"][0]).log_softmax(-1)
    reported = answer.output.outputs[0].logprobs[0][77]
    assert reported.logprob == pytest.approx(row[77].item(), abs=1e-5)
    assert reported.rank == int((row >= row[77]).sum())
    assert answer.output.outputs[0].cumulative_logprob == pytest.approx(
        sum(step[token].logprob for step, token in zip(answer.output.outputs[0].logprobs, answer.tokens, strict=True))
    )


def test_edited_logits_are_what_is_drawn_from_and_reported(engine: RawEngine) -> None:
    read = Read(0, "logits.output", 0)
    data = graph(read, Op(1, "py.setitem", [Ref(0), Tuple([Slice(), 88]), 1e4], writes="logits.output"))
    (answer,) = engine.generate((PROMPT, data, {"max_tokens": 1, "logprobs": 1}))
    assert answer.tokens == [88]
    assert answer.output.outputs[0].logprobs[0][88].logprob == pytest.approx(0.0)


def test_modules_called_ad_hoc_give_what_the_model_gives(engine: RawEngine) -> None:
    data = graph(
        Read(0, "model.layers.3.output", 0),
        Call(1, "model.norm", [Ref(0)]),
        Call(2, "lm_head", [Ref(1)]),
        Op(3, "py.getitem", [Ref(2), Slice(-1, None)]),
        Save(4, "lens", Ref(3)),
        Read(5, "logits.output", 0),
        Save(6, "logits", Ref(5)),
    )
    (answer,) = engine.generate((PROMPT, data, {"max_tokens": 1}))
    found = saves(answer)
    assert torch.allclose(torch.tensor(found["lens"][0]), torch.tensor(found["logits"][0]), atol=1e-4)


def test_prompt_logprobs_do_not_fire_the_logits(engine: RawEngine) -> None:
    body = Block([Read(2, "logits.output", None), Op(3, "py.size", [Ref(2)]), Op(4, "py.append", [Ref(0), Ref(3)])])
    data = graph(Op(0, "py.list"), Save(5, "shapes", Ref(0)), Iterations(6, 0, 2, 1, 1, body))
    (answer,) = engine.generate((PROMPT, data, {"max_tokens": 2, "prompt_logprobs": 1}))
    assert saves(answer)["shapes"] == [[(1, VOCAB)], [(1, VOCAB)]]
    assert len(answer.output.prompt_logprobs) == len(PROMPT)


def test_a_token_outside_the_vocabulary_fails_its_request_only(engine: RawEngine) -> None:
    bad = graph(Write(0, "samples.output", VOCAB, 0))
    failed, good = engine.generate((PROMPT, bad, {"max_tokens": 3}), plain(PROMPT, max_tokens=3))
    assert failed.failures == ["InterventionError"]
    assert good.tokens == engine.generate(plain(PROMPT, max_tokens=3))[0].tokens


@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")
def test_an_edit_of_the_token_is_refused_under_structured_outputs(engine: RawEngine) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    choice = {"structured_outputs": StructuredOutputsParams(choice=["a", "b"]), "max_tokens": 2}
    (answer,) = engine.generate((PROMPT, graph(Write(0, "samples.output", 3, 0)), choice))
    assert answer.failures == ["InterventionError"]


def test_prompts_that_graphs_need_whole_are_computed_in_turn(engine: RawEngine) -> None:
    long = [3 + i % 50 for i in range(40)]
    params = {"max_tokens": 2}
    answers = engine.generate(plain(long, **params), (long, MEAN, params), plain(PROMPT, **params))
    assert [answer.failures for answer in answers] == [[], [], []]
    assert engine.steps[0] == {0: 40}
    assert engine.steps[1] == {0: 1, 1: 40, 2: 4}


def test_without_graphs_prompts_are_cut_as_ever(engine: RawEngine) -> None:
    long = [3 + i % 50 for i in range(40)]
    engine.generate(plain(long, max_tokens=2), plain(long, max_tokens=2))
    assert engine.steps[0] == {0: 40, 1: 24}


def test_an_evicted_request_fails_and_may_be_sent_again(engine: RawEngine) -> None:
    ids = [3 + i for i in range(30)]
    params = {"max_tokens": 60}
    first, evicted = engine.generate((ids, PUSH, params), (ids[:20], PUSH, params))
    (failure,) = [delta.failure for delta in evicted.deltas if delta.failure]
    assert (failure.kind, failure.retryable) == ("PreemptedError", True)
    assert first.tokens == engine.generate((ids, PUSH, params))[0].tokens


def test_one_without_a_graph_is_evicted_before_one_with(engine: RawEngine) -> None:
    ids = [3 + i for i in range(30)]
    params = {"max_tokens": 60}
    evicted, first = engine.generate(plain(ids, **params), (ids[::-1], PUSH, params))
    assert evicted.failures == first.failures == []
    assert first.tokens == engine.generate((ids[::-1], PUSH, params))[0].tokens
    assert evicted.tokens == engine.generate(plain(ids, **params))[0].tokens


def test_a_prompt_that_no_step_can_take_fails_instead_of_waiting(engine: RawEngine) -> None:
    (answer,) = engine.generate(([3] * 70, MEAN, {"max_tokens": 2}))
    assert answer.failures == ["PreemptedError"]


def test_prompts_that_may_be_cut_are_cut_as_those_without_graphs(engine: RawEngine) -> None:
    ids = [3 + i % 50 for i in range(40)]
    params = {"max_tokens": 3, "cut": True}
    (alone,) = engine.generate((ids, KEEP, params))
    whole = saves(alone)["rows"]
    first, second, third = engine.generate(plain(ids, max_tokens=3), (ids, KEEP, params), (ids[:20], PUSH, params))
    assert engine.steps[:2] == [{0: 40, 1: 24}, {0: 1, 1: 16, 2: 20}]
    assert first.failures == second.failures == third.failures == []
    assert second.tokens == alone.tokens and first.tokens == alone.tokens
    torch.testing.assert_close(torch.tensor(saves(second)["rows"]), torch.tensor(whole), rtol=0, atol=1e-4)
    (long,) = engine.generate((ids + ids, KEEP, params))
    assert engine.steps[:2] == [{0: 64}, {0: 16}]
    assert torch.tensor(saves(long)["rows"][0]).shape[0] == 80


def test_prompt_logprobs_of_a_prompt_in_pieces_are_those_without_a_graph(engine: RawEngine) -> None:
    ids = [3 + i % 50 for i in range(90)]
    params = {"max_tokens": 2, "prompt_logprobs": 1}
    body = Block([Read(2, "logits.output", None), Op(3, "py.size", [Ref(2)]), Op(4, "py.append", [Ref(0), Ref(3)])])
    data = graph(Op(0, "py.list"), Save(5, "shapes", Ref(0)), Iterations(6, 0, 2, 1, 1, body))
    (answer,) = engine.generate((ids, data, {**params, "cut": True}))
    (without,) = engine.generate(plain(ids, **params))
    assert saves(answer)["shapes"] == [[(1, VOCAB)], [(1, VOCAB)]]
    assert answer.output.prompt_logprobs == without.output.prompt_logprobs


def test_an_abort_in_the_middle_of_a_prompt_frees_all_of_it(engine: RawEngine) -> None:
    from vllm import SamplingParams

    core, pool = engine.llm.llm_engine, engine.core.scheduler.kv_cache_manager.block_pool
    engine.generate(plain(PROMPT, max_tokens=1))
    free = pool.get_num_free_blocks()
    extra = encode_extras(RequestExtras([KEEP], is_chunkable=True))
    core.add_request("1000000", {"prompt_token_ids": [7] * 100}, SamplingParams(max_tokens=2, extra_args=extra))
    for _ in range(3):
        if not engine.worker.executor._prefill.num_held:
            core.step()
    assert engine.worker.executor._prefill.num_held
    assert pool.get_num_free_blocks() < free
    core.abort_request(["1000000"])
    engine.generate(plain(PROMPT, max_tokens=1))
    assert engine.worker.executor._prefill.num_held == 0
    assert (pool.get_num_free_blocks(), engine.leftovers()) == (free, [])


def test_a_request_that_is_evicted_in_the_middle_of_its_prompt_fails_and_may_be_sent_again(engine: RawEngine) -> None:
    grows, long = [3 + i % 50 for i in range(63)], [9 + i % 40 for i in range(90)]
    params = {"max_tokens": 20, "cut": True}
    first, evicted = engine.generate((grows, PUSH, params), (long, KEEP, params))
    assert engine.steps[:2] == [{0: 63, 1: 1}, {0: 1, 1: 63}]
    assert 1 not in engine.steps[2]
    (failure,) = [delta.failure for delta in evicted.deltas if delta.failure]
    assert (failure.kind, failure.retryable) == ("PreemptedError", True)
    assert "rows" not in saves(evicted)
    assert first.tokens == engine.generate((grows, PUSH, params))[0].tokens


def test_a_graph_that_fails_in_the_middle_of_its_prompt_ends_its_request_there(engine: RawEngine) -> None:
    beyond = Tuple([Slice(None, None, None), 500])
    wrong = graph(Read(0, RESIDUAL, 0), Op(1, "py.getitem", [Ref(0), beyond]), Save(2, "rows", Ref(1)))
    long = [9 + i % 40 for i in range(120)]
    failed, other = engine.generate((long, wrong, {"max_tokens": 8, "cut": True}), plain(PROMPT, max_tokens=6))
    assert failed.failures == ["IndexError"]
    assert failed.tokens == []
    is_async = engine.core.scheduler.vllm_config.scheduler_config.async_scheduling
    assert [0 in rows for rows in engine.steps].count(True) == (2 if is_async else 1)  # the next step was on its way
    assert other.tokens == engine.generate(plain(PROMPT, max_tokens=6))[0].tokens
    assert engine.leftovers() == []


def test_state_is_reported_until_its_request_ends(engine: RawEngine) -> None:
    executor = engine.worker.executor
    engine.generate((PROMPT, PUSH, {"max_tokens": 1}))
    assert len(executor.requests) == 1  # the worker hears of the end with the next step
    assert engine.leftovers() == []
    assert executor.requests == {}


STOPS: dict[str, list[Any]] = {
    "stops": [Read(2, "samples.output", None), Stop(3)],
    "fails": [Read(2, "samples.output", None), Op(3, "py.getitem", [Ref(2), 99])],
}


WITHOUT_END: dict[str, dict[str, Any]] = {
    "ignores the end": {"ignore_eos": True},
    "asks for more": {"ignore_eos": False, "min_tokens": 30},
    "stops at tokens": {"ignore_eos": False, "stop_token_ids": [VOCAB - 1], "min_tokens": 30},
    "has no end": {"ignore_eos": False},
}


@pytest.mark.parametrize("kind", sorted(WITHOUT_END))
@pytest.mark.parametrize("how", sorted(STOPS))
def test_a_request_ends_in_the_step_in_which_its_graph_does(
    engine: RawEngine, how: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "has no end":
        _forget_the_end_token(engine, monkeypatch)
    ending = graph(Iterations(0, 3, None, 1, 1, Block(STOPS[how])))
    ended, other = engine.generate(
        (PROMPT, ending, {"max_tokens": 40, **WITHOUT_END[kind]}), plain(PROMPT, max_tokens=12)
    )
    assert (len(ended.tokens), ended.output.outputs[0].finish_reason) == (4, "abort")
    assert [delta.stopped or delta.failure is not None for delta in ended.deltas] == [True]
    num_steps = sum(0 in rows for rows in engine.steps)
    is_async = engine.core.scheduler.vllm_config.scheduler_config.async_scheduling
    assert num_steps == (5 if is_async else 4)  # the next step was on its way
    assert engine.free[num_steps] == engine.free[num_steps - 1] + 1  # one block held its few tokens
    assert other.tokens == engine.generate(plain(PROMPT, max_tokens=12))[0].tokens


def _forget_the_end_token(engine: RawEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's front end knows of a model whose configuration names none."""
    inputs = engine.llm.llm_engine.input_processor
    monkeypatch.setattr(inputs, "generation_config_fields", {})
    monkeypatch.setattr(inputs.renderer, "get_eos_token_id", lambda *args: None)


def test_a_graph_that_ends_with_its_request_ends_it_once(engine: RawEngine) -> None:
    ending = graph(Iterations(0, 3, None, 1, 1, Block(STOPS["stops"])))
    (ended,) = engine.generate((PROMPT, ending, {"max_tokens": 4}))
    assert (len(ended.tokens), ended.output.outputs[0].finish_reason) == (4, "length")
    assert engine.leftovers() == []
