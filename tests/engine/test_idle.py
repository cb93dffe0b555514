"""Sites in the compiled model, and nobody there: the stock engine's tokens, and compiled code that is never mixed up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fidelity import PROMPTS, STOCK, Answers, answers

NUM_TOKENS = 20
SETTINGS: dict[str, Any] = {"all": "all", "blocks": "blocks", "patterns": ["model.layers.*.mlp", "*.q_proj"]}


@pytest.fixture(scope="module")
def stock(smollm2: str) -> Answers:
    return answers(smollm2, STOCK, "float32", NUM_TOKENS)


@pytest.fixture(scope="module")
def caches() -> dict[str, str]:
    """The folders of compiled code that engines have used, by what they were."""
    return {}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_idle_engine_generates_the_stock_engines_tokens_in_float32(
    name: str, stock: Answers, caches: dict[str, str], smollm2: str
) -> None:
    idle = answers(smollm2, SETTINGS[name], "float32", NUM_TOKENS)
    assert len(stock.tokens) == len(PROMPTS) == 32
    assert {len(tokens) for tokens in stock.tokens} == {NUM_TOKENS}
    assert idle.tokens == stock.tokens
    caches[name] = idle.cache


def test_each_setting_has_compiled_code_of_its_own(stock: Answers, caches: dict[str, str]) -> None:
    assert set(caches) == set(SETTINGS)
    folders = [stock.cache, *caches.values()]
    assert all(Path(folder).is_dir() for folder in folders)
    assert len(set(folders)) == len(folders)
