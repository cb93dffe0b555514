"""The values of a group as the control loop looks at them: lanes. Where its members don't agree, they part.

A part is a group of its own at the same point, which repeats the instruction; the group that was is over.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.nodes import Arg
from nnsight_vllm.plan.instructions import At
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.control import ValueStrategy
from nnsight_vllm.worker.batch.cursor import IterationsFrame
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.group_members import Members
from nnsight_vllm.worker.batch.group_nodes import GroupNodes
from nnsight_vllm.worker.batch.request_values import UNBOUNDED, items_of
from nnsight_vllm.worker.lanes.lanes import Each, Items, Lane, Rows, Shared, View, as_ints, lane_of, resolved
from nnsight_vllm.worker.ops.usage import Holdings, bytes_of


class GroupValues(ValueStrategy[Group]):
    """`found`: parts that are still to run."""

    def __init__(self, members: Members, nodes: GroupNodes, holdings: Holdings, limits: Limits) -> None:
        self.nodes = nodes.methods
        self.found: list[Group] = []
        self._members = members
        self._holdings = holdings
        self._limits = limits

    def lag(self, group: Group, at: At) -> int | None:
        if at.iteration is None and group.is_in_step():
            return 0
        ahead = (group.innermost.current if at.iteration is None else at.iteration) - group.iteration
        if not self._agree(group, ahead):
            return None
        if at.iteration is None and not ahead[0]:
            group.mark_in_step()
        return int(ahead[0])

    def truth(self, group: Group, test: Arg) -> bool | None:
        lane = resolved(self._members.lane(group, test))
        if isinstance(lane, Shared):
            return bool(lane.value)
        fails = np.array([not holds for holds in self._truths(group, lane)])
        return not fails[0] if self._agree(group, fails) else None

    def _truths(self, group: Group, lane: Lane) -> list[Any]:
        if isinstance(lane, Each) and lane.tensor[0].numel() == 1:
            return lane.tensor.flatten().tolist()
        return self._members.each(group, lambda i: bool(lane.of(i)))

    def items(self, group: Group, over: Arg) -> list[Any] | None:
        lane = self._members.lane(group, over)
        if isinstance(lane, Shared) and not isinstance(lane.value, Tensor):
            return [Shared(item) for item in items_of(lane.value, self._limits)]
        lists = self._members.each(group, lambda i: items_of(lane.of(i), self._limits))
        lengths = as_ints([len(items or []) for items in lists])
        if not self._agree(group, lengths):
            return None
        return [lane_of([items[k] for items in lists]) for k in range(int(lengths[0]))]

    def bound(self, group: Group, bound: Arg) -> Any:
        lane = Shared(UNBOUNDED) if bound is None else self._members.lane(group, bound)
        return as_ints([lane.of(i) for i in range(group.size)])

    def goes_on(self, group: Group, frame: IterationsFrame) -> bool | None:
        ends = frame.upcoming >= frame.stop
        return not ends[0] if self._agree(group, ends) else None

    def index(self, numbers: Any) -> Lane:
        own = numbers.tolist()
        return Shared(own[0]) if bool((numbers == own[0]).all()) else Items(own)

    def value(self, group: Group, arg: Arg) -> Lane:
        return self._members.lane(group, arg)

    def made(self, group: Group, value: Lane) -> None:
        if not self._holdings.made(_bytes_of(value)):
            return
        for i in sorted(range(group.size), key=lambda i: -group.members[i].spent.held):
            held = group.members[i].spent.held
            if excess := self._holdings.excess(held):
                group.blame(i, InterventionError(excess))
                self._holdings.in_all -= held

    def check_time(self, group: Group) -> float:
        self._members.lap(group)
        self._members.each(group, lambda i: self._members.charge(group, i, 0.0))
        return perf_counter() + self._limits.seconds / 10

    def _agree(self, group: Group, values: Any) -> bool:
        """Whether a value is the same for all members; else they part by it."""
        if bool((values == values[0]).all()):
            return True
        group.pc -= 1
        for value in np.unique(values):
            self._split_off(group, [int(i) for i in np.flatnonzero(values == value)])
        group.is_over = True
        return False

    def _split_off(self, group: Group, members: list[int]) -> None:
        self._members.lap(group)
        keep = [i for i in members if i not in group.dead]
        if not keep:
            return
        part = group.select(keep)
        if group.place is not None:
            part.place = group.place.select(keep, part.blame)
            self._keep_views(group, part, keep)
        self.found.append(part)

    def _keep_views(self, group: Group, part: Group, keep: list[int]) -> None:
        """What looks at the site goes on looking at it, in the part too."""
        assert group.place is not None and part.place is not None
        for id, lane in group.env.items():
            if isinstance(lane, View) and lane.memory is group.place.current:
                part.env[id] = lane.onto(part.place.current, keep)


def _bytes_of(lane: Lane) -> int:
    match lane:
        case Each() | Rows():
            return lane.tensor.nbytes
        case Items():
            return sum(bytes_of(value) for value in lane.values)
        case _:
            return 0
