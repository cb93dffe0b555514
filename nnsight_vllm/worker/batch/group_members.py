"""A group's members, one by one where they differ: what a value is for each, who failed, whose time and memory are used up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.nodes import (
    Arg,
    List,
    Ref,
    Slice,
    Tuple,
)
from nnsight_vllm.plan.program import SAMPLES
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.interpreter import Interpreter
from nnsight_vllm.worker.lanes.lanes import (
    Each,
    Items,
    Lane,
    Rows,
    Shared,
)
from nnsight_vllm.worker.ops.operations import evaluate
from nnsight_vllm.worker.ops.usage import bytes_of, over_time


class Members:
    """What all parts of a group's run need of its members. `alone` runs what has to be run request by request."""

    def __init__(self, orders: Mapping[str, int], alone: Interpreter) -> None:
        self._orders = orders
        self._alone = alone
        self._limits = alone.limits
        self._began = 0.0  # since when the group's time isn't counted; 0: the clock doesn't run
        self._charged = 0.0  # seconds since then that single members were charged with

    # -- values -------------------------------------------------------------------------------------------------------

    def lane(self, group: Group, arg: Arg) -> Lane:
        """An argument's values for all members."""
        match arg:
            case Ref():
                return group.parameter(arg.id) if arg.id < 0 else group.env[arg.id]
            case List() | Tuple() | Slice():
                return Items([self.own(group, arg, i) for i in range(len(group))])
            case _:
                return Shared(evaluate(arg, {}))

    def own(self, group: Group, arg: Arg, i: int) -> Any:
        """An argument's value for one member."""
        return evaluate(arg, _Env(group, i))

    # -- failures -----------------------------------------------------------------------------------------------------

    def guard(self, group: Group, i: int, work: Callable[[], Any]) -> Any:
        """One member's own work; its failure is nobody else's."""
        if i in group.dead:
            return None
        try:
            return work()
        except Exception as error:
            self.blame(group, i, error)
            return None

    def blame(self, group: Group, i: int, error: BaseException) -> None:
        """A member failed; the others go on."""
        member = group.members[i]
        if i not in group.dead:
            group.dead.add(i)
            member.node = group.node
            member.fail(error, group.order >= self._orders[SAMPLES])

    def fail_all(self, group: Group, error: BaseException) -> None:
        for i, member in enumerate(group.members):
            if member.is_running:
                self.blame(group, i, error)

    # -- limits ------------------------------------------------------------------------------------------------------

    def start_clock(self, group: Group) -> float:
        """The group starts to run. Returns when its time for this step is up, on `perf_counter`."""
        self._began, self._charged = perf_counter(), 0.0
        return self._began + self._limits.seconds - group.spent.at(self._alone.step).seconds

    def stop_clock(self, group: Group) -> None:
        self.clock(group)
        self._began = 0.0

    def clock(self, group: Group) -> None:
        """Charge the members with the time that they used together, in equal parts."""
        if not self._began:
            return
        now = perf_counter()
        group.spent.at(self._alone.step).seconds += (now - self._began - self._charged) / len(group)
        self._began, self._charged = now, 0.0

    def check_time(self, group: Group) -> None:
        self.clock(group)
        for i in range(len(group)):
            self.guard(group, i, partial(self.charge, group, i, 0.0))

    def charge(self, group: Group, i: int, seconds: float) -> None:
        """Charge one member with time of its own. Raises where its time is up."""
        own = group.members[i].spent.at(self._alone.step)
        own.seconds += seconds
        self._charged += seconds
        if own.seconds + group.spent.seconds > self._limits.seconds:
            raise over_time(own.seconds + group.spent.seconds, self._limits)

    def made(self, group: Group, lane: Lane) -> None:
        """Something was made; if it's time to look what everybody holds, who holds too much fails."""
        match lane:
            case Each() | Rows():
                num_bytes = lane.tensor.nbytes
            case Items():
                num_bytes = sum(bytes_of(value) for value in lane.values)
            case _:
                num_bytes = 0
        holdings = self._alone.holdings
        if not holdings.made(num_bytes):
            return
        for i in sorted(range(len(group)), key=lambda i: -group.members[i].spent.held):
            held = group.members[i].spent.held
            if excess := holdings.excess(held):
                self.blame(group, i, InterventionError(excess))
                holdings.in_all -= held


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
