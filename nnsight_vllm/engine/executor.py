"""Runs the graphs of a step's requests, each on its own rows, as the model passes their sites.

The engine's calls, in this order every step: `drop` and `admit`, `begin_step`, the taps' handlers (from inside the
model), `enter_logits`, `at_tap` for logits and samples, `end_step`. Whatever a graph raises fails that request only.

    waiting[tap]   requests whose programs wait for a site that this tap serves, in this step
    active[tap]    the handler, there for exactly the taps with somebody waiting
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

import torch

from nnsight_vllm.engine.draws import SAMPLES_TAP
from nnsight_vllm.engine.interpreter import Interpreter, ModuleCalls
from nnsight_vllm.engine.places import Place
from nnsight_vllm.engine.requests import START, Arrival, Request, Span, Status
from nnsight_vllm.engine.sites import Site
from nnsight_vllm.engine.store import Store
from nnsight_vllm.engine.taps import Handler, Tensors
from nnsight_vllm.errors import InterventionError, OutOfOrderError, PreemptedError
from nnsight_vllm.plan.program import SAMPLES, ProgramCache


@dataclass(frozen=True)
class SiteTable:
    """What the executor knows of the model. `orders`: where in the firing order a site comes."""

    sites: Mapping[str, Site]
    orders: Mapping[str, int]
    calls: ModuleCalls
    active: MutableMapping[int, Handler]


class Executor:
    """All requests with graphs that the engine knows."""

    def __init__(self, table: SiteTable, programs: ProgramCache, store: Store, device: torch.device) -> None:
        self.requests: dict[str, Request] = {}
        self.store = store
        self._table = table
        self._programs = programs
        self._interpreter = Interpreter(table.orders, table.calls, device)
        self._waiting: dict[int, list[Request]] = {}
        self._step: list[Request] = []  # requests that run in this step
        self._spans: dict[str, Span] = {}
        self._rows: dict[str, slice] = {}
        self._interrupt: BaseException | None = None

    def admit(self, arrival: Arrival) -> None:
        """Take a request. A graph that can't be run fails it; nothing is raised."""
        request = Request(arrival.request_id, arrival.prompt_length, arrival.seed)
        self.requests[request.id] = request
        self._guarded(request, lambda: self._load(request, arrival))

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended."""
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def fail(self, request_id: str, error: Exception) -> None:
        """Fail a request for a reason that the engine knows, also one whose program is over: its edits must stay."""
        request = self.requests.get(request_id)
        if request is not None and request.status is not Status.FAILED:
            request.fail(error, keep_token=False)

    def begin_step(self, spans: Iterable[Span]) -> None:
        """A forward is about to start over these requests' rows."""
        for span in spans:
            request = self.requests.get(span.request_id)
            if request is not None and request.is_running:
                self._step.append(request)
                self._spans[request.id] = span
                self._rows[request.id] = slice(span.start, span.stop)
                self._guarded(request, partial(self._begin, request, span))
                self._await(request)

    def enter_logits(self) -> None:
        """From here on each request has one row: its last token's, at its index in the batch."""
        for request_id, span in self._spans.items():
            self._rows[request_id] = slice(span.index, span.index + 1)

    def at_tap(self, tap: int, tensors: Tensors) -> None:
        """The model is at a tap: run whoever waits for a site on it. Never raises."""
        self._active_pop(tap)
        for request in self._waiting.pop(tap, ()):
            while self._waits_at(request, tap):
                self._guarded(request, partial(self._arrive, request, tensors))
            self._await(request)

    def leave_logits(self) -> None:
        """The model is done and the logits are there: only the drawn token is still to come."""
        for tap in [tap for tap in self._waiting if tap != SAMPLES_TAP]:
            self._active_pop(tap)
            for request in self._waiting.pop(tap):
                self._guarded(request, partial(self._leave, request))

    def writes_samples(self, request_id: str) -> bool:
        """Whether this request may replace the token that is about to be drawn."""
        request = self.requests.get(request_id)
        return request is not None and request.is_running and request.program.writes_samples

    def fail_step(self, error: Exception) -> None:
        """Fail every request of this step: a defect of ours, in which anything may be wrong."""
        for request in self._step:
            self.fail(request.id, error)

    def end_step(self, emitting: Collection[str]) -> dict[str, bytes]:
        """The step is over. Returns what goes home: a msgpack `Delta` by id, for requests that emit in this step.

        Raises what interrupted a graph from outside (Ctrl-C), now that nothing is half done.
        """
        for request in self._step:
            self._guarded(request, partial(self._leave, request))
        self._clear_step()
        sent = {id: data for id in emitting if id in self.requests and (data := self.requests[id].outbox.take())}
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt
        return sent

    def leftovers(self, known: Collection[str]) -> list[str]:
        """What shouldn't be there between steps; `known`: ids of requests that the engine still has."""
        found = [f"a handler at tap {tap}" for tap in self._table.active]
        found += [f"requests waiting at tap {tap}" for tap in self._waiting]
        found += [f"rows of request {id} of a past step" for id in self._rows]
        for id, request in self.requests.items():
            if request.place is not None:
                found.append(f"a working copy of {request.place.name} of request {id}")
            if id not in known:
                found.append(f"state of request {id}, which the engine doesn't know")
        return found

    def _load(self, request: Request, arrival: Arrival) -> None:
        request.program = self._programs.get(arrival.graph)
        if request.program.writes_samples and arrival.refuse_samples:
            raise InterventionError(f"the sampled token can't be edited: {arrival.refuse_samples}")
        request.constants = {key: self.store.get(key) for key in sorted(request.program.constants)}

    def _begin(self, request: Request, span: Span) -> None:
        if not request.expects(span):
            raise _interrupted(request, span)
        request.iteration += 1
        if request.wait.site is None and request.wait.iteration == request.iteration:
            self._interpreter.run(request)

    def _await(self, request: Request) -> None:
        """Have the tap of the site that a request waits for call us, if it's one of this iteration."""
        if not request.is_running or request.wait.site is None or request.wait.iteration != request.iteration:
            return
        tap = self._table.sites[request.wait.site].tap
        self._waiting.setdefault(tap, []).append(request)
        self._table.active[tap] = partial(self.at_tap, tap)

    def _waits_at(self, request: Request, tap: int) -> bool:
        wait = request.wait
        if not request.is_running or wait.site is None or wait.iteration != request.iteration:
            return False
        return self._table.sites[wait.site].tap == tap

    def _arrive(self, request: Request, tensors: Tensors) -> None:
        name = request.wait.site
        assert name is not None
        request.order = self._table.orders[name]
        request.place = Place(name, self._table.sites[name], tensors, self._rows[request.id])
        self._interpreter.run(request)

    def _leave(self, request: Request) -> None:
        """The iteration is over; what the program still waits for in it will never come."""
        wait = request.wait
        if request.is_running and wait.site is not None and wait.iteration == request.iteration:
            raise OutOfOrderError(f"the model ran iteration {wait.iteration} without passing {wait.site}")
        request.leave_iteration()

    def _guarded(self, request: Request, work: Callable[[], None]) -> None:
        """Nothing that a graph does may leave the op's body: it would end the engine for everybody."""
        try:
            with torch.inference_mode():
                work()
        except Exception as error:
            request.fail(error, self._keeps_token(request))
        except BaseException as error:
            self._interrupt = error
            request.fail(error, self._keeps_token(request))

    def _keeps_token(self, request: Request) -> bool:
        return request.order >= self._table.orders[SAMPLES]

    def _active_pop(self, tap: int) -> None:
        self._table.active.pop(tap, None)

    def _clear_step(self) -> None:
        for tap in self._waiting:
            self._active_pop(tap)
        self._waiting.clear()
        self._step.clear()
        self._spans.clear()
        self._rows.clear()


def _interrupted(request: Request, span: Span) -> PreemptedError:
    rows = f"positions {span.position} to {span.position + span.stop - span.start - 1}"
    if request.iteration == START:
        return PreemptedError(f"the engine ran {rows} of a prompt of {request.prompt_length} tokens in one step")
    return PreemptedError(f"the engine evicted the request after iteration {request.iteration} and recomputes {rows}")
