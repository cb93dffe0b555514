"""A group's members, one by one where they differ: what a value is for each, who failed, and whose time is up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nnsight_vllm.graph.nodes import Arg, List, Ref, Slice, Tuple
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.lanes.lanes import Items, Lane, Shared
from nnsight_vllm.worker.ops.operations import evaluate
from nnsight_vllm.worker.ops.usage import Clock, over_time


class Members:
    """What all parts of a group's run need of its members."""

    def __init__(self, clock: Clock, limits: Limits) -> None:
        self._clock = clock
        self._limits = limits

    # -- values -------------------------------------------------------------------------------------------------------

    def lane(self, group: Group, arg: Arg) -> Lane:
        """An argument's values for all members."""
        match arg:
            case Ref():
                return group.parameter(arg.id) if arg.id < 0 else group.env[arg.id]
            case List() | Tuple() | Slice():
                return Items([self.own(group, arg, i) for i in range(group.size)])
            case _:
                return Shared(evaluate(arg, {}))

    def own(self, group: Group, arg: Arg, i: int) -> Any:
        """An argument's value for one member."""
        return evaluate(arg, _Env(group, i))

    # -- failures -----------------------------------------------------------------------------------------------------

    def each(self, group: Group, work: Callable[[int], Any]) -> list[Any]:
        """Something for each member by its number; None for those that failed."""
        return [self.guard(group, i, partial(work, i)) for i in range(group.size)]

    def guard(self, group: Group, i: int, work: Callable[[], Any]) -> Any:
        """One member's own work; its failure is nobody else's."""
        if i in group.dead:
            return None
        try:
            return work()
        except Exception as error:
            group.blame(i, error)
            return None

    # -- time ---------------------------------------------------------------------------------------------------------

    def lap(self, group: Group) -> None:
        """Charge the members with the time that they used together."""
        self._clock.lap(group.spent, group.size)

    def charge(self, group: Group, i: int, seconds: float) -> None:
        """Charge one member with time of its own. Raises where its time is up."""
        used = self._clock.charge(group.members[i].spent, seconds) + group.spent.seconds
        if used > self._limits.seconds:
            raise over_time(used, self._limits)


class _Env(dict[int, Any]):
    """One member's values, looked up as they are asked for."""

    def __init__(self, group: Group, i: int) -> None:
        super().__init__()
        self._group = group
        self._i = i

    def __contains__(self, id: object) -> bool:
        return isinstance(id, int) and (id < 0 or id in self._group.env)

    def __getitem__(self, id: int) -> Any:
        lane = self._group.parameter(id) if id < 0 else self._group.env[id]
        return lane.of(self._i)
