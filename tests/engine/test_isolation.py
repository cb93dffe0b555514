"""Requests in one continuous batch know nothing of each other, in the compiled engine.

Tolerance: what differs between a batch and a request alone is the number of rows that a matrix product sees, hence the
order of its sums. In float32 (eps 1.2e-7) over 128 to 1536 terms and a few layers this gives relative errors around
1e-6 of a tensor's largest element; 1e-4 of it is allowed, and a wrong row or an edit of a neighbour's is of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import v2_on_cpu

import nnsight_vllm as nv
from nnsight_vllm.errors import InterventionError

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

TOLERANCE = 1e-4
NUM_REQUESTS = 32
CHOSEN = 77  # a token
LATER = 2  # a block

Body = Callable[[Any, Any], list[Any]]


def plain(model: Any, tracer: Any) -> list[Any]:
    return []


def read_only(model: Any, tracer: Any) -> list[Any]:
    early = model.model.layers[1].output[0].save()
    late = model.model.layers[LATER].mlp.output.save()
    logits = nv.list().save()
    with tracer.all():
        logits.append(model.logits.output)
    return [early, late, logits]


def adds_to_the_residual(model: Any, tracer: Any) -> list[Any]:
    stream = model.model.layers[1].output[0]
    stream[:] += torch.linspace(-1, 1, stream.shape[-1])
    return [model.model.layers[LATER].output[0].save(), model.logits.output.save()]


def sets_rows_in_two_iterations(model: Any, tracer: Any) -> list[Any]:
    rows = nv.list().save()
    with tracer.iter[1:3]:
        model.model.layers[0].mlp.output[-1] = 0.5
        rows.append(model.model.layers[0].output[0])
    return [rows]


def zeroes_an_mlp_always(model: Any, tracer: Any) -> list[Any]:
    logits = nv.list().save()
    with tracer.all():
        model.model.layers[1].mlp.output[:] = 0
        logits.append(model.logits.output)
    return [logits]


def scales_part_of_a_view(model: Any, tracer: Any) -> list[Any]:
    model.model.layers[LATER].self_attn.q_proj.output[:, ::2] *= 2
    return [model.model.layers[LATER].self_attn.output[0].save()]


def gives_a_norm_another_input(model: Any, tracer: Any) -> list[Any]:
    norm = model.model.layers[1].input_layernorm
    norm.input = norm.input + 0.3
    return [norm.output.save(), model.model.layers[1].output[0].save()]


def bans_tokens(model: Any, tracer: Any) -> list[Any]:
    with tracer.all():
        model.logits.output[:, ::3] = float("-inf")
    return []


def chooses_the_first_token(model: Any, tracer: Any) -> list[Any]:
    with tracer.iter[0]:
        model.samples.output = CHOSEN
    return []


def decides_by_a_value(model: Any, tracer: Any) -> list[Any]:
    stream = model.model.layers[1].output[0]
    with tracer.cond(stream[0].sum() > stream[-1].sum()) as condition:
        stream[-1] *= 2
    with condition.else_():
        stream[-1] *= -1
    return [stream.save()]


def stops(model: Any, tracer: Any) -> list[Any]:
    with tracer.iter[2]:
        last = model.model.layers[1].output[0].save()
        tracer.stop()
    return [last]


def fails_at_once(model: Any, tracer: Any) -> list[Any]:
    stream = model.model.layers[0].output[0]
    stream[(stream[:, 0] > 1e9).nonzero()[0]] = 0
    return []


def fails_later(model: Any, tracer: Any) -> list[Any]:
    with tracer.iter[2]:
        stream = model.model.layers[1].output[0]
        stream[(stream[:, 0] > 1e9).nonzero()[0]] = 0
    return []


def overflows(model: Any, tracer: Any) -> list[Any]:
    model.model.layers[0].mlp.output[0] = float("inf")
    return [model.model.layers[0].output[0].save()]


FILLING: list[Body] = [plain] * 6  # with two of every kind that makes 32
KINDS: list[Body] = [
    read_only,
    adds_to_the_residual,
    sets_rows_in_two_iterations,
    zeroes_an_mlp_always,
    scales_part_of_a_view,
    gives_a_norm_another_input,
    bans_tokens,
    chooses_the_first_token,
    decides_by_a_value,
    stops,
    fails_at_once,
    fails_later,
    overflows,
]
MIX: list[Body] = [kind for one in KINDS for kind in (one, one)] + FILLING
HARMLESS = [kind for kind in KINDS if kind not in (stops, fails_at_once, fails_later)]


@dataclass(frozen=True)
class Asked:
    """One request: what it does, its prompt's ids, how many tokens it wants."""

    body: Body
    prompt: list[int]
    max_tokens: int


