"""An engine that speculates (n-grams) gives what one without does: requests with and without graphs in one batch, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mixed_requests as mixed
import pytest

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
NUM_TOKENS = 24
EVERYBODY = range(len(mixed.MIX))
WITH_GRAPHS = [number for number in EVERYBODY if mixed.MIX[number] is not mixed.plain]


@dataclass
class Speculating:
    model: VLLM

    def count(self, what: str) -> int:
        """What vLLM counted since it started: draft tokens that were verified, or those accepted."""
        (found,) = [one for one in self.model.llm.get_metrics() if one.name == f"vllm:spec_decode_num_{what}_tokens"]
        return int(found.value)


@pytest.fixture
def speculating(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Speculating:
    settings = {"speculative_config": NGRAM, "disable_log_stats": False, **mixed.LIMITS}
    return Speculating(engines(tiny_checkpoint("llama"), **settings))


@pytest.fixture
def stock(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    return engines(tiny_checkpoint("llama"), **mixed.LIMITS)


@pytest.mark.v2
@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}], ids=str)
def test_requests_get_the_tokens_and_values_of_an_engine_that_does_not_speculate(
    stock: VLLM, speculating: Speculating, sampling: dict[str, Any]
) -> None:
    before = speculating.count("accepted")
    found = mixed.answers(speculating.model, EVERYBODY, NUM_TOKENS, **sampling)
    assert speculating.count("accepted") > before
    mixed.assert_same(found, mixed.answers(stock, EVERYBODY, NUM_TOKENS, **sampling))
    speculating.model.check_integrity()


def test_nothing_is_drafted_for_requests_with_graphs(speculating: Speculating) -> None:
    before = speculating.count("draft")
    found = mixed.answers(speculating.model, WITH_GRAPHS, NUM_TOKENS)
    assert speculating.count("draft") == before
    assert sum(len(answer["tokens"]) for answer in found) > NUM_TOKENS


def test_graphs_whose_tokens_are_drawn_by_a_seed_get_the_same_beside_drafts(
    stock: VLLM, speculating: Speculating
) -> None:
    """What the others get isn't compared: vLLM's own CPU build errs for a greedy one with drafts beside drawn ones."""
    before = speculating.count("accepted")
    found = mixed.answers(speculating.model, EVERYBODY, NUM_TOKENS, temperature=1.0, seed=5)
    assert speculating.count("accepted") > before
    expected = mixed.answers(stock, EVERYBODY, NUM_TOKENS, temperature=1.0, seed=5)
    mixed.assert_same([found[number] for number in WITH_GRAPHS], [expected[number] for number in WITH_GRAPHS])


@pytest.mark.parametrize("program", [mixed.edits_logits, mixed.sets_tokens], ids=lambda program: program.__name__)
def test_a_prompt_of_which_one_token_is_left_gets_no_placeholders_with_a_graph(
    stock: VLLM, speculating: Speculating, program: mixed.Program
) -> None:
    block = mixed.LIMITS["block_size"]
    ids = mixed.prompt(0, block + 1)

    def answer(model: VLLM, one: mixed.Program, max_tokens: int = NUM_TOKENS) -> list[Any]:
        with model.trace(ids, temperature=0.0, max_tokens=max_tokens, ignore_eos=True) as tracer:
            saved = one(model, tracer)
            result = tracer.result.save()
        return [result.num_cached_tokens, list(result.token_ids), [proxy.value for proxy in saved]]

    for model in (speculating.model, stock):
        assert model.llm.reset_prefix_cache()
        assert answer(model, mixed.plain, 1)[0] == 0
    before = speculating.count("draft")
    assert answer(speculating.model, mixed.plain, 1)[0] == block
    padded = speculating.count("draft")
    assert padded == before + NGRAM["num_speculative_tokens"]  # type: ignore[operator]
    cached, tokens, saved = answer(speculating.model, program)
    assert speculating.count("draft") == padded
    assert [cached, tokens] == [block, answer(stock, program)[1]]
    mixed.assert_close(saved, answer(stock, program)[2])
