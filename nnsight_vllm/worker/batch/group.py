"""Requests at the same point of the same program, running as one.

A group is formed where requests meet and taken apart where they part: by a branch, by iterations that end at different
times, or when some aren't in a step. Each member keeps its identity, its parameters and its own results.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from nnsight_vllm.plan.program import Program
from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.batch.group_place import GroupPlace, Layout
from nnsight_vllm.worker.batch.requests import START, EngineRequest, IterationsFrame, Step, Wait
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
from nnsight_vllm.worker.ops.usage import Spent
from nnsight_vllm.worker.results.batched_saves import BatchedSaves


@dataclass
class GroupLoop:
    """The items of a loop that are still to come; every request has as many."""

    items: list[Lane]
    position: int = 0


@dataclass
class GroupIterations:
    """The same as a request's `IterationsFrame`, a number a request."""

    upcoming: Ints
    stop: Ints
    step: Ints
    current: Ints

    def select(self, keep: Sequence[int]) -> GroupIterations:
        at = list(keep)
        return GroupIterations(self.upcoming[at], self.stop[at], self.step[at], self.current[at])


Frame = GroupLoop | GroupIterations


@dataclass(eq=False)
class Group:
    """`wait`: the site where all stand (None: the iteration's beginning), `lag` iterations from now.

    `iteration`: that of each request. `dead`: members that failed since the group last waited. `num_saved`: bytes that each
    member sent home as one of this group, and that its own count doesn't have yet. `spent`: of each, while it is one of this group.
    """

    program: Program
    members: list[EngineRequest]
    env: dict[int, Lane]
    pc: int
    frames: list[Frame]
    site: str | None
    lag: int
    iteration: Ints
    prompt: Ints
    order: int = START
    place: GroupPlace | None = None
    node: int | None = None
    dead: set[int] = field(default_factory=set)
    sheet: BatchedSaves = field(default_factory=lambda: BatchedSaves(0))
    num_saved: int = 0
    spent: Spent = field(default_factory=Spent)
    is_over: bool = False
    _most_saved: int | None = None
    _parameters: dict[int, Lane] = field(default_factory=dict)
    _lines: dict[int, TableLines] = field(default_factory=dict)
    _in_step: tuple[Frame | None, Ints | None] = (None, None)
    _located: tuple[object, Ints] | None = None
    _layouts: dict[bool, tuple[Step, Layout]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.members)

    @functools.cached_property
    def ids(self) -> list[str]:
        return [member.id for member in self.members]

    @property
    def number(self) -> int:
        """Which of its request's programs each member is: never two of one request."""
        return self.members[0].number

    @property
    def is_waiting(self) -> bool:
        return not self.is_over and bool(self.members)

    # -- making and taking apart -------------------------------------------------------------------------------------

    @classmethod
    def of(cls, requests: list[EngineRequest]) -> Group:
        """Requests that wait at one point of one program, no loop around it, as a group."""
        first = requests[0]
        # What one has and another hasn't came from a branch that is over, and nobody reads it any more.
        ids = set(first.env).intersection(*[request.env for request in requests])
        env = {id: lane_of([request.env[id] for request in requests]) for id in ids if id >= 0}
        frames: list[Frame] = [_iterations([request.frames[depth] for request in requests]) for depth in _depths(first)]
        iteration = as_ints([request.iteration for request in requests])
        prompt = as_ints([request.prompt_length for request in requests])
        lag = first.wait.iteration - first.iteration
        group = cls(
            first.program, requests, env, first.pc, frames, first.wait.site, lag, iteration, prompt, first.order
        )
        group.sheet = BatchedSaves(len(requests))
        return group

    @classmethod
    def merged(cls, groups: list[Group]) -> Group:
        """Groups at the same point as one. Their saves so far go to the requests' own outboxes."""
        first, sizes = groups[0], [len(group) for group in groups]
        for group in groups:
            group.spill()
        ids = set(first.env).intersection(*[group.env for group in groups])
        env = {id: joined([group.env[id] for group in groups], sizes) for id in ids}
        frames: list[Frame] = [
            _joined_frames([group.frames[depth] for group in groups]) for depth in range(len(first.frames))
        ]
        merged = cls(
            first.program,
            [member for group in groups for member in group.members],
            env,
            first.pc,
            frames,
            first.site,
            first.lag,
            np.concatenate([group.iteration for group in groups]),
            np.concatenate([group.prompt for group in groups]),
            first.order,
        )
        merged.sheet = BatchedSaves(len(merged))
        return merged

    def select(self, keep: Sequence[int]) -> Group:
        """Some members as a group of their own, at the same point."""
        self.spill()
        part = Group(
            self.program,
            [self.members[i] for i in keep],
            {id: self._selected(lane, keep) for id, lane in self.env.items()},
            self.pc,
            [
                frame.select(keep) if isinstance(frame, GroupIterations) else self._loop(frame, keep)
                for frame in self.frames
            ],
            self.site,
            self.lag,
            self.iteration[list(keep)],
            self.prompt[list(keep)],
            self.order,
        )
        part.sheet, part.spent = BatchedSaves(len(part)), replace(self.spent)
        return part

    def release(self) -> EngineRequest:
        """The only member, on its own again."""
        (request,) = self.members
        self.spill()
        request.pc, request.order, request.iteration = self.pc, self.order, int(self.iteration[0])
        request.env.update({id: lane.of(0) for id, lane in self.env.items()})
        request.frames = []
        for frame in self.frames:
            assert isinstance(frame, GroupIterations)
            bounds = (int(frame.upcoming[0]), int(frame.stop[0]), int(frame.step[0]), int(frame.current[0]))
            request.frames.append(IterationsFrame(*bounds))
        request.wait = Wait(self.site, request.iteration + self.lag)
        return request

    def key(self) -> tuple[object, ...] | None:
        """Groups and requests with equal keys may run as one; None: with nobody."""
        if any(isinstance(frame, GroupLoop) for frame in self.frames):
            return None
        return (id(self.program), self.pc, len(self.frames), self.lag, self.site, self.number)

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

    def _selected(self, lane: Lane, keep: Sequence[int]) -> Lane:
        if self.program.changes_values and isinstance(lane, Each | Rows | View | Several):
            return Items([lane.of(i) for i in keep])  # views of one memory stay views of it
        return lane.select(keep)

    def _loop(self, frame: Frame, keep: Sequence[int]) -> GroupLoop:
        assert isinstance(frame, GroupLoop)
        return GroupLoop([self._selected(lane, keep) for lane in frame.items], frame.position)

    # -- steps -------------------------------------------------------------------------------------------------------

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
            ragged = single_rows(len(self)) if is_single else Ragged(counts)
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

    def mark_in_step(self) -> None:
        """All members' innermost iterations block is at the iteration of this step."""
        self._in_step = self.frames[-1] if self.frames else None, self.iteration

    def forget_step(self) -> None:
        self._in_step = None, None

    def is_in_step(self) -> bool:
        """What was marked, as long as neither the block nor the step goes on."""
        frame, iteration = self._in_step
        return frame is not None and bool(self.frames) and frame is self.frames[-1] and iteration is self.iteration

    def leave_iteration(self) -> None:
        self.place = None
        self.order = START

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


