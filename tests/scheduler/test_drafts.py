"""Drafts beside graphs: the rule by itself, and rows of logits and tokens that aren't one a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from toy import VOCAB, Toy, graph

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.graph.nodes import Block, Iterations, Node, Op, Read, Ref, Save, Slice, Tuple, Write
from nnsight_vllm.scheduler.drafts import DraftPolicy, refuse_other_methods
from nnsight_vllm.wire.extras import RequestExtras, encode_extras


@dataclass
class FakeRequest:
    has_graph: bool
    spec_token_ids: list[int] = field(default_factory=lambda: [7, 8, 9])

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(extra_args=encode_extras(RequestExtras([b""])) if self.has_graph else None)


class Base:
    """Stands for vLLM's scheduler: `schedule` gives every request's drafts, `planned` is what its bookkeeping goes by."""

    requests: dict[str, FakeRequest]
    planned: dict[str, int]

    def schedule(self) -> dict[str, list[int]]:
        return {name: request.spec_token_ids for name, request in self.requests.items()}

    def _update_after_schedule(self, scheduled: Any) -> None:
        self.planned = dict(scheduled.num_scheduled_tokens)


class Drafting(DraftPolicy, Base):
    def __init__(self, num_spec_tokens: int = 3) -> None:
        self.requests = {"plain": FakeRequest(False), "graph": FakeRequest(True)}
        self.running = list(self.requests.values())
        self.num_spec_tokens = num_spec_tokens


def test_what_was_drafted_for_a_request_with_a_graph_is_dropped_before_the_step_is_planned() -> None:
    assert Drafting().schedule() == {"plain": [7, 8, 9], "graph": []}


def test_without_speculative_decoding_nothing_is_looked_at() -> None:
    scheduler = Drafting(num_spec_tokens=0)
    scheduler.running = [object()]
    scheduler.schedule()


def test_placeholders_for_a_request_with_a_graph_are_taken_out_of_the_plan() -> None:
    scheduled = SimpleNamespace(
        scheduled_spec_decode_tokens={"plain": [-1, -1], "graph": [-1, -1, -1]},
        num_scheduled_tokens={"plain": 3, "graph": 4},
        total_num_scheduled_tokens=7,
    )
    scheduler = Drafting()
    scheduler._update_after_schedule(scheduled)
    assert scheduled.scheduled_spec_decode_tokens == {"plain": [-1, -1]}
    assert scheduled.num_scheduled_tokens == scheduler.planned == {"plain": 3, "graph": 1}
    assert scheduled.total_num_scheduled_tokens == 4


@pytest.mark.parametrize("method", ["ngram_gpu", "eagle3", "mtp", "draft_model", "suffix"])
def test_a_method_that_vllm_made_of_something_else_is_refused_by_name(method: str) -> None:
    with pytest.raises(EngineSettingError, match=method):
        refuse_other_methods(SimpleNamespace(method=method))
    refuse_other_methods(SimpleNamespace(method="ngram"))
    refuse_other_methods(None)


# -- rows ----------------------------------------------------------------------------------------------------------------


def every_iteration(*nodes: Node) -> Iterations:
    return Iterations(0, 0, None, 1, 1, Block(list(nodes)))


LOGITS = Read(2, "logits.output", None)
APPEND = Op(3, "py.append", [Ref(8), Ref(2)])
READS_LOGITS = graph(Op(8, "py.list"), Save(9, "seen", Ref(8)), every_iteration(LOGITS, APPEND))
PUSH = Op(3, "py.setitem", [Ref(2), Tuple([Slice(), 6]), 50.0], writes="logits.output")
ADDS_TO_LOGITS = graph(every_iteration(LOGITS, PUSH))
SETS_TOKENS = graph(every_iteration(Write(2, "samples.output", 5, None)))


@pytest.mark.parametrize("num_alike", [1, 2], ids=["alone", "as a group"])
@pytest.mark.parametrize("batching", [True, False])
def test_a_graph_has_its_own_row_among_the_logits_of_neighbours_with_drafts(num_alike: int, batching: bool) -> None:
    toy = Toy(batching=batching)
    names = [f"r{i}" for i in range(num_alike)]
    for name in names:
        toy.add(name, ADDS_TO_LOGITS)
    toy.step(p=(2, 0), **{name: (2, 0) for name in names}, q=(2, 0))
    toy.drafts = {"p": 3, "q": 1}
    toy.step(p=(4, 2), **{name: (1, 2) for name in names}, q=(2, 2))
    changed = [row for row, logits in enumerate(toy.logits.tolist()) if logits[6] == 50.0]
    assert changed == [4 + i for i in range(num_alike)]
    assert toy.tokens[:, 0].tolist() == [0, *[6] * num_alike, 0]


@pytest.mark.parametrize("num_alike", [1, 2], ids=["alone", "as a group"])
@pytest.mark.parametrize("batching", [True, False])
def test_a_graph_reads_its_own_logits_and_sets_its_own_token(num_alike: int, batching: bool) -> None:
    toy = Toy(batching=batching)
    for i in range(num_alike):
        toy.add(f"r{i}", READS_LOGITS)
        toy.add(f"s{i}", SETS_TOKENS)
    others = {f"{kind}{i}": (2, 0) for kind in "rs" for i in range(num_alike)}
    toy.step(p=(2, 0), **others)
    toy.drafts = {"p": 2}
    toy.step(p=(3, 2), **{name: (1, 2) for name in others})
    assert all(toy.saved[f"r{i}"]["seen"] == [[[3.0] * VOCAB]] * 2 for i in range(num_alike))
    assert toy.tokens.tolist() == [[0, 0, 0], *[[0, -1, -1]] * num_alike, *[[5, -1, -1]] * num_alike]