@dataclass
class Got:
    """What came of it."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    values: list[Any] = field(default_factory=list)
    error: str | None = None


def mixed(vocabulary: int, longest_plain: int) -> list[Asked]:
    """Kinds take turns; lengths and answers differ; some plain prompts are longer than a step takes."""
    asked = []
    for number in range(NUM_REQUESTS):
        body = MIX[number * 5 % NUM_REQUESTS]  # 5 and 32 have no common divisor
        length = longest_plain - number if body is plain else 3 + number * 7 % 20
        prompt = [3 + (number * 31 + position * position) % (vocabulary - 3) for position in range(length)]
        asked.append(Asked(body, prompt, 4 + number % 5))
    return asked


def run(model: VLLM, *asked: Asked) -> list[Got]:
    """All of them in one trace."""
    got = [Got() for _ in asked]
    results: list[Any] = []
    saved: list[list[Any]] = []
    errors: list[str] = []
    try:
        with model.trace(temperature=0.0, ignore_eos=True) as tracer:
            for one in asked:
                with tracer.invoke(one.prompt, max_tokens=one.max_tokens):
                    results.append(tracer.result.save())
                    saved.append(one.body(model, tracer))
    except* InterventionError as group:
        errors = [str(error) for error in group.exceptions]
    for answer, result, values in zip(got, results, saved, strict=True):
        answer.tokens, answer.reason = list(result.token_ids), result.finish_reason
        if answer.reason == "error":
            answer.error = errors.pop(0)
        else:
            answer.values = [plain_value(value) for value in values]
    assert errors == []
    return got


def plain_value(proxy: Any) -> Any:
    value = proxy.value
    return list(value) if isinstance(value, list) else value


def difference(one: Any, other: Any) -> float:
    """The largest difference of two saved values, in terms of the largest finite element; NaN and infinities must be alike."""
    if isinstance(one, list):
        assert len(one) == len(other)
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    assert one.shape == other.shape
    finite = one.isfinite()
    assert torch.equal(finite, other.isfinite())
    a, b = one[finite].double(), other[finite].double()
    return float((a - b).abs().max() / b.abs().max()) if len(a) else 0.0


def assert_each_gets_what_it_gets_alone(model: VLLM, asked: list[Asked]) -> None:
    together = run(model, *asked)
    for one, got in zip(asked, together, strict=True):
        (alone,) = run(model, one)
        name = one.body.__name__
        assert (name, got.tokens, got.reason, got.error) == (name, alone.tokens, alone.reason, alone.error)
        assert difference(got.values, alone.values) < TOLERANCE, name
    reasons = [got.reason for got in together]
    assert (reasons.count("error"), reasons.count("stop")) == (4, 2)


# -- float32: the same within rounding -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    """Ten requests and 64 tokens a step: 32 requests change places, and longer prompts are computed in pieces."""
    limits = {"max_model_len": 128, "max_num_batched_tokens": 64, "max_num_seqs": 10}
    model = engines(tiny_checkpoint("llama"), enforce_eager=v2_on_cpu.IS_CHOSEN, **limits)
    yield model
    model.check_integrity()


def test_a_wrong_row_exceeds_the_tolerance() -> None:
    right = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert difference([right], [right * (1 + 1e-6)]) < TOLERANCE < difference([right], [right.roll(1, 0)])
    assert difference([right, [right]], [right, [right + 0.01]]) > TOLERANCE


@pytest.mark.v2
def test_in_a_mixed_batch_each_request_gets_what_it_gets_alone(tiny: VLLM) -> None:
    assert_each_gets_what_it_gets_alone(tiny, mixed(vocabulary=500, longest_plain=100))


def test_in_a_mixed_batch_of_the_demo_model_each_request_gets_what_it_gets_alone(
    engines: Engines, smollm2: str
) -> None:
    model = engines(smollm2)
    assert_each_gets_what_it_gets_alone(model, mixed(vocabulary=49152, longest_plain=60))
    model.check_integrity()


@pytest.mark.v2
def test_the_next_owner_of_a_cache_block_inherits_no_infinities(tiny: VLLM) -> None:
    ask = Asked(plain, [5, 17, 33, 90, 41, 7], 6)
    (before,) = run(tiny, ask)
    for _ in range(3):
        run(tiny, *[Asked(overflows, [7 + number, 6, 5], 4) for number in range(6)])
        assert run(tiny, ask) == [before]


# -- the same shapes: the same bits --------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """An engine in this process. `steps`: since the last `clear`, the rows of each request in each step, in batch order."""

    model: VLLM
    steps: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        core = self.model.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        execute = runner.execute_model

        def execute_model(scheduled: Any, *args: Any) -> Any:
            if scheduled.num_scheduled_tokens:
                self.steps.append(list(scheduled.num_scheduled_tokens.values()))
            return execute(scheduled, *args)

        runner.execute_model = execute_model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def recorded(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], str]) -> Iterator[Recorded]:
    from nnsight_vllm import VLLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with VLLM(
            tiny_checkpoint("llama"),
            dispatch=True,
            dtype=request.param,
            max_model_len=128,
            max_num_batched_tokens=256,
            max_num_seqs=NUM_REQUESTS,
            max_logprobs=500,
        ) as model:
            yield Recorded(model)
            model.check_integrity()


def drawn(engine: Recorded, bodies: list[Body]) -> tuple[list[Any], list[list[int]]]:
    """Tokens and the logprobs of the whole vocabulary, of 32 requests of the same length; and the rows of every step."""
    engine.steps.clear()
    results = []
    with engine.model.trace(temperature=0.0, ignore_eos=True, max_tokens=6, logprobs=500) as tracer:
        for number, body in enumerate(bodies):
            with tracer.invoke([3 + (number * 31 + position * 7) % 490 for position in range(8)]):
                results.append(tracer.result.save())
                body(engine.model, tracer)
    assert [result.num_cached_tokens for result in results] == [0] * len(bodies)
    logprobs = [[{id: p.logprob for id, p in step.items()} for step in result.logprobs] for result in results]
    assert {len(step) for steps in logprobs for step in steps} == {500}
    return list(zip([result.token_ids for result in results], logprobs, strict=True)), list(engine.steps)


def test_where_shapes_agree_plain_requests_get_the_same_bits(recorded: Recorded) -> None:
    bodies = [plain if number % 3 == 0 else HARMLESS[number % len(HARMLESS)] for number in range(NUM_REQUESTS)]
    assert set(bodies) == {plain, *HARMLESS}
    among_plain, plain_steps = drawn(recorded, [plain] * NUM_REQUESTS)
    among_graphs, mixed_steps = drawn(recorded, bodies)
    assert mixed_steps == plain_steps == [[8] * NUM_REQUESTS] + [[1] * NUM_REQUESTS] * 5
    for number, body in enumerate(bodies):
        if body is plain:
            assert among_graphs[number] == among_plain[number]
    edited = [number for number, body in enumerate(bodies) if body is zeroes_an_mlp_always]
    assert all(among_graphs[number] != among_plain[number] for number in edited)
