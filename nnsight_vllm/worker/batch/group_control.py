"""Runs the program of a group: each instruction once for all its requests. Groups that part are put on `found`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from nnsight_vllm.errors import InterventionError, OutOfOrderError
from nnsight_vllm.graph.nodes import (
    Arg,
)
from nnsight_vllm.plan.instructions import (
    At,
    Branch,
    End,
    Free,
    Halt,
    IterBegin,
    IterNext,
    Jump,
    LoopBegin,
    LoopNext,
    Move,
    Run,
)
from nnsight_vllm.plan.program import SAMPLES
from nnsight_vllm.worker.batch.group import Group, GroupIterations, GroupLoop
from nnsight_vllm.worker.batch.group_members import Members
from nnsight_vllm.worker.batch.group_nodes import GroupNodes
from nnsight_vllm.worker.batch.interpreter import END, Interpreter, ModuleCalls
from nnsight_vllm.worker.lanes.lanes import (
    Each,
    Items,
    Lane,
    Shared,
    View,
    as_ints,
    lane_of,
    resolved,
)


class GroupInterpreter:
    """`alone` runs what has to be run request by request."""

    def __init__(self, orders: Mapping[str, int], calls: ModuleCalls, alone: Interpreter) -> None:
        self._orders = orders
        self._alone = alone
        self._limits = alone.limits
        self.members = Members(orders, alone)
        self.nodes = GroupNodes(self.members, calls, alone)
        self.found: list[Group] = []  # parts that are still to run
        self.waiting: list[Group] = []  # parts that ran
        self.current: Group | None = None
        self._methods: dict[type, Callable[[Group, Any], bool]] = {
            At: self.at,
            Run: self.run_node,
            Halt: self.halt,
            Branch: self.branch,
            Jump: self.jump,
            Move: self.move,
            LoopBegin: self.loop_begin,
            LoopNext: self.loop_next,
            IterBegin: self.iter_begin,
            IterNext: self.iter_next,
            Free: self.free,
            End: self.end,
        }

    def run(self, group: Group) -> list[Group]:
        """Go on until the program waits or is over. Returns the groups that are left; they may be several."""
        self.found, self.waiting = [group], []
        while self.found:
            self.current = self.found.pop()
            try:
                self._run(self.current)
            except Exception as error:  # nobody's in particular: a defect of ours, or of what they all do
                self.members.fail_all(self.current, error)
            self._settle(self.current)
        return self.waiting

    @property
    def running(self) -> list[Group]:
        """Who takes part in the run that is under way."""
        return [part for part in [self.current, *self.found, *self.waiting] if part is not None and not part.is_over]

    def fail(self, error: BaseException) -> None:
        """Fail whoever took part in the run that was interrupted."""
        for part in [part for part in [self.current, *self.found, *self.waiting] if part is not None]:
            self.members.fail_all(part, error)
            part.settle()

    def _settle(self, part: Group) -> None:
        """A group that stopped running: those alive wait, or are done."""
        if part.dead:
            keep = [i for i in range(len(part)) if i not in part.dead]
            part = part.select(keep) if keep and not part.is_over else _over(part)
        if part.is_waiting:
            self.waiting.append(part)
        else:
            part.spill()

    def _run(self, group: Group) -> None:
        instruction = group.program.code[group.pc]
        if type(instruction) is not At:
            self._run_clocked(group)
        else:  # behind a shortcut it waits at once: nothing to take the time of
            group.pc += 1
            if self.at(group, instruction):
                self._run_clocked(group)
            else:
                group.pc -= 1
        if group.place is not None:
            self._keep_views(group)

    def _run_clocked(self, group: Group) -> None:
        code, most = group.program.code, self._limits.seconds
        until = self.members.start_clock(group)
        while not group.is_over and len(group.dead) < len(group.members):
            instruction = code[group.pc]
            group.pc += 1
            if not self._methods[type(instruction)](group, instruction):
                group.pc -= 1
                break
            if perf_counter() > until:
                self.members.check_time(group)
                until = perf_counter() + most / 10
        self.members.stop_clock(group)

    def _keep_views(self, group: Group) -> None:
        """What still looks at the site gets the values of now: the engine goes on with its memory."""
        assert group.place is not None
        if group.place.current.is_read:
            return
        if any(isinstance(lane, View) and lane.memory is group.place.current for lane in group.env.values()):
            assert group.place.current.tensor is not None

    # -- control -----------------------------------------------------------------------------------------------------

    def at(self, group: Group, at: At) -> bool:
        if at.iteration is None and group.is_in_step():
            return (group.place is not None and group.place.name == at.site) or self._wait(group, at.site, 0)
        if at.site is not None and group.place is not None and group.place.name == at.site:
            target = self._target(group, at)
            if bool((target == group.iteration).all()):
                return True
        ahead = self._target(group, at) - group.iteration
        if not self._part(group, ahead):
            return True  # the parts come back here
        if at.iteration is None and int(ahead[0]) == 0:
            group.mark_in_step()
        return self._wait(group, at.site, int(ahead[0]))

    def _wait(self, group: Group, site: str | None, lag: int) -> bool:
        group.site, group.lag = site, lag
        if site is None:
            return lag <= 0
        if (lag, self._orders[site]) <= (0, group.order):
            error = f"{site} has passed: the requests are at iteration {int(group.iteration[0])}"
            self.members.fail_all(group, OutOfOrderError(error))
        return False

    def _target(self, group: Group, at: At) -> Any:
        if at.iteration is not None:
            return np.full(len(group), at.iteration)
        for frame in reversed(group.frames):
            if isinstance(frame, GroupIterations):
                return frame.current
        raise InterventionError("a site without an iteration outside of an iterations block")

    def _part(self, group: Group, values: Any) -> bool:
        """Take the group apart by a value a member. Returns whether all are the same; the parts repeat the instruction."""
        if bool((values == values[0]).all()):
            return True
        group.pc -= 1
        for value in np.unique(values):
            self._split_off(group, [int(i) for i in np.flatnonzero(values == value)])
        _over(group)
        return False

    def _split_off(self, group: Group, keep: list[int]) -> Group | None:
        self.members.clock(group)
        keep = [i for i in keep if i not in group.dead]
        if not keep:
            return None
        part = group.select(keep)
        if group.place is not None:
            part.place = group.place.select(keep, lambda i, error: self.members.blame(part, i, error))
            views = {id: lane for id, lane in group.env.items() if isinstance(lane, View)}
            for id, view in views.items():
                if view.memory is group.place.current:
                    part.env[id] = view.onto(part.place.current, keep)
        self.found.append(part)
        return part

    def halt(self, group: Group, halt: Halt) -> bool:
        keep_token = group.order >= self._orders[SAMPLES]
        for member in _alive(group):
            member.stop(keep_token)
        _over(group)
        return True

    def branch(self, group: Group, branch: Branch) -> bool:
        group.node = branch.node
        lane = resolved(self.members.lane(group, branch.test))
        if isinstance(lane, Shared):
            if not lane.value:
                group.pc = branch.target
            return True
        holds = self._truth(group, lane)
        if not group.dead and (all(holds) or not any(holds)):
            group.pc = group.pc if all(holds) else branch.target
            return True
        for truth in (True, False):
            part = self._split_off(group, [i for i, held in enumerate(holds) if held is truth])
            if part is not None and not truth:
                part.pc = branch.target
        _over(group)
        return True

    def _truth(self, group: Group, lane: Lane) -> list[bool | None]:
        if isinstance(lane, Each) and lane.tensor[0].numel() == 1:
            return [bool(value) for value in lane.tensor.flatten().tolist()]
        return [self.members.guard(group, i, lambda i=i: bool(lane.of(i))) for i in range(len(group))]  # type: ignore[misc]

    def jump(self, group: Group, jump: Jump) -> bool:
        group.pc = jump.target
        return True

    def move(self, group: Group, move: Move) -> bool:
        lanes = [self.members.lane(group, value) for value in move.values]
        group.env.update(zip(move.ids, lanes, strict=True))
        _free(group, move.free)
        return True

    def loop_begin(self, group: Group, begin: LoopBegin) -> bool:
        group.node = begin.node
        over = self.members.lane(group, begin.over)
        if isinstance(over, Shared) and not isinstance(over.value, Tensor):
            columns: list[Lane] = [Shared(item) for item in self._alone.items_of(over.value)]
        else:
            lists = [
                self.members.guard(group, i, lambda i=i: self._alone.items_of(over.of(i))) or []  # type: ignore[misc]
                for i in range(len(group))
            ]
            lengths = as_ints([len(items) for items in lists])
            if not self._part(group, lengths):
                return True
            columns = [lane_of([items[k] for items in lists]) for k in range(int(lengths[0]))]
        group.frames.append(GroupLoop(columns))
        return True

    def loop_next(self, group: Group, step: LoopNext) -> bool:
        frame = group.frames[-1]
        assert isinstance(frame, GroupLoop)
        if frame.position < len(frame.items):
            group.spent.at(self._alone.step).trip(self._limits)
            group.env[step.item] = frame.items[frame.position]
            frame.position += 1
        else:
            group.frames.pop()
            group.pc = step.exit
        return True

    def iter_begin(self, group: Group, begin: IterBegin) -> bool:
        start, stop, step = (self._bounds(group, bound) for bound in (begin.start, begin.stop, begin.step))
        group.frames.append(GroupIterations(start, stop, step, np.full(len(group), -1)))
        return True

    def _bounds(self, group: Group, bound: Arg) -> Any:
        lane = Shared(END) if bound is None else self.members.lane(group, bound)
        return as_ints([lane.of(i) for i in range(len(group))])

    def iter_next(self, group: Group, step: IterNext) -> bool:
        frame = group.frames[-1]
        assert isinstance(frame, GroupIterations)
        ends = frame.upcoming >= frame.stop
        if not self._part(group, ends):
            return True
        if bool(ends[0]):
            group.frames.pop()
            group.pc = step.exit
            return True
        group.forget_step()
        frame.current = frame.upcoming
        frame.upcoming = frame.upcoming + frame.step
        numbers = frame.current.tolist()
        group.env[step.index] = Shared(numbers[0]) if bool((frame.current == numbers[0]).all()) else Items(numbers)
        return True

    def free(self, group: Group, free: Free) -> bool:
        _free(group, free.ids)
        return True

    def end(self, group: Group, end: End) -> bool:
        for member in _alive(group):
            member.end()
        _over(group)
        return True

    def run_node(self, group: Group, run: Run) -> bool:
        node = run.node
        group.node = node.id
        result = self.nodes.run(group, node)
        if result is not None:
            group.env[node.id] = result
            self.members.made(group, result)
        _free(group, run.free)
        return True


def _over(group: Group) -> Group:
    group.is_over = True
    return group


def _alive(group: Group) -> list[Any]:
    return [member for i, member in enumerate(group.members) if i not in group.dead]


def _free(group: Group, ids: tuple[int, ...]) -> None:
    for id in ids:
        group.env.pop(id, None)
