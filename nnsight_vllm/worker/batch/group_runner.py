"""Runs groups and the parts that they come apart into, until all of them wait or are over."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.control import Control
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.group_members import Members
from nnsight_vllm.worker.batch.group_nodes import GroupNodes
from nnsight_vllm.worker.batch.group_values import GroupValues
from nnsight_vllm.worker.batch.request_nodes import RequestNodes
from nnsight_vllm.worker.lanes.lanes import View
from nnsight_vllm.worker.ops.usage import Clock, Holdings


class GroupRunner:
    """`alone` runs what has to be run request by request."""

    def __init__(
        self, orders: Mapping[str, int], alone: RequestNodes, clock: Clock, holdings: Holdings, limits: Limits
    ) -> None:
        members = Members(clock, limits)
        self.nodes = GroupNodes(members, alone)
        self._values = GroupValues(members, self.nodes, holdings, limits)
        self._control = Control(orders, self._values, clock, limits)
        self._current: Group | None = None
        self._waiting: list[Group] = []  # parts that ran

    def run(self, group: Group, arrive: Callable[[], None]) -> list[Group]:
        """Go on until the program waits or is over. Returns the groups that are left; they may be several."""
        self._current, self._values.found, self._waiting = group, [], []
        arrive()
        self._run(group)
        while self._values.found:
            self._current = self._values.found.pop()
            self._run(self._current)
        return self._waiting

    def _run(self, part: Group) -> None:
        try:
            self._control.run(part)
            if part.place is not None:
                _keep_views(part)
        except Exception as error:  # nobody's in particular: a defect of ours, or of what they all do
            part.fail(error)
        self._settle(part)

    @property
    def running(self) -> list[Group]:
        """Who takes part in the run that is under way."""
        parts = [*self._values.found, *self._waiting] + ([] if self._current is None else [self._current])
        return [part for part in parts if not part.is_over]

    def fail(self, error: BaseException) -> None:
        """Fail whoever took part in the run that was interrupted."""
        for part in self.running:
            part.fail(error)
            part.settle()

    def _settle(self, part: Group) -> None:
        """A group that stopped running: those alive wait, or are done."""
        if part.dead and not part.is_over:
            part = part.select([i for i in range(part.size) if i not in part.dead])
        if part.is_over:
            part.spill()
        else:
            self._waiting.append(part)


def _keep_views(group: Group) -> None:
    """What still looks at the site gets the values of now: the engine goes on with its memory."""
    assert group.place is not None
    if group.place.current.is_read:
        return
    if any(isinstance(lane, View) and lane.memory is group.place.current for lane in group.env.values()):
        assert group.place.current.tensor is not None
