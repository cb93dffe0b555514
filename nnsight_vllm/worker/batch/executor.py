"""Runs the graphs of a step's requests as the model passes their sites.

The engine's calls, in this order every step: `drop` and `admit`, `begin_step`, the taps' handlers (from inside the
model), `enter_logits`, `at_tap` for logits and samples, `end_step`. Whatever a graph raises fails that request only.
A request with several programs is here as several requests of one id, which run in their order at a site.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.plan.program import ProgramCache
from nnsight_vllm.plan.template import parameter_of
from nnsight_vllm.wire.limits import DEFAULT, Limits
from nnsight_vllm.wire.step_output import Messages, Released
from nnsight_vllm.worker.batch.control import Control
from nnsight_vllm.worker.batch.cursor import START
from nnsight_vllm.worker.batch.fused import FusedSites
from nnsight_vllm.worker.batch.group import Group, Unit
from nnsight_vllm.worker.batch.group_runner import GroupRunner
from nnsight_vllm.worker.batch.outgoing import Outgoing
from nnsight_vllm.worker.batch.population import Population, in_order
from nnsight_vllm.worker.batch.prefill import Prefill
from nnsight_vllm.worker.batch.prompt_progress import Progress
from nnsight_vllm.worker.batch.request_nodes import RequestNodes
from nnsight_vllm.worker.batch.request_values import RequestValues
from nnsight_vllm.worker.batch.requests import EngineRequest, check_names, interrupted, requests_of
from nnsight_vllm.worker.batch.step import NO_STEP, Arrival, Step
from nnsight_vllm.worker.batch.tables import Tables
from nnsight_vllm.worker.batch.tally import Tally
from nnsight_vllm.worker.batch.tensor_store import Store
from nnsight_vllm.worker.batch.waiting import SiteTable, Waiting
from nnsight_vllm.worker.model.sampling_sites import SAMPLES_TAP
from nnsight_vllm.worker.model.taps import Tensors
from nnsight_vllm.worker.ops.usage import Clock, Holdings, measure
from nnsight_vllm.worker.results.exports import Exports


class Executor:
    """All requests with graphs that the engine knows. Without `batching` each runs by itself."""

    def __init__(
        self,
        table: SiteTable,
        programs: ProgramCache,
        store: Store,
        device: torch.device,
        batching: bool = True,
        limits: Limits = DEFAULT,
    ) -> None:
        self.store = store
        self.programs = programs
        self.exports = Exports(limits.request, limits.engine)
        self._table = table
        self._batching = batching
        self._population = Population()
        self._outgoing = Outgoing(self._population, self.exports, limits)
        self._waiting = Waiting(table)
        self._tables = Tables(device)
        self._fused = FusedSites(table.sites, limits.saved_per_step)
        self._tally = Tally()
        self._clock, holdings = Clock(limits), Holdings(limits, lambda: measure(self._units()))
        self._nodes = RequestNodes(table.calls, device, self.exports, limits)
        values = RequestValues(self._nodes, self._clock, holdings, limits)
        self._control = Control(table.orders, values, self._clock, limits)
        self._grouped = GroupRunner(table.orders, self._nodes, self._clock, holdings, limits)
        self._prefill = Prefill(programs, store, lambda name: len(table.sites[name].info.shape) - 1, device)
        self._step = NO_STEP
        self._is_at_logits = False
        self._interrupt: BaseException | None = None

    @property
    def requests(self) -> Mapping[str, EngineRequest]:
        """All that are known, by id; of several programs the first."""
        return self._population.requests

    def warm_up(self) -> None:
        """Do now what would make the first request with a graph wait."""
        self._nodes.guard.warm_up()

    def admit(self, arrival: Arrival) -> None:
        """Take a request. A graph that can't be run fails it; nothing is raised."""
        programs = requests_of(arrival, self._outgoing.outbox(arrival.request_id), self._population.ended)
        self._population.add(programs)
        for unit, graph in zip(programs, arrival.graphs, strict=True):
            self._guarded(unit, partial(self._load, unit, graph, arrival.refuse_samples))
        if len(programs) > 1:
            self._guarded(programs[0], partial(check_names, programs))

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended."""
        gone = self.requests.keys() & set(request_ids)
        if not gone:
            return
        for request in self._population.remove(gone):
            self._outgoing.drop(request)
            for unit in request.programs:
                self._prefill.drop(unit)
                self._tables.release(unit.slots.values())
            self.exports.release(Released(request.undrawn))
        self._fused.forget()

    def fail(self, request_id: str, error: Exception) -> None:
        """Fail a request for a reason that the engine knows, also one whose program is over: its edits must stay."""
        request = self.requests.get(request_id)
        if request is not None and not request.has_failed:
            if request.request_programs is not None:
                request.request_programs.reopen()
            request.fail(error, keep_token=False)
            for unit in request.programs:
                unit.finish(has_failed=True)
            self._population.take_out({request_id})

    def begin_step(self, step: Step) -> None:
        """A forward is about to start over these requests' rows."""
        self._tally.start()
        self._step = step
        self._is_at_logits = False
        self._clock.step += 1
        with _inference():
            self._tables.fill()
        groups, self._population.groups = self._population.groups, []
        ready: list[Group] = []
        requests: list[EngineRequest] = []
        for group in groups:
            ready += self._begin_group(group, step)
        for request in list(self._population.alone.values()):
            index = step.index.get(request.id)
            if request.is_over:
                del self._population.alone[request.key]
            elif index is not None:
                requests += self._begin(request, index, step)
        self._go_on(ready, requests, step)
        self._tally.pause()

    def enter_logits(self) -> None:
        """From here on each request has one row, its last token's."""
        self._is_at_logits = True

    def at_tap(self, tap: int, tensors: Tensors) -> None:
        """The model is at a tap: run whoever waits for a site on it. Never raises."""
        self._tally.start()
        while units := self._waiting.due(tap, is_ranked=bool(self._population.several)):
            self._at_sites(self._population.still_running(units) if self._population.ended else units, tensors)
        self._tally.pause()

    def leave_logits(self) -> None:
        """The model is done and the logits are there: only the drawn token is still to come."""
        self._step = self._step.after_logits()
        if late := self._waiting.give_up(but=SAMPLES_TAP):
            self._leave(late)

    def writes_samples(self, request_id: str) -> bool:
        """Whether this request may replace the token that is about to be drawn."""
        request = self.requests.get(request_id)
        return request is not None and any(not r.is_over and r.program.writes_samples for r in request.programs)

    def fail_step(self, error: Exception) -> None:
        """Fail every request of this step: a defect of ours, in which anything may be wrong."""
        for id in list(self._step.index):
            self.fail(id, error)

    def end_step(self, emitting: Collection[str]) -> Messages:
        """The step is over. Returns what goes home of the requests that emit in this step.

        Raises what interrupted a graph from outside (Ctrl-C), now that nothing is half done.
        """
        self._tally.start()
        units: list[Unit] = list(self._population.groups)
        for unit in (*self._population.alone.values(), *self._prefill.chunks):
            if unit.id in self._step.index:
                units.append(unit)
        self._leave(units)
        self._prefill.collect(self._outgoing.excess)
        for request, _, excess in self._prefill.joined:
            if excess and not request.has_failed:
                self._outgoing.refuse(request, excess)
        sent = self._outgoing.messages(self._step, emitting)
        self._prefill.forget(self._population.groups)
        self._population.close_ended()
        self._waiting.clear()
        self._step = NO_STEP
        self._tally.end_step(sent.num_bytes)
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt
        return sent

    def leftovers(self, known: Collection[str]) -> list[str]:
        """What shouldn't be there between steps; `known`: ids of requests that the engine still has."""
        requests, unsent = self.requests, self._outgoing.unsent
        units = [unit for request in requests.values() for unit in request.programs]
        found = [*self._waiting.leftovers(), *self._population.leftovers(), *self.exports.leftovers()]
        found += [f"results of request {id}, which ended" for id in unsent.difference(requests)]
        num_lines = sum(len(unit.slots) for unit in units)
        if self._tables.num_users != num_lines:
            found.append(f"{self._tables.num_users} lines of tables in use; the requests have {num_lines}")
        num_held = sum(unit.progress.num_bytes for unit in units if unit.progress is not None)
        if self._prefill.num_held != num_held:
            found.append(f"{self._prefill.num_held} bytes of prompts' chunks are held; the requests have {num_held}")
        found += [f"a chunk of request {chunk.id}" for chunk in self._prefill.chunks]
        return found + [f"state of request {id}, which the engine doesn't know" for id in requests if id not in known]

    def stats(self) -> Stats:
        """What was run so far."""
        counts, programs = self._grouped.nodes.counts, self.programs
        return Stats(
            batched=counts.batched,
            one_by_one=counts.one_by_one,
            alone=self._control.num_run,
            prevented=dict(counts.prevented.most_common()),
            programs=len(programs),
            program_hits=programs.hits,
            program_misses=programs.misses,
            exported=self.exports.num_made,
            imported=self.exports.num_drawn,
            num_kept=len(self.exports),
            steps_within=list(self._tally.steps_within),
            seconds=self._tally.seconds,
            saved_bytes=self._tally.saved_bytes,
            table_lines=self._tables.num_lines,
            table_bytes=self._tables.num_bytes,
        )

    def _units(self) -> list[Unit]:
        """Whoever may hold values: those that run, and those that wait."""
        return [
            *self._population.alone.values(),
            *self._prefill.chunks,
            *self._population.groups,
            *self._grouped.running,
        ]

    # -- admission ---------------------------------------------------------------------------------------------------

    def _load(self, request: EngineRequest, graph: bytes, refuse_samples: str) -> None:
        request.progress = Progress(graph)
        request.program, parameters = self.programs.get(graph)
        if request.program.writes_samples and refuse_samples:
            raise InterventionError(f"the sampled token can't be edited: {refuse_samples}")
        for number, value in enumerate(parameters):
            request.parameters[parameter_of(number)] = self.store.value_of(value)
        request.env.update(request.parameters)
        for node, edit in request.program.edits.items():
            if (slot := self._tables.acquire(edit, parameters, request.parameters)) is not None:
                request.slots[node] = slot

    # -- a step ------------------------------------------------------------------------------------------------------

    def _begin(self, request: EngineRequest, index: int, step: Step) -> list[EngineRequest]:
        found: list[EngineRequest] = []
        self._guarded(request, lambda: found.extend(self._units_of(request, index, step)))
        for unit in found:
            unit.iteration += 1
            unit.lag -= 1
            if unit.site is None and unit.lag == 0:
                self._guarded(unit, partial(self._control.run, unit))
        return found

    def _units_of(self, request: EngineRequest, index: int, step: Step) -> list[EngineRequest]:
        """What runs on a request's rows: usually the request itself."""
        position, count = int(step.positions[index]), int(step.starts[index + 1] - step.starts[index])
        if request.iteration == START:
            unit = self._prefill.unit(request, position, count)
            return [] if unit is None else [unit]
        if not request.expects(position, count):
            raise interrupted(request, position, count)
        return [request]

    def _begin_group(self, group: Group, step: Step) -> list[Group]:
        """What is left of a group of those that are in the step and go on as they were: nothing, it, or its parts."""
        is_here = group.locate(step) >= 0
        if not is_here.any():
            self._population.groups.append(group)
            return []
        if not is_here.all():  # the others wait for a later step, by themselves
            for i in np.flatnonzero(~is_here):
                request = group.select([int(i)]).release()
                self._population.alone[request.key] = request
            group = group.select(np.flatnonzero(is_here).tolist())
        if wrong := group.unexpected(step):
            group.interrupt(wrong, step)
            if (remaining := group.remaining()) is None:
                return []
            group = remaining
        group = in_order(group, step)
        group.iteration = group.iteration + 1
        group.lag -= 1
        return self._run_group(group, lambda: None) if group.site is None and group.lag == 0 else [group]

    def _go_on(self, groups: list[Group], requests: list[EngineRequest], step: Step) -> None:
        """Form groups of those at the same point, and let everybody wait for their sites."""
        meeting: dict[object, tuple[list[Group], list[EngineRequest]]] = {}
        for group in groups:
            meeting.setdefault(group.point() or object(), ([], []))[0].append(group)
        for request in requests:
            point = request.point() if self._batching and not request.is_over else None
            meeting.setdefault(point or object(), ([], []))[1].append(request)
        for together, alone in meeting.values():
            if len(together) + len(alone) > 1:
                together, alone = [self._population.group(together, alone, step)], []
            self._population.groups += together
            units: list[Unit] = [*together, *alone]
            for unit in units:
                self._waiting.add(unit, self.at_tap)

    def _at_sites(self, units: list[Unit], tensors: Tensors) -> None:
        """The model is where these wait."""
        with _inference():
            done = self._fused.run(units, tensors, self._step, self._is_at_logits) if self._batching else {}
        for unit in units:
            here = partial(self._arrive, unit, tensors)
            behind = partial(self._leave_site, unit, done[id(unit)]) if id(unit) in done else None
            for part in self._run(unit, behind or here):
                self._waiting.add(part, self.at_tap)

    def _arrive(self, unit: Unit, tensors: Tensors) -> None:
        assert unit.site is not None
        unit.go_to(unit.site, self._table.orders[unit.site])
        unit.arrive(self._table.sites[unit.site], tensors, self._step, self._is_at_logits)

    def _leave_site(self, unit: Unit, error: BaseException | None) -> None:
        """The unit did at its site all that it does there: go on behind it."""
        done = unit.program.fused[unit.pc]
        unit.go_to(done.site, self._table.orders[done.site])
        if error is not None:
            raise error
        unit.pc = done.stop
        for id in done.free:
            unit.env.pop(id, None)
        self._grouped.nodes.counts.batched += done.num_operations * unit.size

    def _run(self, unit: Unit, arrive: Callable[[], None]) -> Sequence[Unit]:
        """Have a program go on once it has arrived. Returns who is left."""
        if isinstance(unit, Group):
            if unit in self._population.groups:
                self._population.groups.remove(unit)
            parts = self._run_group(unit, arrive)
            self._population.groups += parts
            return parts

        def run() -> None:
            arrive()
            self._control.run(unit)

        self._guarded(unit, run)
        return (unit,)

    def _run_group(self, group: Group, arrive: Callable[[], None]) -> list[Group]:
        """Nothing that a graph does may leave the op's body; what isn't one request's fault fails the group."""
        try:
            with _inference():
                return self._grouped.run(group, arrive)
        except Exception as error:
            self._grouped.fail(error)
        except BaseException as error:
            self._interrupt = error
            self._grouped.fail(error)
        return []

    def _leave(self, units: list[Unit]) -> None:
        """The iteration is over for these."""
        over: list[Unit] = []
        for unit in units:
            unit.leave_iteration()
            if unit.is_over:
                over.append(unit)
        if over:
            self._population.still_running(over)

    def _guarded(self, request: EngineRequest, work: Callable[[], object]) -> None:
        """Nothing that a graph does may leave the op's body: it would end the engine for everybody."""
        try:
            with _inference():
                work()
        except Exception as error:
            request.fail(error)
        except BaseException as error:
            self._interrupt = error
            request.fail(error)


def _inference() -> AbstractContextManager[object]:
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()
