"""Churn: requests come, meet, are evicted, aborted, stop and fail, and each gets what it gets alone. Float32, drawn scenarios.

    NNSIGHT_VLLM_FUZZ=5000 python -m pytest tests/engine/test_churn.py -k fuzz -s      # `make fuzz`: other scenarios each time

A failure prints a scenario; put it into `KEPT` with its engine's name, and it stays tested.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from churn import Churn
from churn_draws import INDEPENDENT, scenarios
from churn_engine import Got
from churn_judge import TOLERANCE, judge
from churn_scenario import Arrival, Ask, Graph, Prompt, Scenario, Settings
from churn_tally import Tally
from hypothesis import HealthCheck, Phase, given, seed, settings

NUM_FUZZED = int(os.environ.get("NNSIGHT_VLLM_FUZZ", "0"))
NUM_SCENARIOS = 320
ALWAYS = ("front", "samples", "sampled", "waited", "aborts", "stops", "texts", "failures", "same bits", "plain bits")

SMALL: dict[str, Any] = {"enforce_eager": True, "max_model_len": 96, "max_num_seqs": 8, "block_size": 32}
FEW_BLOCKS = SMALL | {"num_gpu_blocks_override": 9}
UNCACHED = {"block_size": 64, "num_gpu_blocks_override": 4, "enable_prefix_caching": False}
ENGINES = [
    Settings("roomy", SMALL, occurs=("hits", "hits of edits", "grouped")),
    Settings("small steps", SMALL, step=80, occurs=("hits", "cut graphs", "grouped")),
    Settings(
        "tiny steps", SMALL | {"max_num_seqs": 5}, step=40, occurs=("refused", "cut graphs", "hits", "hits of edits")
    ),
    Settings(
        "small memory",
        SMALL | {"max_num_seqs": 5, "num_gpu_blocks_override": 5},
        step=128,
        memory=128,
        occurs=("hits", "evicted plain", "evicted graphs"),
    ),
    Settings(
        "small memory without a prefix cache",
        SMALL | UNCACHED,
        step=96,
        memory=192,
        occurs=("evicted graphs", "cut graphs"),
    ),
    Settings("two seats", SMALL | {"max_num_seqs": 2}, step=88, occurs=("hits", "cut")),
    Settings("one by one", FEW_BLOCKS | {"batching": False}, step=96, memory=256, occurs=("hits", "cut")),
    Settings(
        "asynchronous", FEW_BLOCKS, step=72, memory=256, is_asynchronous=True, occurs=("hits", "cut graphs", "grouped")
    ),
    Settings(
        "compiled",
        SMALL | {"enforce_eager": False, "block_size": 64},
        step=64,
        occurs=("hits", "cut graphs", "grouped"),
    ),
]

KEPT: list[tuple[str, Scenario]] = []


@pytest.mark.timeout(0 if NUM_FUZZED else 900)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_fuzzed_requests_get_what_they_get_alone(engine: Settings, tiny_checkpoint: Callable[[str], str]) -> None:
    share = -(-(NUM_FUZZED or NUM_SCENARIOS) // len(ENGINES))
    with Churn(tiny_checkpoint("llama"), engine) as churn:
        for name, scenario in KEPT:
            if name == engine.name:
                churn.check(scenario)

        wanted, first = (
            churn.tally["scenarios"] + share,
            random.randrange(2**32) if NUM_FUZZED else ENGINES.index(engine),
        )
        while (missing := wanted - churn.tally["scenarios"]) > 0:  # one whose requests are all refused isn't played

            @_profile(missing)
            @seed(first + len(ENGINES) * missing)
            @given(scenarios(engine))
            def check(scenario: Scenario) -> None:
                churn.check(scenario)

            check()
        print(f"\n{engine.name}: the largest difference was {churn.worst:.1e}\n{churn.tally.report()}")
        churn.tally.require_few_ties()
        churn.tally.require((*ALWAYS, *engine.occurs))


def _profile(count: int) -> settings:
    return settings(
        max_examples=count,
        backend=INDEPENDENT,
        deadline=None,
        database=None,
        print_blob=False,  # the scenario is a literal
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


# -- the judge can fail --------------------------------------------------------------------------------------------------

ASK = Ask(Prompt(own=5), Graph("reads last rows"), max_tokens=3)


def _got(**changes: object) -> Got:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, generator=draw) for _ in range(3)]
    logits = {token: torch.arange(8.0).roll(token) for token in range(3)}
    got = Got(
        tokens=[7, 0, 1], text="abc", reason="length", values={"s0": rows}, logits=logits, steps=[((0, 0, 0, 5),)]
    )
    for name, value in changes.items():
        setattr(got, name, value)
    return got


OTHER_STEPS = [((0, 0, 0, 5), (1, 0, 0, 9))]


def test_equal_results_are_accepted_and_told_apart_by_their_steps() -> None:
    assert judge(ASK, 0, _got(), _got(), ()).is_same_bits
    verdict = judge(ASK, 0, _got(steps=OTHER_STEPS), _got(), ())
    assert not (verdict.is_same_bits or verdict.is_tie)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "abd"},
        {"reason": "stop"},
        {"logs": ["one"]},
        {"tokens": [7, 0], "steps": OTHER_STEPS},
        {"tokens": [7, 0, 2]},
        {"tokens": [7, 0, 2], "steps": OTHER_STEPS},
        {"values": {}},
        {"values": {"s0": _got().values["s0"][:2]}, "steps": OTHER_STEPS},
        {"values": {"s0": [row + 1e-3 for row in _got().values["s0"]]}, "steps": OTHER_STEPS},
        {"values": {"s0": [row * (1 + 1e-6) for row in _got().values["s0"]]}},
        {"values": {"s0": [row * torch.nan for row in _got().values["s0"]]}, "steps": OTHER_STEPS},
        {"logits": {1: _got().logits[1] + 0.01}, "steps": OTHER_STEPS},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_results_are_not(changes: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        judge(ASK, 0, _got(**changes), _got(), ())


def test_a_token_may_be_another_where_two_are_as_good() -> None:
    near = _got().logits
    near[2][2] = near[2].max() - TOLERANCE
    other = _got(tokens=[7, 0, 2], steps=OTHER_STEPS, logits=near)
    assert judge(ASK, 0, other, _got(logits=near), ()).is_tie
    with pytest.raises(AssertionError):
        judge(ASK, 0, _got(tokens=[7, 0, 3], steps=OTHER_STEPS, logits=near), _got(logits=near), ())
    changed = [*_got().values["s0"][:2], torch.zeros(8)]
    with pytest.raises(AssertionError):  # what was saved up to the tie must be right
        judge(
            ASK,
            0,
            _got(tokens=[7, 0, 2], values={"s0": changed}, steps=OTHER_STEPS, logits=near),
            _got(logits=near),
            (),
        )


def test_a_branch_may_be_another_where_its_value_is_as_good_as_zero() -> None:
    alone = _got(values={"s0": [torch.tensor(1e-6)]})
    assert judge(
        ASK, 0, _got(values={"s0": [torch.tensor(-1e-6)]}, text="abd", steps=OTHER_STEPS), alone, ("s0",)
    ).is_tie
    with pytest.raises(AssertionError):
        judge(ASK, 0, _got(values={"s0": [torch.tensor(-1e-6)]}, text="abd", steps=OTHER_STEPS), alone, ())


def test_an_aborted_request_has_the_beginning_of_what_it_would_have_got() -> None:
    rows = _got().values["s0"]
    judge(ASK, 0, _got(tokens=[7], text="a", values={"s0": rows[:1]}, steps=OTHER_STEPS), _got(), (), is_whole=False)
    with pytest.raises(AssertionError):
        judge(ASK, 0, _got(tokens=[7], values={"s0": rows[1:2]}, steps=OTHER_STEPS), _got(), (), is_whole=False)


def test_a_scenario_is_a_literal() -> None:
    scenario = Scenario((Arrival(ASK, 3, 5), Arrival(Ask(Prompt(), stop="e"))), front=False)
    names = {kind.__name__: kind for kind in (Scenario, Arrival, Ask, Prompt, Graph)}
    assert eval(repr(scenario), names) == scenario


def test_a_class_that_never_came_up_is_missed() -> None:
    tally = Tally()
    tally.note("hits")
    tally.require(["hits"])
    with pytest.raises(AssertionError, match="aborts"):
        tally.require(["hits", "aborts"])
    tally.note("ties")
    with pytest.raises(AssertionError):
        tally.require_few_ties()
