"""An engine that speculates (n-grams) gives what one without does: requests with and without graphs in one batch, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mixed_requests as mixed
import pytest

import nnsight_vllm as nv
from nnsight_vllm.engine.compat import graph_of

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

pytestmark = pytest.mark.filterwarnings(
    r"ignore:\s*Encountered the use of a type that is scheduled for deprecation"
)  # numba's
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
NUM_TOKENS = 24


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
    model = nv.VLLM(tiny_checkpoint("llama"), dtype="float32", speculative_config=NGRAM, **mixed.LIMITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _ = model.llm
    with model:
        yield Speculating(model)
        model.check_integrity()


@pytest.fixture
def stock(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> VLLM:
    return engines(tiny_checkpoint("llama"), **mixed.LIMITS)


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}], ids=str)
def test_requests_get_the_tokens_and_values_of_an_engine_that_does_not_speculate(
    stock: VLLM, speculating: Speculating, sampling: dict[str, Any]
) -> None:
    before, numbers = speculating.accepted[False], range(len(mixed.MIX))
    found = mixed.answers(speculating.model, numbers, NUM_TOKENS, **sampling)
    mixed.assert_same(found, mixed.answers(stock, numbers, NUM_TOKENS, **sampling))
    assert speculating.accepted[False] > before
    assert speculating.drafted[True] == speculating.accepted[True] == 0


def test_graphs_whose_tokens_are_drawn_by_a_seed_get_the_same_beside_drafts(
    stock: VLLM, speculating: Speculating
) -> None:
    """What the others get isn't compared: vLLM's own CPU build errs for a greedy one with drafts beside drawn ones."""
    before, numbers = speculating.accepted[False], range(len(mixed.MIX))
    engines = (speculating.model, stock)
    found = [mixed.answers(model, numbers, NUM_TOKENS, temperature=1.0, seed=5) for model in engines]
    mixed.assert_same(*([answer for answer in answers if answer["name"] != "plain"] for answers in found))
    assert speculating.accepted[False] > before
    assert speculating.drafted[True] == 0


@pytest.mark.parametrize("program", [mixed.edits_logits, mixed.sets_tokens], ids=lambda program: program.__name__)
def test_a_prompt_of_which_one_token_is_left_gets_no_placeholders_with_a_graph(
    stock: VLLM, speculating: Speculating, program: mixed.Program
) -> None:
    block = mixed.LIMITS["block_size"]
    ids = mixed.prompt(0, block + 1)

    def answers(model: VLLM) -> list[Any]:
        assert model.llm.reset_prefix_cache()
        found = []
        for programs in ([mixed.plain], [program, mixed.plain]):  # the second time all but one token are in the cache
            with model.trace(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True) as tracer:
                for one in programs:
                    with tracer.invoke(ids):
                        saved = one(model, tracer)
                        found.append((tracer.result.save(), saved))
        assert [result.num_cached_tokens for result, _ in found] == [0, block, block]
        return [(list(result.token_ids), [proxy.value for proxy in saved]) for result, saved in found]

    before = speculating.num_planned
    for (tokens, saved), (expected, values) in zip(answers(speculating.model), answers(stock), strict=True):
        assert tokens == expected
        mixed.assert_close(saved, values)
    assert speculating.num_planned > before
    assert speculating.drafted[True] == 0
