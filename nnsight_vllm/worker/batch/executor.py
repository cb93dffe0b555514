"""Runs the graphs of a step's requests as the model passes their sites.

The engine's calls, in this order every step: `drop` and `admit`, `begin_step`, the taps' handlers (from inside the
model), `enter_logits`, `at_tap` for logits and samples, `end_step`. Whatever a graph raises fails that request only.
A request with several programs is here as several requests of one id (`parts.py`), which run in their order at a site.

    alone          requests that run by themselves
    groups         requests at the same point of the same program, which run as one
    waiting[tap]   requests and groups whose programs wait for a site that this tap serves, in this step
    active[tap]    the handler, there for exactly the taps with somebody waiting
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError, OutOfOrderError
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.plan.program import ProgramCache
from nnsight_vllm.plan.template import parameter_of
from nnsight_vllm.wire.limits import DEFAULT, Limits
from nnsight_vllm.wire.step_output import Messages, Released
from nnsight_vllm.worker.batch.control import Control
from nnsight_vllm.worker.batch.cursor import START
from nnsight_vllm.worker.batch.fused import FusedSites
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.group_place import GroupPlace
from nnsight_vllm.worker.batch.group_runner import GroupRunner
from nnsight_vllm.worker.batch.places import RequestPlace
from nnsight_vllm.worker.batch.prefill import Prefill
from nnsight_vllm.worker.batch.prompt_progress import Progress
from nnsight_vllm.worker.batch.request_nodes import ModuleCalls, RequestNodes
from nnsight_vllm.worker.batch.request_values import RequestValues
from nnsight_vllm.worker.batch.requests import EngineRequest, RequestPrograms, check_names, interrupted, requests_of
from nnsight_vllm.worker.batch.step import Arrival, Step
from nnsight_vllm.worker.batch.tables import Tables
from nnsight_vllm.worker.batch.tally import Tally
from nnsight_vllm.worker.batch.tensor_store import Store
from nnsight_vllm.worker.model.sampling_sites import SAMPLES_TAP
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Handler, Tensors
from nnsight_vllm.worker.ops.usage import Clock, Holdings, measure
from nnsight_vllm.worker.results.batched_saves import BatchedSaves
from nnsight_vllm.worker.results.exports import Exports
from nnsight_vllm.worker.results.outbox import Outbox

Unit = EngineRequest | Group


@dataclass(frozen=True)
class SiteTable:
    """What the executor knows of the model. `orders`: where in the firing order a site comes."""

    sites: Mapping[str, Site]
    orders: Mapping[str, int]
    calls: ModuleCalls
    active: MutableMapping[int, Handler]


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
        self.requests: dict[str, EngineRequest] = {}
        self.store = store
        self.programs = programs
        self._table = table
        self._batching = batching
        self._limits = limits
        self._num_saved = 0  # bytes sent home of the requests that live
        self._unsent: set[str] = set()
        self._several: set[str] = set()  # requests with several programs
        self._ended: set[RequestPrograms] = set()  # those of them that ended in this step
        self._tables = Tables(device)
        self._fused = FusedSites(table.sites, limits.saved_per_step)
        self._tally = Tally()
        self.exports = Exports(limits.request, limits.engine)
        self._clock, holdings = Clock(limits), Holdings(limits, lambda: measure(self._units()))
        self._nodes = RequestNodes(table.calls, device, self.exports, limits)
        values = RequestValues(self._nodes, self._clock, holdings, limits)
        self._control = Control(table.orders, values, self._clock, limits)
        self._grouped = GroupRunner(table.orders, self._nodes, self._clock, holdings, limits)
        self._prefill = Prefill(programs, store, lambda name: len(table.sites[name].info.shape) - 1, device)
        self._alone: dict[tuple[str, int], EngineRequest] = {}
        self._groups: list[Group] = []
        self._waiting: dict[int, list[Unit]] = {}
        self._step: Step | None = None
        self._is_at_logits = False
        self._interrupt: BaseException | None = None

    def warm_up(self) -> None:
        """Do now what would make the first request with a graph wait."""
        self._nodes.guard.warm_up()

    def admit(self, arrival: Arrival) -> None:
        """Take a request. A graph that can't be run fails it; nothing is raised."""
        units = requests_of(arrival, Outbox(arrival.request_id, self._unsent, self._limits), self._ended)
        self.requests[arrival.request_id] = units[0]
        for unit, graph in zip(units, arrival.graphs, strict=True):
            self._alone[unit.key] = unit
            self._guarded(unit, partial(self._load, unit, graph, arrival.refuse_samples))
        if len(units) > 1:
            self._several.add(arrival.request_id)
            self._guarded(units[0], partial(check_names, units))

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended."""
        gone = self.requests.keys() & set(request_ids)
        if not gone:
            return
        self._settle()
        for id in gone:
            request = self.requests.pop(id)
            for unit in request.programs:
                self._alone.pop(unit.key, None)
                self._num_saved -= unit.num_saved
                self._prefill.drop(unit)
                self._tables.release(unit.slots.values())
            self._unsent.discard(id)
            self._several.discard(id)
            self.exports.release(Released(request.undrawn))
        self._fused.forget()
        self._groups = [part for group in self._groups if (part := _without(group, gone)) is not None]

    def fail(self, request_id: str, error: Exception) -> None:
        """Fail a request for a reason that the engine knows, also one whose program is over: its edits must stay."""
        request = self.requests.get(request_id)
        if request is not None and not request.has_failed:
            if request.request_programs is not None:
                request.request_programs.reopen()
            request.fail(error, keep_token=False)
            for unit in request.programs:
                unit.finish(has_failed=True)
            self._groups = [part for group in self._groups if (part := _without(group, {request_id})) is not None]

    def begin_step(self, step: Step) -> None:
        """A forward is about to start over these requests' rows."""
        self._tally.start()
        self._step = step
        self._is_at_logits = False
        self._clock.step += 1
        with _inference():
            self._tables.fill()
        ready: list[Unit] = []
        groups, self._groups = self._groups, []
        for group in groups:
            ready += self._begin_group(group, step)
        for request in list(self._alone.values()):
            index = step.index.get(request.id)
            if request.is_over:
                self._alone.pop(request.key)
            elif index is not None:
                ready += self._begin(request, index, step)
        self._go_on(ready, step)
        self._tally.pause()

    def enter_logits(self) -> None:
        """From here on each request has one row, its last token's."""
        self._is_at_logits = True

    def at_tap(self, tap: int, tensors: Tensors) -> None:
        """The model is at a tap: run whoever waits for a site on it. Never raises."""
        self._tally.start()
        self._active_pop(tap)
        while tap in self._waiting:
            units = self._due(tap)
            assert self._step is not None
            with _inference():
                done = self._fused.run(units, tensors, self._step, self._is_at_logits) if self._batching else {}
            for unit in units:
                leave = partial(self._leave_site, unit, done[id(unit)]) if id(unit) in done else None
                if isinstance(unit, Group):
                    for part in self._run_group(unit, leave or partial(self._arrive_together, unit, tensors)):
                        self._await(part)
                else:
                    self._run_alone(unit, leave or partial(self._arrive, unit, tensors))
                    self._await(unit)
            self._active_pop(tap)
        self._tally.pause()

    def leave_logits(self) -> None:
        """The model is done and the logits are there: only the drawn token is still to come."""
        if self._step is not None:
            self._step = self._step.after_logits()
        for tap in [tap for tap in self._waiting if tap != SAMPLES_TAP]:
            self._active_pop(tap)
            for unit in self._waiting.pop(tap):
                self._leave(unit)

    def writes_samples(self, request_id: str) -> bool:
        """Whether this request may replace the token that is about to be drawn."""
        request = self.requests.get(request_id)
        return request is not None and any(not r.is_over and r.program.writes_samples for r in request.programs)

    def fail_step(self, error: Exception) -> None:
        """Fail every request of this step: a defect of ours, in which anything may be wrong."""
        for id in list(self._step.index if self._step else ()):
            self.fail(id, error)

    def end_step(self, emitting: Collection[str]) -> Messages:
        """The step is over. Returns what goes home of the requests that emit in this step.

        Raises what interrupted a graph from outside (Ctrl-C), now that nothing is half done.
        """
        self._tally.start()
        units: list[Unit] = [*self._alone.values(), *self._prefill.pieces, *self._groups]
        for unit in units:
            if isinstance(unit, Group) or (self._step is not None and unit.id in self._step.index):
                self._leave(unit)
        self._prefill.collect(self._excess_held)
        for request, _, excess in self._prefill.joined:
            if excess and not request.has_failed:
                self._refuse_results(request, excess)
        sent = self._messages(emitting)
        self._prefill.forget(self._groups)
        self._close_ended()
        self._clear_step()
        self._tally.end_step(sent.num_bytes)
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt
        return sent

    def leftovers(self, known: Collection[str]) -> list[str]:
        """What shouldn't be there between steps; `known`: ids of requests that the engine still has."""
        found = [f"a handler at tap {tap}" for tap in self._table.active]
        found += [f"requests waiting at tap {tap}" for tap in self._waiting]
        members = [member for group in self._groups for member in group.members]
        found += [f"request {r.id} is in a group and unknown" for r in members if r.id not in self.requests]
        found += [f"a site of a group of {group.size}" for group in self._groups if group.place is not None]
        found += [f"results of request {id}, which ended" for id in self._unsent.difference(self.requests)]
        found += [f"programs of request {id}, which ended" for id in self._several.difference(self.requests)]
        found += [f"{len(self._ended)} requests that ended in a step that is over"] if self._ended else []
        units = [unit for request in self.requests.values() for unit in request.programs]
        found += [f"request {key[0]} runs alone and is unknown" for key in self._alone if key[0] not in self.requests]
        found += self.exports.leftovers()
        num_lines = sum(len(unit.slots) for unit in units)
        if self._tables.num_users != num_lines:
            found.append(f"{self._tables.num_users} lines of tables in use; the requests have {num_lines}")
        num_held = sum(unit.progress.num_bytes for unit in units if unit.progress is not None)
        if self._prefill.num_held != num_held:
            found.append(f"{self._prefill.num_held} bytes of prompts' pieces are held; the requests have {num_held}")
        found += [f"a piece of request {piece.id}" for piece in self._prefill.pieces]
        for unit in units:
            if unit.place is not None:
                found.append(f"a working copy of {unit.place.name} of request {unit.id}")
        found += [f"state of request {id}, which the engine doesn't know" for id in self.requests if id not in known]
        return found

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
        return [*self._alone.values(), *self._prefill.pieces, *self._groups, *self._grouped.running]

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

    def _begin(self, request: EngineRequest, index: int, step: Step) -> list[Unit]:
        found: list[Unit] = []
        self._guarded(request, lambda: found.extend(self._units_of(request, index, step)))
        for unit in found:
            assert isinstance(unit, EngineRequest)
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

    def _begin_group(self, group: Group, step: Step) -> list[Unit]:
        is_here = group.locate(step) >= 0
        if not is_here.any():
            self._groups.append(group)
            return []
        if not is_here.all():  # the others wait for a later step, by themselves
            here = [int(i) for i in np.flatnonzero(is_here)]
            for i in set(range(group.size)).difference(here):
                request = group.select([i]).release()
                self._alone[request.key] = request
            group = group.select(here)
        wrong = group.unexpected(step)
        if wrong:
            for i in wrong:
                at = int(group.locate(step)[i])
                request, count = group.members[i], int(step.starts[at + 1] - step.starts[at])
                request.iteration = int(group.iteration[i])
                request.fail(interrupted(request, int(step.positions[at]), count), keep_token=False)
            keep = [i for i in range(group.size) if i not in wrong]
            if not keep:
                group.spill()
                return []
            group = group.select(keep)
        order = np.argsort(group.locate(step), kind="stable")
        if not bool((order[1:] > order[:-1]).all()):
            group = group.select(order.tolist())
        group.iteration = group.iteration + 1
        group.lag -= 1
        if group.site is None and group.lag == 0:
            return list(self._run_group(group, lambda: None))
        return [group]

    def _go_on(self, ready: list[Unit], step: Step) -> None:
        """Form groups of those at the same point, and let everybody wait for their sites."""
        by_key: dict[object, list[Unit]] = {}
        for unit in ready:
            if not unit.is_over:
                by_key.setdefault((unit.point() if self._batching else None) or object(), []).append(unit)
        for units in by_key.values():
            self._await(units[0] if len(units) == 1 else self._together(units, step))

    def _together(self, units: list[Unit], step: Step) -> Group:
        groups = [unit for unit in units if isinstance(unit, Group)]
        requests = [unit for unit in units if isinstance(unit, EngineRequest)]
        for request in requests:
            if self._alone.get(request.key) is request:  # or it's a piece, whose owner waits for the next one
                del self._alone[request.key]
        if requests:
            groups.append(Group.of(requests))
        group = groups[0] if len(groups) == 1 else Group.merged(groups)
        order = np.argsort(group.locate(step), kind="stable")
        return group if bool((order[1:] > order[:-1]).all()) else group.select(order.tolist())

    def _await(self, unit: Unit) -> None:
        """Have the tap of the site that a program waits for call us, if it's one of this iteration."""
        if isinstance(unit, Group) and unit not in self._groups:
            self._groups.append(unit)
        if unit.site is not None and unit.lag == 0 and not unit.is_over:
            tap = self._table.sites[unit.site].tap
            self._waiting.setdefault(tap, []).append(unit)
            self._table.active[tap] = partial(self.at_tap, tap)

    def _due(self, tap: int) -> list[Unit]:
        """Who runs next of those that wait at a tap: all, or where programs of one request may be among them the first ones."""
        units = self._waiting.pop(tap)
        if self._several:
            ranks = [self._rank(unit) for unit in units]
            later = [unit for unit, rank in zip(units, ranks, strict=True) if rank > min(ranks)]
            units = [unit for unit, rank in zip(units, ranks, strict=True) if rank == min(ranks)]
            if later:
                self._waiting[tap] = later
        return self._still_running(units) if self._ended else units

    def _rank(self, unit: Unit) -> tuple[int, int]:
        assert unit.site is not None
        return self._table.orders[unit.site], unit.number

    def _still_running(self, units: Iterable[Unit]) -> list[Unit]:
        """Without the programs that ended because another one of their request did."""
        found: list[Unit] = []
        for unit in units:
            if isinstance(unit, Group):
                keep = [i for i, member in enumerate(unit.members) if not member.is_over]
                if keep:
                    found.append(unit if len(keep) == unit.size else unit.select(keep))
                else:
                    unit.spill()
                self._groups = [group for group in self._groups if group is not unit]
            elif not unit.is_over:
                found.append(unit)
        return found

    def _close_ended(self) -> None:
        if self._ended:
            self._groups = [unit for unit in self._still_running(self._groups) if isinstance(unit, Group)]
            self._ended.clear()

    def _arrive(self, request: EngineRequest, tensors: Tensors) -> None:
        name = request.site
        assert name is not None and self._step is not None
        request.order = self._table.orders[name]
        index = self._step.index[request.id]
        rows = self._step.rows(index, self._is_at_logits)
        request.place = RequestPlace(name, self._table.sites[name], tensors, rows)

    def _arrive_together(self, group: Group, tensors: Tensors) -> None:
        name = group.site
        assert name is not None and self._step is not None
        site, layout = self._table.sites[name], group.layout(self._step, self._is_at_logits)
        group.order = self._table.orders[name]
        group.place = GroupPlace(name, site, tensors, layout, partial(self._grouped.members.blame, group))

    def _leave_site(self, unit: Unit, error: BaseException | None) -> None:
        """The unit did at its site all that it does there: go on behind it."""
        done = unit.program.fused[unit.pc]
        unit.order, unit.place = self._table.orders[done.site], None
        if error is not None:
            raise error
        unit.pc = done.stop
        for id in done.free:
            unit.env.pop(id, None)
        self._grouped.nodes.counts.batched += done.num_operations * unit.size

    def _run_alone(self, request: EngineRequest, arrive: Callable[[], None]) -> None:
        def run() -> None:
            arrive()
            self._control.run(request)

        self._guarded(request, run)

    def _run_group(self, group: Group, arrive: Callable[[], None]) -> list[Group]:
        """Nothing that a graph does may leave the op's body; what isn't one request's fault fails the group."""
        if group in self._groups:
            self._groups.remove(group)
        try:
            with _inference():
                return self._grouped.run(group, arrive)
        except Exception as error:
            self._grouped.fail(error)
        except BaseException as error:
            self._interrupt = error
            self._grouped.fail(error)
        return []

    def _leave(self, unit: Unit) -> None:
        """The iteration is over; what a program still waits for in it will never come."""
        if isinstance(unit, EngineRequest):
            self._guarded(unit, partial(_leave_alone, unit))
            return
        if unit.site is not None and unit.lag <= 0 and not unit.is_over:
            error = OutOfOrderError(f"the model ran iteration {int(unit.iteration[0])} without passing {unit.site}")
            for member in unit.members:
                member.fail(error, keep_token=True)
            unit.is_over = True
            unit.spill()
            self._groups = [group for group in self._groups if group is not unit]
        unit.leave_iteration()

    def _messages(self, emitting: Collection[str]) -> Messages:
        sent = Messages()
        emits, done = set(emitting), set[str]()  # of several programs one may have more to send
        for group in list(self._groups):
            if group.sheet.columns and emits.issuperset(group.ids):
                self._send_together(group, sent)
                done.update(set(group.ids) - self._several)
            elif group.sheet.columns:
                group.spill()
            group.sheet.clear()
        for id in [id for id in emitting if id in self._unsent and id not in done] if self._unsent else ():
            request = self.requests[id]
            if (data := request.outbox.take()) is not None:
                self._send(request, _tensor(data), sent)
        for id in self._unsent.difference(emits):
            self._send_early(self.requests[id], sent)
        sent.made = self.exports.take_made()
        return sent

    def _send_early(self, request: EngineRequest, sent: Messages) -> None:
        """Say at once that a request failed while its prompt is computed, though it has no output yet."""
        if self._step is None or request.id not in self._step.index or not request.has_failed:
            return
        if (data := request.outbox.take()) is not None:
            sent.early[request.id] = _tensor(data)
            if request.links is not None and (failure := request.failed_by) is not None:
                sent.failed[request.id] = failure

    def _send_together(self, group: Group, sent: Messages) -> None:
        assert self._step is not None
        sheet, group.sheet = group.sheet, BatchedSaves(group.size)
        start, lines = sheet.lines()
        size, members = lines.shape[1], group.members
        in_step = size - len(start)
        excess = self._limits.excess(self._most_saved(group) + size, self._num_saved + size * len(members), in_step)
        if not excess and self._unsent.isdisjoint(group.ids):
            self._num_saved += size * len(members)
            group.num_saved += size
            sent.together.append((group.locate(self._step), lines))
            return
        for i, member in enumerate(group.members):
            if member.outbox.is_empty:
                self._send(member, lines[i], sent, in_step)
            else:
                self._send(member, _tensor(member.outbox.take(sheet.sheet_of(i, start, lines))), sent, in_step)

    def _most_saved(self, group: Group) -> int:
        """What one of the group's requests sent home so far at most, in bytes."""
        if self._several.isdisjoint(group.ids):
            return group.most_saved
        self._settle()
        return max(member.sent_in_all for member in group.members)

    def _send(self, request: EngineRequest, message: Tensor, sent: Messages, in_step: int = 0) -> None:
        """A message on its way home, unless it brings the request or the engine over its limit."""
        self._settle()
        request.num_saved += message.numel()
        self._num_saved += message.numel()
        excess = self._limits.excess(request.sent_in_all, self._num_saved, in_step)
        if excess and not request.has_failed:
            self._refuse_results(request, excess)
            message = _tensor(request.outbox.take())
        sent.add(request.id, message)
        if request.outbox.has_ended:
            sent.last.add(request.id)
            if request.links is not None and (failure := request.failed_by) is not None:
                sent.failed[request.id] = failure

    def _refuse_results(self, request: EngineRequest, excess: str) -> None:
        self._groups = [part for group in self._groups if (part := _without(group, {request.id})) is not None]
        request.start_over(Outbox(request.id, self._unsent, self._limits))
        request.fail(InterventionError(excess), keep_token=True)

    def _excess_held(self, request: EngineRequest, of_request: int, of_all: int) -> str:
        return self._limits.excess(request.sent_in_all + of_request, self._num_saved + of_all)

    def _settle(self) -> None:
        for group in self._groups:
            group.settle()

    def _guarded(self, request: EngineRequest, work: Callable[[], None]) -> None:
        """Nothing that a graph does may leave the op's body: it would end the engine for everybody."""
        try:
            with _inference():
                work()
        except Exception as error:
            request.fail(error, self._keeps_token(request))
        except BaseException as error:
            self._interrupt = error
            request.fail(error, self._keeps_token(request))

    def _keeps_token(self, request: EngineRequest) -> bool:
        return request.keeps_token(self._table.orders)

    def _active_pop(self, tap: int) -> None:
        self._table.active.pop(tap, None)

    def _clear_step(self) -> None:
        for tap in self._waiting:
            self._active_pop(tap)
        self._waiting.clear()
        self._step = None


def _inference() -> AbstractContextManager[object]:
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()


def _leave_alone(request: EngineRequest) -> None:
    if not request.is_over and request.site is not None and request.lag == 0:
        raise OutOfOrderError(f"the model ran iteration {request.iteration} without passing {request.site}")
    request.leave_iteration()


def _without(group: Group, gone: Collection[str]) -> Group | None:
    keep = [i for i, member in enumerate(group.members) if member.id not in gone]
    if len(keep) == group.size:
        return group
    return group.select(keep) if keep else None


def _tensor(data: bytes | None) -> Tensor:
    return torch.frombuffer(bytearray(data or b""), dtype=torch.uint8)
