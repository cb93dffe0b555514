"""An engine in this process whose steps a scenario drives, and which records rows and logits of every step.

Requests go in as the front end sends them (its salts, its parameters, its collector) and are stepped here, so that one can
come or be aborted between any two steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import msgspec
import pytest
from churn_prepare import Prepared, prepare
from churn_scenario import WHOLE, Arrival, Ask, Scenario, Settings
from torch import Tensor

from nnsight_vllm import VLLM
from nnsight_vllm.errors import IntegrityError
from nnsight_vllm.frontend.bundling import Tied
from nnsight_vllm.frontend.collected import Collected
from nnsight_vllm.frontend.engine import Engine
from nnsight_vllm.frontend.listener import Listener, reason_of
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.scheduler.extras import has_graph

MAX_STEPS = 3000
MAX_TENSORS = 1 << 23  # bytes; so few that constants are dropped and sent again
NOBODY = (-1, -1)
Step = tuple[tuple[int, int, int, int], ...]


@dataclass
class Got:
    """What came of one sample. `logits`: what a token was drawn from, by its number, after vLLM's processors.

    `steps`: of each forward with rows of it, all rows as in `Played`, with requests counted from its own.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    stop_reason: object = None
    values: dict[str, Any] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    failure: Failure | None = None
    is_stopped: bool = False
    num_cached: int = 0
    num_pieces: int = 0  # of the prompt
    logits: dict[int, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def is_evicted(self) -> bool:
        return self.failure is not None and self.failure.retryable


@dataclass
class Played:
    """One run of a scenario. `got`: by request and sample; `broken_off`: attempts that an eviction ended, as they stood then.

    `steps`: (request, sample, first position, rows) of all requests in the batch's order, for each forward.
    """

    got: list[list[Got]]
    broken_off: list[tuple[int, list[Got]]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    preempted: list[tuple[int, bool]] = field(
        default_factory=list
    )  # for each eviction: request, whether it has a graph
    is_aborted: list[bool] = field(default_factory=list)
    has_waited: list[bool] = field(default_factory=list)
    num_grouped: int = 0


class ChurnEngine:
    """A model whose scheduler and runner a test looks into."""

    def __init__(self, checkpoint: str, settings: Settings) -> None:
        self.settings = settings
        self._affinity = os.sched_getaffinity(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            if settings.is_asynchronous:
                _schedule_asynchronously(patch)
            arguments = {"dtype": "float32", "max_num_batched_tokens": WHOLE, **settings.arguments}
            self.model = VLLM(checkpoint, dispatch=True, **arguments)
        front = self.model._engine
        assert isinstance(front, Engine)
        self.front = front
        self.engine = self.front.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.prepare = lru_cache(maxsize=200)(partial(prepare, self.model))
        self.front.tensors.limit = MAX_TENSORS
        tree = self.front.tree  # where the front end finds how long a prompt may be
        tree.catalogue = msgspec.structs.replace(tree.catalogue, max_num_batched_tokens=settings.step)
        self._played = Played([])
        self._listeners: dict[int, Listener] = {}
        self._lengths: list[int] = []  # of the prompts of requests that are driven here
        self._watch()

    def close(self) -> None:
        self.model.close()
        os.sched_setaffinity(0, self._affinity)  # vLLM binds the process to a core

    def recover(self) -> bool:
        """After a scenario that broke off: whether nothing is left of it."""
        self._lengths = []
        self.front._abort_all()
        while self.core.batch_queue or self.core.scheduler.has_unfinished_requests():
            self.engine.step()
        try:
            self._check()
        except (AssertionError, IntegrityError):
            return False
        return True

    def alone(self, ask: Ask) -> list[Got]:
        """What one request gets by itself, its prompt in one step."""
        return self.play(Scenario((Arrival(ask),)), WHOLE).got[0]

    def play(self, scenario: Scenario, step: int | None = None) -> Played:
        """Run a scenario on an empty cache. Evicted requests with graphs start again when the others are done."""
        self.core.scheduler.max_num_scheduled_tokens = step or self.settings.step
        assert self.front.llm.reset_prefix_cache(), "blocks are in use before a scenario"
        prepared = [self.prepare(arrival.ask) for arrival in scenario.arrivals]
        asks = [arrival.ask for arrival in scenario.arrivals]
        self._played = played = Played([[Got() for _ in range(ask.n)] for ask in asks])
        played.is_aborted = [False] * len(asks)
        played.has_waited = [False] * len(asks)
        before = self.model.stats().batched
        if scenario.front:
            self._run_in_front(prepared)
        else:
            self._lengths = [len(ask.prompt) for ask in asks]
            with self._holding(prepared):
                self._drive(scenario, prepared)
            self._lengths = []
        played.num_grouped = self.model.stats().batched - before
        self._check()
        return played

    # -- sending -----------------------------------------------------------------------------------------------------

    def _run_in_front(self, prepared: list[Prepared]) -> None:
        tensors = {name: data for one in prepared for name, data in one.tensors.items()}
        outcomes = self.front.run([one.request for one in prepared], tensors)
        for samples, outcome in zip(self._played.got, outcomes, strict=True):
            for got, completion, sample in zip(samples, outcome.result.outputs, outcome.samples, strict=True):
                got.tokens, got.text = list(completion.token_ids), completion.text
                got.reason, got.stop_reason = completion.finish_reason, completion.stop_reason
                got.values, got.logs, got.failure = sample.values, sample.logs, sample.failure
                got.num_cached = outcome.result.num_cached_tokens or 0

    def _drive(self, scenario: Scenario, prepared: list[Prepared]) -> None:
        aborts = {
            number: arrival.abort for number, arrival in enumerate(scenario.arrivals) if arrival.abort is not None
        }
        rounds = [{number: arrival.at for number, arrival in enumerate(scenario.arrivals)}]
        while rounds:
            due = rounds.pop(0)
            self._round(due, aborts, prepared)
            aborts = {}
            evicted = [number for number in due if self._is_evicted(number)]
            for number in evicted:
                self._played.broken_off.append((number, self._played.got[number]))
                self._played.got[number] = [Got() for _ in self._played.got[number]]
            if len(evicted) < len(due):
                rounds += [dict.fromkeys(evicted, 0)] if evicted else []
            else:
                assert len(evicted) > 1, f"request {evicted} was evicted with nobody beside it"
                rounds = [{number: 0} for number in evicted] + rounds

    def _round(self, due: dict[int, int], aborts: dict[int, int], prepared: list[Prepared]) -> None:
        self._listeners = {number: Listener(_raise) for number in due}
        try:
            self._run_to_the_end(due, aborts, prepared)
        finally:
            self.front.collector.forget(*self._listeners.values())
        for number, listener in self._listeners.items():
            for sample, got in enumerate(self._played.got[number]):
                _settle(got, listener.of(sample))

    def _run_to_the_end(self, due: dict[int, int], aborts: dict[int, int], prepared: list[Prepared]) -> None:
        """Send everybody at their step and go on until all are done."""
        waiting = dict(due)
        for step in range(MAX_STEPS):
            if not self.engine.has_unfinished_requests() and waiting:
                first = min(waiting.values())
                waiting = {number: at - max(first - step, 0) for number, at in waiting.items()}
            for number in [number for number, at in waiting.items() if at <= step]:
                del waiting[number]
                self._played.has_waited[number] |= self.engine.has_unfinished_requests()
                self._send(number, prepared[number])
            for number in [number for number, at in aborts.items() if at == step]:
                self._abort(number)
            if not self.engine.has_unfinished_requests():
                if not waiting:
                    break
                continue
            for output in self.engine.step():
                self._take(output)
        else:
            raise AssertionError(f"requests still unfinished after {MAX_STEPS} steps")

    def _send(self, number: int, prepared: Prepared) -> None:
        sent = self.front.sendable(prepared.request, dict(prepared.tensors), Tied())
        with self.front.collector.sending(self._listeners[number]):
            self.engine.add_request(str(number), *sent)

    def _abort(self, number: int) -> None:
        is_unfinished = any(got.reason is None for got in self._played.got[number])
        self._played.is_aborted[number] = is_unfinished
        self.engine.abort_request([str(number)])

    def _take(self, output: Any) -> None:
        samples = self._played.got[int(output.request_id)]
        for completion in output.outputs:
            got = samples[completion.index]
            got.tokens, got.text = list(completion.token_ids), completion.text
            got.reason, got.stop_reason = completion.finish_reason, completion.stop_reason
            got.num_cached = output.num_cached_tokens or 0

    def _is_evicted(self, number: int) -> bool:
        is_evicted = any(got.is_evicted for got in self._played.got[number])
        assert not is_evicted or (number, True) in self._played.preempted, f"request {number} was never preempted"
        return is_evicted and not self._played.is_aborted[number]

    @contextmanager
    def _holding(self, prepared: list[Prepared]) -> Iterator[None]:
        tensors = {name: data for one in prepared for name, data in one.tensors.items()}
        self.front.tensors.acquire(tensors, tensors)
        try:
            yield
        finally:
            self.front.tensors.release(tensors)

    # -- watching ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        sampler, scheduler = self.runner.sampler, self.core.scheduler
        sample, preempt = sampler.sample, scheduler._preempt_request

        def watched_sample(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._record(logits)
            return sample(logits, *args, **kwargs)

        def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
            number = (self._owner(request.request_id) or NOBODY)[0]
            self._played.preempted.append((number, has_graph(request)))
            return preempt(request, *args, **kwargs)

        sampler.__dict__["sample"] = watched_sample
        scheduler._preempt_request = watched_preempt

    def _record(self, logits: Tensor) -> None:
        batch, played = self.runner.input_batch, self._played
        owners = [self._owner(id) or NOBODY for id in batch.req_ids]
        starts = self.runner.query_start_loc.np[: len(owners) + 1]
        rows, positions = (starts[1:] - starts[:-1]).tolist(), batch.num_computed_tokens_cpu[: len(owners)].tolist()
        step: Any = [(*owner, at, count) for owner, at, count in zip(owners, positions, rows, strict=True)]
        played.steps.append(tuple(step))
        for index, (number, sample) in enumerate(owners):
            if number < 0:
                continue
            got = played.got[number][sample]
            got.steps.append(tuple((other - number, *rest) for other, *rest in step))
            got.num_pieces += positions[index] < self._lengths[number]
            if (token := positions[index] + rows[index] - self._lengths[number]) >= 0:
                got.logits[token] = logits[index].clone()

    def _owner(self, request_id: str) -> tuple[int, int] | None:
        """Request and sample behind an id of the engine; None for those that aren't driven here, or are gone."""
        state = self.engine.output_processor.request_states.get(request_id)
        if state is None or not self._lengths:
            return None
        parent = state.parent_req
        public_id = parent.external_req_id if parent is not None else state.external_req_id
        return int(public_id), state.request_index

    def _check(self) -> None:
        """Nothing is left of anybody, in front, scheduler and worker, and all blocks are free."""
        while self.core.batch_queue:  # what asynchronous scheduling began for requests that have ended since
            self.engine.step()
        self.model.check_integrity()
        scheduler = self.core.scheduler
        assert not (scheduler.requests or scheduler.running or list(scheduler.waiting))
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks leaked"


def _settle(got: Got, collected: Collected) -> None:
    collected.read_sheets()
    sample = collected.sample
    got.values, got.logs, got.failure = sample.values, sample.logs, sample.failure
    got.is_stopped, got.reason = collected.is_stopped, reason_of(got.reason, collected)


def _raise(error: Exception) -> None:
    raise error


def _schedule_asynchronously(patch: pytest.MonkeyPatch) -> None:
    """vLLM turns it off on CPUs; the runner is the same."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def check_and_update_config(config: Any) -> None:
        update(config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))
