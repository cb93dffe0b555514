"""Sites in the compiled model, and nobody there: the stock engine's tokens, and compiled code that is never mixed up.

Every engine is a process of its own, started by the benchmark that publishes the same comparison in bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FIDELITY = Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity.py"
NUM_PROMPTS, NUM_TOKENS = 32, 16
SETTINGS: dict[str, Any] = {"all": "all", "blocks": "blocks", "patterns": ["model.layers.*.mlp", "*.q_proj"]}

Answers = dict[str, Any]

pytestmark = pytest.mark.timeout(900)  # two engines compile a real model


def answers(checkpoint: str, sites: Any) -> Answers:
    """Greedy `tokens` of a new engine's answers, and `cache`, the folder of its compiled code."""
    job = {
        "checkpoint": checkpoint,
        "sites": sites,
        "dtype": "float32",
        "num_tokens": NUM_TOKENS,
        "at_once": NUM_PROMPTS,
    }
    command = [sys.executable, str(FIDELITY), "--engine", json.dumps(job)]
    environment = {**os.environ, "VLLM_USE_AOT_COMPILE": "1"}  # so that vLLM's own cache of compiled code is in use
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found: Answers = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def answers_with(smollm2: str) -> Callable[[str], Answers]:
    """The answers of the engine with a setting's name, or of "stock"; each engine runs once."""
    return cache(lambda name: answers(smollm2, SETTINGS.get(name, name)))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_idle_engine_generates_the_stock_engines_tokens_in_float32(
    name: str, answers_with: Callable[[str], Answers]
) -> None:
    stock = answers_with("stock")["tokens"]
    assert [len(tokens) for tokens in stock] == [NUM_TOKENS] * NUM_PROMPTS
    assert answers_with(name)["tokens"] == stock


def test_each_setting_has_compiled_code_of_its_own(answers_with: Callable[[str], Answers]) -> None:
    folders = [answers_with(name)["cache"] for name in ("stock", *SETTINGS)]
    assert all(any((Path(folder) / "rank_0_0").iterdir()) for folder in folders)
    assert len(set(folders)) == len(folders)
