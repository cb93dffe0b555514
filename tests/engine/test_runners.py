"""vLLM's V2 model runner gives what V1 gives, and in a batch what it gives a request alone. Float32.

Run with VLLM_USE_V2_MODEL_RUNNER=1, in which the engines of this process use V2; V1's answers come from another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mixed_requests as mixed
import pytest
import torch
import v2_on_cpu
from raw_engine import RawEngine
from toy import graph

from nnsight_vllm.graph.nodes import Read, Ref, Save

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

pytestmark = [
    pytest.mark.v2,
    pytest.mark.skipif(not v2_on_cpu.IS_CHOSEN, reason="make test runs these with VLLM_USE_V2_MODEL_RUNNER=1"),
]
NUM_TOKENS = 12
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def answers_of_v1(tiny_checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("v1") / "answers.pt"
    changed = {v2_on_cpu.VARIABLE: "0", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/mixed_requests.py", tiny_checkpoint("llama"), str(file), str(NUM_TOKENS)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return torch.load(file)


@pytest.fixture(scope="module")
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    model = engines(tiny_checkpoint("llama"), **mixed.LIMITS)
    assert model.llm.llm_engine.vllm_config.use_v2_model_runner
    yield model
    model.check_integrity()


def test_v2_gives_the_tokens_values_and_logprobs_of_v1(model: VLLM, answers_of_v1: Any) -> None:
    found = mixed.answers(model, range(len(mixed.MIX)), NUM_TOKENS, logprobs=2)
    mixed.assert_same(found, answers_of_v1)


def test_a_request_in_a_batch_gets_what_it_gets_alone(model: VLLM) -> None:
    together = mixed.answers(model, range(len(mixed.MIX)), NUM_TOKENS)
    for number in range(len(mixed.MIX)):
        mixed.assert_same([together[number]], mixed.answers(model, [number], NUM_TOKENS))


def test_only_steps_without_graphs_may_be_replays_of_captured_graphs(tiny_checkpoint: Callable[[str], str]) -> None:
    engine = RawEngine(tiny_checkpoint("llama"), max_model_len=64, max_num_seqs=2)
    asked = []
    manager = engine.worker.model_runner.cudagraph_manager
    dispatch = manager.dispatch

    def choose(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return dispatch(*args, **kwargs)

    manager.dispatch = choose
    reading = graph(Read(0, "model.layers.1.output", 1), Save(1, "h", Ref(0)))
    engine.generate(([1, 2, 3], None, {"max_tokens": 3}))
    assert len(asked) == 3
    engine.generate(([1, 2, 3], reading, {"max_tokens": 3}))
    assert len(asked) == 3
    engine.close()
