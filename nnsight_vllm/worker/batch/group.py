"""Requests at the same point of the same program, running as one.

A group is formed where requests meet and taken apart where they part: by a branch, by iterations that end at different
times, or when some aren't in a step. Each member keeps its identity, its parameters and its own results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.batch.cursor import BlockFrame, Cursor, IterationsFrame, LoopFrame
from nnsight_vllm.worker.batch.group_place import GroupPlace, Layout
from nnsight_vllm.worker.batch.requests import EngineRequest, interrupted
from nnsight_vllm.worker.batch.step import Step
from nnsight_vllm.worker.batch.tables import TableLines
from nnsight_vllm.worker.lanes.lanes import (
    Each,
    Items,
    Lane,
    Ragged,
    Rows,
    Several,
    View,
    as_ints,
    constant_of,
    joined,
    lane_of,
)
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors
from nnsight_vllm.worker.ops.usage import Spent, bytes_each
from nnsight_vllm.worker.results.batched_saves import BatchedSaves


@dataclass(eq=False)
class Group(Cursor):
    """`iteration`: that of each request. `dead`: members that failed since the group last waited.

    `num_saved`: bytes that each member sent home as one of this group, and that its own count doesn't have yet. `spent`: of
    each, while it is one of this group.
    """

    members: list[EngineRequest]
    iteration: Ints = field(kw_only=True)
    prompt: Ints = field(kw_only=True)
    env: dict[int, Lane] = field(default_factory=dict, kw_only=True)
    place: GroupPlace | None = field(default=None, kw_only=True)
    dead: set[int] = field(default_factory=set)
    num_saved: int = 0
    _most_saved: int | None = None
    _parameters: dict[int, Lane] = field(default_factory=dict)
    _lines: dict[int, TableLines] = field(default_factory=dict)
    _in_step: tuple[Ints | None, Ints | None] = (None, None)
    _located: tuple[object, Ints] | None = None
    _layouts: dict[bool, tuple[Step, Layout]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number, self.size = self.members[0].number, len(self.members)
        self.sheet = BatchedSaves(self.size)

    @functools.cached_property
    def ids(self) -> list[str]:
        return [member.id for member in self.members]

    # -- making and taking apart -------------------------------------------------------------------------------------

    @classmethod
    def of(cls, requests: list[EngineRequest]) -> Group:
        """Requests that wait at one point of one program, no loop around it, as a group."""
        first = requests[0]
        iteration = as_ints([request.iteration for request in requests])
        prompt = as_ints([request.prompt_length for request in requests])
        group = cls(requests, iteration=iteration, prompt=prompt)
        # What one has and another hasn't came from a branch that is over, and nobody reads it any more.
        ids = set(first.env).intersection(*[request.env for request in requests])
        group.env = {id: lane_of([request.env[id] for request in requests]) for id in ids if id >= 0}
        return group._standing_as(first, _joined_frames(requests, as_ints))

    @classmethod
    def merged(cls, groups: list[Group]) -> Group:
        """Groups at the same point as one. Their saves so far go to the requests' own outboxes."""
        first, sizes = groups[0], [group.size for group in groups]
        for group in groups:
            group.spill()
        merged = cls(
            [member for group in groups for member in group.members],
            iteration=np.concatenate([group.iteration for group in groups]),
            prompt=np.concatenate([group.prompt for group in groups]),
        )
        ids = set(first.env).intersection(*[group.env for group in groups])
        merged.env = {id: joined([group.env[id] for group in groups], sizes) for id in ids}
        return merged._standing_as(first, _joined_frames(groups, np.concatenate))

    def select(self, keep: Sequence[int]) -> Group:
        """Some members as a group of their own, at the same point."""
        self.spill()
        at = list(keep)
        part = Group([self.members[i] for i in at], iteration=self.iteration[at], prompt=self.prompt[at])
        part.spent = replace(self.spent)
        part.env = {id: self._selected(lane, keep) for id, lane in self.env.items()}
        return part._standing_as(self, [self._selected_frame(frame, at) for frame in self.frames])

    def _standing_as(self, other: Cursor, frames: list[BlockFrame]) -> Group:
        """Where the other one stands."""
        self.program, self.pc, self.site, self.lag = other.program, other.pc, other.site, other.lag
        self.order, self.has_token, self.frames = other.order, other.has_token, frames
        return self

    def release(self) -> EngineRequest:
        """The only member, on its own again."""
        (request,) = self.members
        self.spill()
        request.pc, request.site, request.lag = self.pc, self.site, self.lag
        request.order, request.has_token, request.iteration = self.order, self.has_token, int(self.iteration[0])
        request.env.update({id: lane.of(0) for id, lane in self.env.items()})
        request.frames = [IterationsFrame(*(int(own[0]) for own in frame.numbers)) for frame in _blocks(self)]
        return request

    def _selected(self, lane: Lane, keep: Sequence[int]) -> Lane:
        if self.program.changes_values and isinstance(lane, Each | Rows | View | Several):
            return Items([lane.of(i) for i in keep])  # views of one memory stay views of it
        return lane.select(keep)

    def _selected_frame(self, frame: BlockFrame, keep: list[int]) -> BlockFrame:
        if isinstance(frame, IterationsFrame):
            return IterationsFrame(*(own[keep] for own in frame.numbers))
        return LoopFrame([self._selected(lane, keep) for lane in frame.items], frame.position)

    # -- results and ends --------------------------------------------------------------------------------------------

    @property
    def most_saved(self) -> int:
        """What the member with most results sent home so far, in bytes."""
        if self._most_saved is None:
            self._most_saved = max(member.num_saved for member in self.members)
        return self._most_saved + self.num_saved

    def settle(self) -> None:
        """Bring the members' own counts up to date; they may then change."""
        if self.num_saved:
            for member in self.members:
                member.num_saved += self.num_saved
        self.num_saved, self._most_saved = 0, None

    def spill(self) -> None:
        self.settle()
        self.sheet.spill([member.outbox for member in self.members])

    def held(self) -> list[tuple[Spent, int]]:
        known = [value for member in self.members for value in member.parameters.values()]
        lanes = [lane for id, lane in self.env.items() if id >= 0]
        lanes += [lane for frame in self.frames if isinstance(frame, LoopFrame) for lane in frame.items]
        spent = [member.spent for member in self.members]
        return list(zip(spent, bytes_each(lanes, known, self.size), strict=True))

    def end(self) -> None:
        for i, member in enumerate(self.members):
            if i not in self.dead:
                member.end()
        self.is_over = True

    def stop(self, keep_token: bool) -> None:
        for i, member in enumerate(self.members):
            if i not in self.dead:
                member.stop(keep_token)
        self.is_over = True

    def blame(self, i: int, error: BaseException) -> None:
        """A member failed; the others go on."""
        if i in self.dead:
            return
        self.dead.add(i)
        self.is_over = len(self.dead) == self.size or self.is_over
        self.members[i].node = self.node
        self.members[i].fail(error, self.has_token)

    def fail(self, error: BaseException) -> None:
        for i, member in enumerate(self.members):
            if not member.is_over:
                self.blame(i, error)

    def remaining(self) -> Group | None:
        keep = [i for i, member in enumerate(self.members) if not member.is_over]
        if len(keep) == self.size:
            return self
        if keep:
            return self.select(keep)
        self.spill()
        return None

    # -- steps -------------------------------------------------------------------------------------------------------

    def arrive(self, site: Site, tensors: Tensors, step: Step, at_logits: bool) -> None:
        self.place = GroupPlace(site.info.name, site, tensors, self.layout(step, at_logits), self.blame)

    def locate(self, step: Step) -> Ints:
        """Each member's place in the step's batch; -1 where it has none."""
        if self._located is None or self._located[0] is not step.index:
            self._located = step.index, as_ints([step.index.get(member.id, -1) for member in self.members])
        return self._located[1]

    def layout(self, step: Step, at_logits: bool) -> Layout:
        """Where the members' rows are in this step: all rows of each, or at the logits its one. As long as it's there, the same."""
        known = self._layouts.get(at_logits)
        if known is None or known[0] is not step:
            at = self.locate(step)
            counts = step.starts[at + 1] - step.starts[at]
            starts = step.logits_rows(at) if at_logits else step.starts[at]
            is_single = at_logits or bool((counts == 1).all())
            ragged = single_rows(self.size) if is_single else Ragged(counts)
            is_same = known is not None and known[1].ragged is ragged and bool((known[1].starts == starts).all())
            known = step, known[1] if known is not None and is_same else Layout(starts, ragged)
            self._layouts[at_logits] = known
        return known[1]

    def unexpected(self, step: Step) -> list[int]:
        """Members for whom the step computes something else than what comes next."""
        at = self.locate(step)
        positions, counts = step.positions[at], step.starts[at + 1] - step.starts[at]
        following = (positions == self.prompt + self.iteration) & (counts == 1)
        return [int(i) for i in np.flatnonzero(~following)]

    def interrupt(self, wrong: list[int], step: Step) -> None:
        """Fail those members."""
        for i in wrong:
            at, request = int(self.locate(step)[i]), self.members[i]
            request.iteration = int(self.iteration[i])
            count = int(step.starts[at + 1] - step.starts[at])
            request.fail(interrupted(request, int(step.positions[at]), count), keep_token=False)

    def mark_in_step(self) -> None:
        """All members' innermost iterations block is at the iteration of this step."""
        frame = self.frames[-1]
        self._in_step = frame.current if isinstance(frame, IterationsFrame) else None, self.iteration

    def is_in_step(self) -> bool:
        """What was marked, as long as neither the block nor the step goes on."""
        current, iteration = self._in_step
        frame = self.frames[-1] if self.frames and iteration is self.iteration else None
        return isinstance(frame, IterationsFrame) and frame.current is current

    # -- parameters --------------------------------------------------------------------------------------------------

    def parameter(self, id: int) -> Lane:
        """A parameter of all members: one value, a stack of tensors, or a value a member."""
        if id not in self._parameters:
            values = [member.parameters[id] for member in self.members]
            self._parameters[id] = self._known(values) or constant_of(values)
        return self._parameters[id]

    def lines(self, node: int) -> TableLines:
        """The members' lines for an edit."""
        if node not in self._lines:
            self._lines[node] = TableLines.of([member.slots.get(node) for member in self.members])
        return self._lines[node]

    def forget(self, ids: Iterable[int]) -> None:
        """Let go of parameters that nobody uses any more."""
        for id in ids:
            self._parameters.pop(id, None)

    def _known(self, values: list[Any]) -> Lane | None:
        """The same tensors may be several parameters: they are stacked once."""
        if not isinstance(values[0], Tensor):
            return None
        for id, lane in self._parameters.items():
            if isinstance(lane, Each) and all(
                member.parameters[id] is value for member, value in zip(self.members, values, strict=True)
            ):
                return lane
        return None


def _blocks(cursor: Cursor) -> list[IterationsFrame]:
    """Its frames where it isn't in a loop."""
    assert all(isinstance(frame, IterationsFrame) for frame in cursor.frames)
    return [frame for frame in cursor.frames if isinstance(frame, IterationsFrame)]


def _joined_frames(cursors: Sequence[Cursor], join: Callable[[Any], Ints]) -> list[BlockFrame]:
    """Those of each depth as one."""
    depths = zip(*[_blocks(cursor) for cursor in cursors], strict=True)
    return [IterationsFrame(*map(join, zip(*[frame.numbers for frame in frames], strict=True))) for frames in depths]


@functools.lru_cache(maxsize=1024)
def single_rows(num: int) -> Ragged:
    """One row each."""
    return Ragged(np.ones(num, dtype=np.int64))


Unit = EngineRequest | Group
