"""vLLM's schedulers, with four rules more.

A prompt with a graph that needs it whole is computed in one step. When what is left of a step's token budget can't take such
a prompt, it waits, and whoever came after it waits too: first come first served stays true, and since the running ones
end, its turn comes. Prompts with other graphs are cut as vLLM likes.

A graph that looks at rows of the prompt from some position on takes none of those from the prefix cache, and one that changes
rows from some position on leaves plain blocks before it.

Where memory for keys and values runs out, requests without graphs are evicted first: vLLM computes them again as they were,
while a graph starts again from its prompt.

A request whose graph stopped or failed ends with that step, and its blocks are free.

A request that needs another's value before an iteration is held until it's there: in the queue it lets others pass, and a running one
keeps its memory and is left out of steps. Where those that are held take the room that others need to go on, the last is
evicted. Without graphs around, scheduling is vLLM's own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler as VllmAsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.graph.results import Delta, Failure
from nnsight_vllm.scheduler.block_hashes import salt_from, set_apart
from nnsight_vllm.scheduler.bundles import Bundles
from nnsight_vllm.scheduler.drafts import DraftPolicy, refuse_other_methods
from nnsight_vllm.scheduler.extras import extras_of, has_graph
from nnsight_vllm.wire.step_output import RELEASED, Packed, message_of


class Policy:
    """Mixed in before a vLLM scheduler: keeps requests out of the waiting queue for the length of one `schedule`."""

    waiting: Any
    running: list[Any]
    max_num_scheduled_tokens: int
    kv_cache_manager: Any
    finish_requests: Any
    block_size: int
    hash_block_size: int
    num_spec_tokens: int
    requests: dict[str, Any]
    current_step: int
    _preempt_request: Any
    _held: Mapping[str, int] = {}  # in this step, by request: the iteration that it waits before
    _doomed: Mapping[str, Failure] = {}

    @functools.cached_property
    def _bundles(self) -> Bundles:
        return Bundles()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        for request in self.waiting:
            if request.num_preemptions and has_graph(request):
                set_apart(request)
        if self._may_evict():  # it takes the last ones
            self.running.sort(key=has_graph, reverse=True)
        if self._bundles or self._held:
            self._hold()
        held = self._hold_back()
        try:
            scheduled = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            for request in held:
                self.waiting.add_request(request)
        if self._bundles:
            self._after(scheduled)
        return scheduled

    def add_request(self, request: Any) -> None:
        salt_from(request, self.hash_block_size)
        super().add_request(request)  # type: ignore[misc]
        if (extras := extras_of(request)) is not None and extras.links is not None:
            self._bundles.add(request.request_id, extras.links)

    def update_from_output(self, scheduled: Any, output: Any) -> Any:
        """vLLM's own, with our messages among its outputs; requests whose last one is there go at once."""
        packed = output.pooler_output
        if not isinstance(packed, Packed):
            made = super().update_from_output(scheduled, output)  # type: ignore[misc]
        else:
            output.pooler_output = packed.unpacked(len(output.req_ids))
            if self._bundles:
                self._bundles.report(packed.made, packed.failed, packed.last | packed.early.keys())
            made = super().update_from_output(scheduled, output)  # type: ignore[misc]
            if packed.last:
                self._end(one for client in made.values() for one in client.outputs if one.request_id in packed.last)
            self._end_early(packed.early, made)
        if self._doomed:
            self._fail(made)
        return made

    # -- values of other requests --------------------------------------------------------------------------------------

    def _hold(self) -> None:
        """Find who waits for values. A running one isn't eligible for this step; `schedule` counts it first."""
        waiting = {id: self.requests[id] for id in self._bundles.waiting() if id in self.requests}
        # The worker fails an evicted one.
        next_ones = {id: _next_iteration(one) for id, one in waiting.items() if not one.num_preemptions}
        held = {id: iteration for id, iteration in next_ones.items() if self._bundles.holds(id, iteration)}
        for id in held:
            waiting[id].next_decode_eligible_step = self.current_step + 2
        self._held, self._doomed = held, self._bundles.hopeless(held) if held else {}

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Whether a waiting request may be scheduled; others pass those that may not."""
        return request.request_id not in self._held and super()._handle_blocked_waiting_request(request)  # type: ignore[misc]

    def _after(self, scheduled: Any) -> None:
        self._bundles.sent(new.req_id for new in scheduled.scheduled_new_reqs)
        if released := self._bundles.take_released():
            setattr(scheduled, RELEASED, released)
        if self._held and not scheduled.total_num_scheduled_tokens:
            self._make_room()

    def _make_room(self) -> None:
        """Nobody runs: if others wait for the room of those that are held, one of these has to go."""
        is_in_flight = any(request.num_in_flight_tokens for request in self.running)
        others = [request for request in self.waiting if request.request_id not in self._held]
        holding = [request for request in self.running if request.request_id in self._held]
        if others and holding and not is_in_flight:
            self.running.remove(holding[-1])
            self._preempt_request(holding[-1], time.monotonic())

    def _fail(self, made: dict[int, Any]) -> None:
        """End requests whose values will never be there, as soon as nothing of them is in flight."""
        alive = {id: self.requests[id] for id in self._doomed if id in self.requests}
        doomed = {id: self._doomed[id] for id, request in alive.items() if not request.num_in_flight_tokens}
        for id, failure in doomed.items():
            self._bundles.fail(id, failure)
        self._end_early({id: message_of(Delta(failure=failure)) for id, failure in doomed.items()}, made)
        self._doomed = {}

    def _end_early(self, messages: Mapping[str, Any], made: dict[int, Any]) -> None:
        """End requests that have no output in this step, each with its message."""
        for request in self.finish_requests(list(messages), RequestStatus.FINISHED_ABORTED) if messages else ():
            output = EngineCoreOutput(
                request.request_id,
                [],
                pooling_output=messages[request.request_id],
                finish_reason=FinishReason.ABORT,
                events=request.take_events(),
            )
            made.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._bundles:
            is_aborted = request.status == RequestStatus.FINISHED_ABORTED
            self._bundles.ended(request.request_id, "it was aborted before" if is_aborted else "it ended before")
        return found

    # -- the end of requests -------------------------------------------------------------------------------------------

    def _end(self, outputs: Iterable[Any]) -> None:
        """Make these the last outputs of their requests. `ABORT` keeps a detokenizer from dropping a token as a stop's."""
        ended = []
        for output in outputs:
            ended.append(output.request_id)
            if output.finish_reason is None:
                output.finish_reason = FinishReason.ABORT
        self.finish_requests(ended, RequestStatus.FINISHED_ABORTED)

    def _may_evict(self) -> bool:
        """Whether this step may need more blocks than are free: one for each that runs, and those of all its tokens."""
        most = len(self.running) + self.max_num_scheduled_tokens // self.block_size
        return bool(self.kv_cache_manager.block_pool.get_num_free_blocks() < most)

    def _hold_back(self) -> list[Any]:
        """Take the first graph's prompt that doesn't fit, and all behind it, out of the queue; in queue order."""
        first = self._first_too_long() if any(map(_is_whole, self.waiting)) else None
        if first is None:
            return []
        order = list(self.waiting)
        held = order[order.index(first) :]
        self.waiting.remove_requests(held)
        return held

    def _first_too_long(self) -> Any | None:
        budget = self.max_num_scheduled_tokens - sum(map(_missing, filter(self._may_run, self.running)))
        for request in filter(self._may_run, self.waiting):
            # With speculative decoding a prompt of which one token is left is filled up with placeholders.
            missing = max(_missing(request), 1 + self.num_spec_tokens)
            if missing > budget and self._is_worth_waiting(request, missing):
                return request
            budget -= missing
        return None

    def _may_run(self, request: Any) -> bool:
        return not self._held or request.request_id not in self._held

    def _is_worth_waiting(self, request: Any, missing: int) -> bool:
        """Not for what no step can take, nor for an evicted request: the worker fails those."""
        return _is_whole(request) and missing <= self.max_num_scheduled_tokens and request.num_preemptions == 0


