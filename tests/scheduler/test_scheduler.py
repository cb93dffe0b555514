import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.scheduler.block_hashes import salt_from, set_apart
from nnsight_vllm.scheduler.scheduler import Policy, Scheduler, limit_hits
from nnsight_vllm.wire.extras import RequestExtras, encode_extras

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
    cut: bool = False
    most: int | None = None
    skips: bool = False
    sampling_params: Any = field(init=False)

    def __post_init__(self) -> None:
        extras = RequestExtras([b""], is_chunkable=self.cut, most_cached=self.most)
        self.sampling_params = SimpleNamespace(extra_args=encode_extras(extras) if self.has_graph else None)
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
        self.num_spec_tokens = 0
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


def test_room_is_left_for_the_placeholders_of_a_prompt_that_is_almost_cached() -> None:
    scheduler = Whole([FakeRequest("a", 1), FakeRequest("b", 98, True)])
    scheduler.num_spec_tokens = 3
    assert scheduler.schedule() == ["a"]
    assert names(scheduler) == ["b"]


def test_plain_prompts_and_those_that_may_be_cut_are_never_held() -> None:
    scheduler = Whole([FakeRequest("a", 90), FakeRequest("b", 90, True, cut=True)])
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
    limits = SimpleNamespace(long_prefill_token_threshold=8)
    config = SimpleNamespace(scheduler_config=limits, speculative_config=None)
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


class Cache:
    """Stands for vLLM's manager: everything that is asked for is found."""

    def __init__(self) -> None:
        self.coordinator = SimpleNamespace(find_longest_cache_hit=lambda hashes, most: (["block"], most, 0))
        self.create_kv_cache_blocks = tuple

    def prefix_cache_lookup_enabled(self, request: FakeRequest) -> bool:
        return not request.skips

    def get_computed_blocks(self, request: FakeRequest) -> Any:
        return (), 0 if request.skips else request.num_tokens_with_spec - 1, 7

    def found(self, request: FakeRequest) -> Any:
        request.num_tokens = request.num_tokens_with_spec  # type: ignore[attr-defined]
        return self.get_computed_blocks(request)[1:]


def test_no_more_of_a_prompt_is_looked_for_in_the_cache_than_its_graph_leaves_to_it() -> None:
    cache = Cache()
    limit_hits(cache)
    assert cache.found(FakeRequest("a", 90)) == cache.found(FakeRequest("b", 90, True)) == (89, 7)
    assert cache.found(FakeRequest("c", 90, True, most=40)) == (40, 0)
    assert cache.found(FakeRequest("d", 90, True, most=89)) == (89, 7)
    assert cache.found(FakeRequest("e", 90, True, most=40, skips=True)) == (0, 7)


def _chained(request: Any) -> list[bytes]:
    """vLLM's hasher in small: a hash is that of the block before, and a number for each new block."""
    made: list[bytes] = []
    parent = request.block_hashes[-1] if request.block_hashes else f"{request.cache_salt}".encode()
    for number in range(len(request.block_hashes), request.num_blocks):
        parent = hashlib.sha256(parent + bytes([number])).digest()
        made.append(parent)
    return made


class Hashed(SimpleNamespace):
    def __init__(self, num_blocks: int, salted: tuple[str, int] | None = None) -> None:
        params = SimpleNamespace(extra_args=encode_extras(RequestExtras(salt=salted)))
        super().__init__(num_blocks=num_blocks, cache_salt=None, block_hashes=[], sampling_params=params)
        self.request_id, self._block_hasher = "id", _chained
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        self.block_hashes.extend(self._block_hasher(self))


def test_blocks_are_plain_up_to_the_one_with_the_first_changed_row_and_salted_from_there() -> None:
    plain = Hashed(5).block_hashes
    one, same, other = Hashed(5, ("one", 32)), Hashed(5, ("one", 47)), Hashed(5, ("other", 32))
    for request in (one, same, other):
        salt_from(request, 16)
    assert one.block_hashes == same.block_hashes
    assert one.block_hashes[:2] == other.block_hashes[:2] == plain[:2]
    assert not set(one.block_hashes[2:]) & {*other.block_hashes[2:], *plain}
    assert len(set(one.block_hashes)) == 5


def test_hashes_are_the_same_whether_blocks_come_at_once_or_one_by_one() -> None:
    whole = Hashed(5, ("one", 32))
    salt_from(whole, 16)
    for start in range(5):
        growing = Hashed(start, ("one", 32))
        salt_from(growing, 16)
        for growing.num_blocks in range(start, 6):
            growing.update_block_hashes()
        assert growing.block_hashes[:5] == whole.block_hashes


def test_a_salt_from_the_first_block_on_is_vllms_own_and_an_evicted_request_gets_one() -> None:
    first, late = Hashed(5, ("one", 15)), Hashed(5, ("one", 32))
    for request in (first, late):
        salt_from(request, 16)
    assert first.cache_salt == "one"
    expected = Hashed(5)
    expected.cache_salt = "one"
    expected.block_hashes.clear()
    expected.update_block_hashes()
    assert first.block_hashes == expected.block_hashes
    before = list(late.block_hashes)
    set_apart(late)
    apart = list(late.block_hashes)
    set_apart(late)
    assert not set(before) & set(apart) and late.block_hashes == apart
