from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

from nnsight_vllm.engine.scheduler import Policy, Scheduler
from nnsight_vllm.errors import EngineSettingError

BUDGET = 100


@dataclass(eq=False)
class FakeRequest:
    """What the rule looks at, and an order for the priority queue."""

    name: str
    num_tokens_with_spec: int
    has_graph: bool = False
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_preemptions: int = 0
    priority: int = 0
    cache_salt: str | None = None
    sampling_params: Any = field(init=False)

    def __post_init__(self) -> None:
        extra = {"nnsight_vllm": b""} if self.has_graph else None
        self.sampling_params = SimpleNamespace(extra_args=extra)
        self.request_id = f"id of {self.name}"
        self.block_hashes = ["old"]

    def update_block_hashes(self) -> None:
        self.block_hashes.append(f"with {self.cache_salt}")

    def __lt__(self, other: "FakeRequest") -> bool:
        return self.priority < other.priority


class Base:
    """Stands for vLLM's scheduler: remembers the queue it saw and takes its first request."""

    def schedule(self) -> list[str]:
        seen = [request.name for request in self.waiting]  # type: ignore[attr-defined]
        if self.waiting:  # type: ignore[attr-defined]
            self.waiting.pop_request()  # type: ignore[attr-defined]
        return seen


class Whole(Policy, Base):
    def __init__(
        self, waiting: Iterable[FakeRequest], running: Iterable[FakeRequest] = (), policy: str = "fcfs"
    ) -> None:
        self.waiting = create_request_queue(SchedulingPolicy(policy))
        for request in waiting:
            self.waiting.add_request(request)
        self.running = list(running)
        self.max_num_scheduled_tokens = BUDGET
        self.block_size = 16
        self.num_free = 1000
        self.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: self.num_free))


def names(scheduler: Whole) -> list[str]:
    return [request.name for request in scheduler.waiting]


def test_a_prompt_without_room_waits_and_so_do_those_behind_it() -> None:
    scheduler = Whole([FakeRequest("a", 60), FakeRequest("b", 50, True), FakeRequest("c", 5)])
    assert scheduler.schedule() == ["a"]
    assert names(scheduler) == ["b", "c"]


def test_running_requests_come_off_the_budget_first() -> None:
    decoding = FakeRequest("r", 31, num_computed_tokens=30)
    prefilling = FakeRequest("s", 500, num_computed_tokens=450)
    waiting = [FakeRequest("a", 50, True)]
    assert Whole(waiting, [decoding]).schedule() == ["a"]
    assert Whole(waiting, [decoding, prefilling]).schedule() == []


def test_tokens_still_in_flight_count() -> None:
    in_flight = FakeRequest("r", 30, num_computed_tokens=30, num_output_placeholders=1)
    assert Whole([FakeRequest("a", 99, True)], [in_flight]).schedule() == ["a"]
    assert Whole([FakeRequest("a", 100, True)], [in_flight]).schedule() == []


def test_plain_prompts_are_never_held() -> None:
    scheduler = Whole([FakeRequest("a", 90), FakeRequest("b", 90)])
    assert scheduler.schedule() == ["a", "b"]


def test_the_queue_by_priority_keeps_its_order() -> None:
    waiting = [
        FakeRequest("a", 5, priority=2),
        FakeRequest("b", 90, True, priority=1),
        FakeRequest("c", 20, priority=0),
    ]
    scheduler = Whole(waiting, policy="priority")
    assert scheduler.schedule() == ["c"]
    assert names(scheduler) == ["b", "a"]


@pytest.mark.parametrize("hopeless", [FakeRequest("a", 101, True), FakeRequest("a", 99, True, num_preemptions=1)])
def test_what_can_only_fail_is_not_waited_for(hopeless: FakeRequest) -> None:
    busy = FakeRequest("r", 51)
    assert Whole([hopeless, FakeRequest("b", 1)], [busy]).schedule() == ["a", "b"]


def test_the_queue_is_whole_again_after_an_error() -> None:
    scheduler = Whole([FakeRequest("a", 60), FakeRequest("b", 50, True)])
    scheduler.waiting.pop_request = None
    with pytest.raises(TypeError):
        scheduler.schedule()
    assert names(scheduler) == ["a", "b"]


def test_a_setting_that_would_cut_prompts_is_refused() -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(long_prefill_token_threshold=8))
    with pytest.raises(EngineSettingError, match="long_prefill_token_threshold=8"):
        Scheduler(vllm_config=config)


def test_an_evicted_request_with_a_graph_gets_blocks_that_nobody_else_finds() -> None:
    evicted = FakeRequest("a", 500, True, num_preemptions=1, cache_salt="salt")
    others = [
        FakeRequest("b", 500, True, cache_salt="salt"),
        FakeRequest("c", 500, num_preemptions=1, cache_salt="salt"),
    ]
    scheduler = Whole([evicted, *others])
    for _ in range(2):
        scheduler.schedule()
        scheduler.waiting.prepend_request(evicted)
    assert (evicted.cache_salt, evicted.block_hashes) == ("salt:id of a", ["with salt:id of a"])
    assert all(other.cache_salt == "salt" and other.block_hashes == ["old"] for other in others)


def test_where_memory_is_short_requests_without_graphs_come_last() -> None:
    scheduler = Whole(
        [], [FakeRequest("a", 9), FakeRequest("b", 9, True), FakeRequest("c", 9), FakeRequest("d", 9, True)]
    )
    scheduler.num_free = BUDGET // 16 + 4
    scheduler.schedule()
    assert "".join(request.name for request in scheduler.running) == "abcd"
    scheduler.num_free -= 1
    scheduler.schedule()
    assert "".join(request.name for request in scheduler.running) == "bdac"
