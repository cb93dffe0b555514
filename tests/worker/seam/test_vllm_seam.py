"""The seam around a runner that isn't vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import nn
from toy import Toy, graph

from nnsight_vllm.graph.nodes import Read, Ref, Save
from nnsight_vllm.wire.extras import RequestExtras, encode_extras
from nnsight_vllm.worker.seam.runner import Steps
from nnsight_vllm.worker.seam.vllm_seam import Seam


class Head(nn.Module):
    def compute_logits(self, hidden: Any) -> Any:
        return hidden


@dataclass
class FakeRunner:
    """A runner that forgets evicted requests, as V2 does. `ran`: what reached vLLM's own method."""

    ran: list[Any] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
        self.raw: Any = SimpleNamespace(
            execute_model=lambda scheduled, **kwargs: self.ran.append(scheduled),
            sample_tokens=lambda: None,
            get_model=Head,
            kv_caches=[],
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group], num_blocks=4),
            sampler=SimpleNamespace(logprobs_mode="raw_logprobs"),
        )

    def attach(self, steps: Steps) -> None:
        pass

    def known_requests(self) -> set[str]:
        return self.known


def scheduled(new: tuple[str, ...] = (), evicted: tuple[str, ...] = (), finished: tuple[str, ...] = ()) -> Any:
    data = graph(Read(0, "0.mlp", 0), Save(1, "h", Ref(0)))
    params = SimpleNamespace(
        extra_args=encode_extras(RequestExtras([data])), seed=0, structured_outputs=None, logprobs=None
    )
    request = {"sampling_params": params, "prompt_token_ids": [1, 2], "block_ids": ([1],), "num_computed_tokens": 0}
    cached = SimpleNamespace(resumed_req_ids=set(), req_ids=[], new_block_ids=[], num_computed_tokens=[])
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=id, **request) for id in new],
        scheduled_cached_reqs=cached,
        preempted_req_ids=set(evicted),
        finished_req_ids=set(finished),
        num_scheduled_tokens=dict.fromkeys(new, 2),
        scheduled_spec_decode_tokens={},
    )


def test_before_the_worker_is_ready_vllm_warms_up_by_itself() -> None:
    runner: Any = FakeRunner()
    Seam(runner)
    runner.raw.execute_model("a step of vLLM's own")
    assert runner.ran == ["a step of vLLM's own"]


def test_an_evicted_request_that_comes_back_as_a_new_one_fails_and_is_known_meanwhile() -> None:
    runner: Any = FakeRunner()
    seam, toy = Seam(runner), Toy()
    seam.executor = toy.executor
    runner.raw.execute_model(scheduled(new=("r",)))
    request = toy.executor.requests["r"]
    assert not request.is_over and seam.has_graphs
    runner.raw.execute_model(scheduled(evicted=("r",)))
    assert seam.known_requests == {"r"} and not seam.has_graphs
    runner.raw.execute_model(scheduled(new=("r",)))
    assert toy.executor.requests["r"] is request and request.is_over
    assert seam.known_requests == set()  # by the runner alone from now on, and this one knows nobody


def test_an_evicted_request_that_ends_is_forgotten() -> None:
    runner: Any = FakeRunner()
    seam = Seam(runner)
    seam.executor = Toy().executor
    for step in (scheduled(new=("r",)), scheduled(evicted=("r",)), scheduled(finished=("r",))):
        runner.raw.execute_model(step)
    assert seam.executor.requests == {} and seam.known_requests == set()