class SyncScheduler(Policy, DraftPolicy, VllmScheduler):
    """vLLM's scheduler, with rules for graphs."""


class AsyncScheduler(Policy, DraftPolicy, VllmAsyncScheduler):
    """vLLM's scheduler for asynchronous scheduling, with rules for graphs."""


def Scheduler(**kwargs: Any) -> SyncScheduler | AsyncScheduler:
    """The scheduler for an engine's configuration; this is what `scheduler_cls` names."""
    refuse_other_methods(kwargs["vllm_config"].speculative_config)
    config = kwargs["vllm_config"].scheduler_config
    if config.long_prefill_token_threshold > 0:
        raise EngineSettingError(
            f"long_prefill_token_threshold={config.long_prefill_token_threshold}: it would cut prompts that graphs need whole"
        )
    scheduler = AsyncScheduler(**kwargs) if config.async_scheduling else SyncScheduler(**kwargs)
    limit_hits(scheduler.kv_cache_manager)
    return scheduler


def limit_hits(manager: Any) -> None:
    """Have vLLM's manager of the cache find no more of a prompt than its graph leaves to the cache."""
    find = manager.get_computed_blocks

    def get_computed_blocks(request: Any) -> Any:
        extras = extras_of(request)
        most = None if extras is None else extras.most_cached
        if not most or most >= request.num_tokens - 1 or not manager.prefix_cache_lookup_enabled(request):
            return find(request)
        # A longer hit can't be shortened: in a sliding window it has no blocks of the tokens before.
        blocks, num_found, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, most)
        return manager.create_kv_cache_blocks(blocks), num_found, 0

    manager.get_computed_blocks = get_computed_blocks


def _is_whole(request: Any) -> bool:
    extras = extras_of(request)
    return extras is not None and not extras.is_chunkable


def _next_iteration(request: Any) -> int:
    """The last iteration that the next step of this request computes."""
    position: int = request.num_computed_tokens + len(request.spec_token_ids)
    prompt: int = request.num_prompt_tokens
    return max(position - prompt + 1, 0)


def _missing(request: Any) -> int:
    """Tokens that a step computes of this request at most: all that aren't computed yet."""
    placeholders: int = request.num_output_placeholders
    tokens: int = request.num_tokens_with_spec - request.num_computed_tokens
    return max(tokens + placeholders, 0)
