"""Whatever a stranger sends as a graph, only errors of ours come out, at once, and nobody else notices."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hostile import Judge, case
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_vllm.graph.codec import encode

FINDINGS = sorted(path for path in (Path(__file__).parent / "hostile").iterdir() if path.suffix in (".bin", ".json"))
NUM_DRAWN = 1500
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_what_was_found_once_stays_harmless(judge: Judge, path: Path) -> None:
    judge.judge(path.read_bytes())


def test_drawn_graphs_are_refused_or_fail_or_run_and_nothing_else(judge: Judge) -> None:
    for number in range(NUM_DRAWN):
        judge.judge(case(random.Random(number)))
    assert min(judge.counts.values()) > NUM_DRAWN // 50


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(source=st.randoms(use_true_random=False))
def test_graphs_that_hypothesis_draws_do_neither(judge: Judge, source: random.Random) -> None:
    judge.judge(case(source))


def test_the_judge_sees_what_it_should(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight_vllm.graph.nodes import Block, Graph, Op, Read, Ref

    bad = encode(Graph(Block([Read(0, "1.out", 0), Op(1, "tensor.add_", [Ref(0), 1], writes="1.out")])))
    assert judge.judge(bad) == "ran"
    monkeypatch.setattr(judge, "_expected", (judge._expected[0] + 1, judge._expected[1]))
    with pytest.raises(AssertionError):
        judge.judge(bad)