def key_of(request: EngineRequest) -> tuple[object, ...] | None:
    """A request's key, as `Group.key`; None where it can't be in a group."""
    if any(not isinstance(frame, IterationsFrame) for frame in request.frames):
        return None
    if request.program.keeps_together:
        return None
    lag = request.wait.iteration - request.iteration
    return (id(request.program), request.pc, len(request.frames), lag, request.wait.site, request.number)


def _depths(request: EngineRequest) -> range:
    return range(len(request.frames))


def _iterations(frames: list[Any]) -> GroupIterations:
    return GroupIterations(
        as_ints([frame.upcoming for frame in frames]),
        as_ints([frame.stop for frame in frames]),
        as_ints([frame.step for frame in frames]),
        as_ints([frame.current for frame in frames]),
    )


def _joined_frames(frames: list[Frame]) -> GroupIterations:
    found = [frame for frame in frames if isinstance(frame, GroupIterations)]
    return GroupIterations(
        np.concatenate([frame.upcoming for frame in found]),
        np.concatenate([frame.stop for frame in found]),
        np.concatenate([frame.step for frame in found]),
        np.concatenate([frame.current for frame in found]),
    )


@functools.lru_cache(maxsize=1024)
def single_rows(num: int) -> Ragged:
    """One row each."""
    return Ragged(np.ones(num, dtype=np.int64))
