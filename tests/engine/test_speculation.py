"""An engine that speculates (n-gram) gives what one without does. Float32; requests with and without graphs in one batch.

Tolerance: other numbers of rows, other sums, as in test_isolation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nv
from nnsight_vllm.engine.compat import graph_of

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
LIMITS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 12}
BLOCK = 32
NUM_TOKENS = 24
TOLERANCE = 1e-4
Program = Callable[["VLLM", Any], list[Any]]


@dataclass
class Speculating:
    """An engine in this process. By whether a request has a graph: drafts that were verified, and how many stayed."""

    model: VLLM
    drafted: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    accepted: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    num_planned: int = 0  # for requests with graphs, by vLLM's own scheduler

    def __post_init__(self) -> None:
        scheduler = self.model.llm.llm_engine.engine_core.engine_core.scheduler
        update, close_plan = scheduler.update_from_output, scheduler._update_after_schedule

        def has_graph(id: str) -> bool:
            return graph_of(scheduler.requests[id].sampling_params) is not None

        def update_from_output(scheduled: Any, output: Any) -> Any:
            for id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
                if id in scheduler.requests:
                    self.drafted[has_graph(id)] += len(scheduled.scheduled_spec_decode_tokens.get(id, ()))
                    self.accepted[has_graph(id)] += max(len(tokens) - 1, 0)
            return update(scheduled, output)

        def update_after_schedule(scheduled: Any) -> None:
            self.num_planned += sum(map(has_graph, scheduled.scheduled_spec_decode_tokens))
            close_plan(scheduled)

        scheduler.update_from_output = update_from_output
        scheduler._update_after_schedule = update_after_schedule


@pytest.fixture(scope="module")
def speculating(tiny_checkpoint: Callable[[str], str]) -> Iterator[Speculating]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        checkpoint = tiny_checkpoint("llama")
        with nv.VLLM(checkpoint, dispatch=True, dtype="float32", seed=0, speculative_config=NGRAM, **LIMITS) as model:
            yield Speculating(model)
            model.check_integrity()


@pytest.fixture
def stock(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    return engines(tiny_checkpoint("llama"), **LIMITS)


def plain(model: VLLM, tracer: Any) -> list[Any]:
    return []


def reads(model: VLLM, tracer: Any) -> list[Any]:
    rows, tokens = nv.list().save(), nv.list().save()
    with tracer.all():
        rows.append(model.model.layers[2].output[0])
        tokens.append(model.samples.output)
    return [rows, tokens]


def pushes(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.all():
        model.model.layers[1].output[0][:] += 0.2
    return []


def pushes_harder(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.all():
        model.model.layers[1].output[0][:] += 0.4
    return []


def edits_logits(model: VLLM, tracer: Any) -> list[Any]:
    tops = nv.list().save()
    with tracer.all():
        scores = model.logits.output
        scores[:, ::2] -= 5.0
        tops.append(scores.topk(3).values)
    return [tops]


def sees_the_head(model: VLLM, tracer: Any) -> list[Any]:
    heads = nv.list().save()
    with tracer.all():
        heads.append(model.lm_head.output)
    return [heads]


def sets_tokens(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[3:9]:
        model.samples.output[0] = 11
    return []


def stops(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[10]:
        last = model.model.layers[0].output[0].save()
        tracer.stop()
    return [last]


MIX = [plain, reads, pushes, plain, edits_logits, pushes_harder, sees_the_head, plain, sets_tokens, sets_tokens, stops]


def repetitive(number: int, length: int = 20) -> list[int]:
    return [30 + (number * 7 + position) % 5 for position in range(length + number)]


def run(model: VLLM, programs: Sequence[Program], **sampling: Any) -> list[tuple[Any, list[Any]]]:
    """Results and saved values; a temperature is for requests with graphs: drafts are accepted at random."""
    assert model.llm.reset_prefix_cache()
    heat = {"temperature": sampling.pop("temperature", 0.0)}
    found = []
    with model.trace(max_tokens=NUM_TOKENS, ignore_eos=True, **sampling) as tracer:
        for number, program in enumerate(programs):
            own = {"temperature": 0.0} if program is plain else heat
            with tracer.invoke(repetitive(number), **own):
                saved = program(model, tracer)
                found.append((tracer.result.save(), saved))
    return [(result, [proxy.value for proxy in saved]) for result, saved in found]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * max(1.0, float(other.abs().max())))


def logprobs(result: Any) -> list[list[float]]:
    return [[step[token].logprob for token in sorted(step)] for step in result.logprobs]


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}, {"temperature": 1.0, "seed": 5}], ids=str)
def test_requests_get_the_tokens_and_values_of_an_engine_that_does_not_speculate(
    speculating: Speculating, stock: VLLM, sampling: dict[str, Any]
) -> None:
    before = dict(speculating.accepted)
    with_drafts = run(speculating.model, MIX, **sampling)
    without = run(stock, MIX, **sampling)
    for program, (result, saved), (expected, values) in zip(MIX, with_drafts, without, strict=True):
        name = program.__name__
        assert (name, result.token_ids) == (name, expected.token_ids)
        assert result.finish_reason == expected.finish_reason
        assert_same(saved, values)
        if "logprobs" in sampling:
            assert [set(step) for step in result.logprobs] == [set(step) for step in expected.logprobs]
            assert_same(torch.tensor(logprobs(result)), torch.tensor(logprobs(expected)))
    assert speculating.accepted[False] > before[False]
    assert speculating.drafted[True] == speculating.accepted[True] == 0


@pytest.mark.parametrize("program", [edits_logits, sets_tokens], ids=lambda program: program.__name__)
def test_a_prompt_of_which_one_token_is_left_gets_no_placeholders_with_a_graph(
    speculating: Speculating, stock: VLLM, program: Program
) -> None:
    ids = repetitive(0, BLOCK + 1)

    def answers(model: VLLM) -> list[Any]:
        assert model.llm.reset_prefix_cache()
        found = []
        for programs in ([plain], [program, plain]):  # the second time all but one token are in the cache
            with model.trace(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True) as tracer:
                for one in programs:
                    with tracer.invoke(ids):
                        saved = one(model, tracer)
                        found.append((tracer.result.save(), saved))
        assert [result.num_cached_tokens for result, _ in found] == [0, BLOCK, BLOCK]
        return [[list(result.token_ids), [proxy.value for proxy in saved]] for result, saved in found]

    before = speculating.num_planned
    for (tokens, saved), (expected, values) in zip(answers(speculating.model), answers(stock), strict=True):
        assert tokens == expected
        assert_same(saved, values)
    assert speculating.num_planned > before
    assert speculating.drafted[True] == 0
