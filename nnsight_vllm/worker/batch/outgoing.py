"""What goes home at the end of a step: the messages, and the limits of what a request and all of them send."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.wire.step_output import Messages
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.population import Population
from nnsight_vllm.worker.batch.requests import EngineRequest
from nnsight_vllm.worker.batch.step import Step
from nnsight_vllm.worker.results.batched_saves import BatchedSaves
from nnsight_vllm.worker.results.exports import Exports
from nnsight_vllm.worker.results.outbox import Outbox


class Outgoing:
    """`unsent`: requests that may have something to send. `num_saved`: bytes sent home of the requests that live."""

    def __init__(self, population: Population, exports: Exports, limits: Limits) -> None:
        self.unsent: set[str] = set()
        self.num_saved = 0
        self._population = population
        self._exports = exports
        self._limits = limits

    def outbox(self, request_id: str) -> Outbox:
        return Outbox(request_id, self.unsent, self._limits)

    def drop(self, request: EngineRequest) -> None:
        """The request is gone, with all of its programs."""
        self.num_saved -= request.sent_in_all
        self.unsent.discard(request.id)

    def messages(self, step: Step, emitting: Collection[str]) -> Messages:
        """What goes home of the requests that emit in this step."""
        sent = Messages()
        emits, done = set(emitting), set[str]()  # of several programs one may have more to send
        for group in list(self._population.groups):
            if group.sheet.columns and emits.issuperset(group.ids):
                self._send_together(group, step, sent)
                done.update(set(group.ids) - self._population.several)
            elif group.sheet.columns:
                group.spill()
            group.sheet.clear()
        for id in [id for id in emitting if id in self.unsent and id not in done] if self.unsent else ():
            request = self._population.requests[id]
            if (data := request.outbox.take()) is not None:
                self._send(request, _tensor(data), sent)
        for id in self.unsent.difference(emits):
            self._send_early(self._population.requests[id], step, sent)
        sent.made = self._exports.take_made()
        return sent

    def _send_early(self, request: EngineRequest, step: Step, sent: Messages) -> None:
        """Say at once that a request failed while its prompt is computed, though it has no output yet."""
        if request.id not in step.index or not request.has_failed:
            return
        if (data := request.outbox.take()) is not None:
            sent.early[request.id] = _tensor(data)
            if request.links is not None and (failure := request.failed_by) is not None:
                sent.failed[request.id] = failure

    def _send_together(self, group: Group, step: Step, sent: Messages) -> None:
        sheet, group.sheet = group.sheet, BatchedSaves(group.size)
        start, lines = sheet.lines()
        size, members = lines.shape[1], group.members
        in_step = size - len(start)
        excess = self._limits.excess(self._most_saved(group) + size, self.num_saved + size * len(members), in_step)
        if not excess and self.unsent.isdisjoint(group.ids):
            self.num_saved += size * len(members)
            group.num_saved += size
            sent.together.append((group.locate(step), lines))
            return
        for i, member in enumerate(group.members):
            if member.outbox.is_empty:
                self._send(member, lines[i], sent, in_step)
            else:
                self._send(member, _tensor(member.outbox.take(sheet.sheet_of(i, start, lines))), sent, in_step)

    def _most_saved(self, group: Group) -> int:
        """What one of the group's requests sent home so far at most, in bytes."""
        if self._population.several.isdisjoint(group.ids):
            return group.most_saved
        self._population.settle()
        return max(member.sent_in_all for member in group.members)

    def _send(self, request: EngineRequest, message: Tensor, sent: Messages, in_step: int = 0) -> None:
        """A message on its way home, unless it brings the request or the engine over its limit."""
        self._population.settle()
        request.num_saved += message.numel()
        self.num_saved += message.numel()
        excess = self._limits.excess(request.sent_in_all, self.num_saved, in_step)
        if excess and not request.has_failed:
            self.refuse(request, excess)
            message = _tensor(request.outbox.take())
        sent.add(request.id, message)
        if request.outbox.has_ended:
            sent.last.add(request.id)
            if request.links is not None and (failure := request.failed_by) is not None:
                sent.failed[request.id] = failure

    def refuse(self, request: EngineRequest, excess: str) -> None:
        """Fail a request for its results, which aren't sent."""
        self._population.take_out({request.id})
        request.start_over(self.outbox(request.id))
        request.fail(InterventionError(excess), keep_token=True)

    def excess(self, request: EngineRequest, of_request: int, of_all: int) -> str:
        """What would be over its limit if a request sent so many bytes more, and all of them so many."""
        return self._limits.excess(request.sent_in_all + of_request, self.num_saved + of_all)


def _tensor(data: bytes | None) -> Tensor:
    return torch.frombuffer(bytearray(data or b""), dtype=torch.uint8)
