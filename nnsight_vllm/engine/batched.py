"""Runs the program of a group: each instruction once for all its requests.

An operation that the row algebra covers runs on everybody's rows at once; another runs request by request, on views of
the same memory, so the two kinds may follow each other in any order. Groups that part are put on `found`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.engine import algebra
from nnsight_vllm.engine.algebra import Uncovered
from nnsight_vllm.engine.changes import by_table, dtype_of, fitted, in_place, spread_value
from nnsight_vllm.engine.containers import printed
from nnsight_vllm.engine.group import Group, GroupIterations, GroupLoop
from nnsight_vllm.engine.interpreter import END, Interpreter, ModuleCalls
from nnsight_vllm.engine.lanes import (
    Each,
    Held,
    Items,
    Lane,
    Rows,
    Several,
    Shared,
    View,
    as_ints,
    constant_of,
    lane_of,
    resolved,
    stacked,
)
from nnsight_vllm.engine.operations import FACTORIES, evaluate
from nnsight_vllm.engine.places import fit, refuse_floats
from nnsight_vllm.engine.results import frozen_copy
from nnsight_vllm.engine.spending import bytes_of, over_time
from nnsight_vllm.errors import InterventionError, OutOfOrderError
from nnsight_vllm.graph.nodes import (
    Arg,
    Call,
    Const,
    Dots,
    Export,
    Import,
    List,
    Log,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Tuple,
    Write,
)
from nnsight_vllm.graph.ops import MAY_CHANGE, RANDOM, is_inplace
from nnsight_vllm.kernels.dispatch import choose
from nnsight_vllm.plan.edits import ADDS
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
from nnsight_vllm.plan.rows import Kind, rule_of

_FULL = Slice()


@dataclass
class Counts:
    """Operations run in groups, a request a count: at once, and one by one, those by the operation's name too."""

    batched: int = 0
    one_by_one: int = 0
    prevented: Counter[str] = field(default_factory=Counter)


class GroupInterpreter:
    """`alone` runs what has to be run request by request."""

    def __init__(self, orders: Mapping[str, int], calls: ModuleCalls, alone: Interpreter) -> None:
        self._orders = orders
        self._calls = calls
        self._alone = alone
        self.has_kernels = (
            choose(alone.device) == "triton"
        )  # of the frequent edits, else torch's own operations are faster
        self.counts = Counts()
        self.found: list[Group] = []  # parts that are still to run
        self.waiting: list[Group] = []  # parts that ran
        self.current: Group | None = None
        self._limits = alone.limits
        self._began = 0.0  # since when the group's time isn't counted; 0: the clock doesn't run
        self._charged = 0.0  # seconds since then that single members were charged with
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
        self._nodes: dict[type, Callable[[Group, Any], Lane | None]] = {
            Read: self.read,
            Write: self.write,
            Op: self.op,
            Const: self.const,
            Call: self.call,
            Save: self.save,
            Log: self.log,
            Export: self.export,
            Import: self.import_,
        }

    def run(self, group: Group) -> list[Group]:
        """Go on until the program waits or is over. Returns the groups that are left; they may be several."""
        self.found, self.waiting = [group], []
        while self.found:
            self.current = self.found.pop()
            try:
                self._run(self.current)
            except Exception as error:  # nobody's in particular: a defect of ours, or of what they all do
                self._fail_all(self.current, error)
            self._settle(self.current)
        return self.waiting

    @property
    def running(self) -> list[Group]:
        """Who takes part in the run that is under way."""
        return [part for part in [self.current, *self.found, *self.waiting] if part is not None and not part.is_over]

    def fail(self, error: BaseException) -> None:
        """Fail whoever took part in the run that was interrupted."""
        for part in [part for part in [self.current, *self.found, *self.waiting] if part is not None]:
            self._fail_all(part, error)
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

    def blame(self, group: Group, i: int, error: BaseException) -> None:
        """A member failed; the others go on."""
        member = group.members[i]
        if i not in group.dead:
            group.dead.add(i)
            member.node = group.node
            member.fail(error, group.order >= self._orders[SAMPLES])

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
        self._began, self._charged = perf_counter(), 0.0
        until = self._began + most - group.spent.at(self._alone.step).seconds
        while not group.is_over and len(group.dead) < len(group.members):
            instruction = code[group.pc]
            group.pc += 1
            if not self._methods[type(instruction)](group, instruction):
                group.pc -= 1
                break
            if perf_counter() > until:
                self._check_time(group)
                until = perf_counter() + most / 10
        self._clock(group)
        self._began = 0.0

    # -- limits ------------------------------------------------------------------------------------------------------

    def _clock(self, group: Group) -> None:
        """Charge the members with the time that they used together, in equal parts."""
        if not self._began:
            return
        now = perf_counter()
        group.spent.at(self._alone.step).seconds += (now - self._began - self._charged) / len(group)
        self._began, self._charged = now, 0.0

    def _check_time(self, group: Group) -> None:
        self._clock(group)
        for i in range(len(group)):
            self._guard(group, i, partial(self._charge, group, i, 0.0))

    def _charge(self, group: Group, i: int, seconds: float) -> None:
        """Charge one member with time of its own. Raises where its time is up."""
        own = group.members[i].spent.at(self._alone.step)
        own.seconds += seconds
        self._charged += seconds
        if own.seconds + group.spent.seconds > self._limits.seconds:
            raise over_time(own.seconds + group.spent.seconds, self._limits)

    def _made(self, group: Group, lane: Lane) -> None:
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
            self._fail_all(group, OutOfOrderError(error))
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
        self._clock(group)
        keep = [i for i in keep if i not in group.dead]
        if not keep:
            return None
        part = group.select(keep)
        if group.place is not None:
            part.place = group.place.select(keep, lambda i, error: self.blame(part, i, error))
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
        lane = resolved(self.lane(group, branch.test))
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
        return [self._guard(group, i, lambda i=i: bool(lane.of(i))) for i in range(len(group))]  # type: ignore[misc]

    def jump(self, group: Group, jump: Jump) -> bool:
        group.pc = jump.target
        return True

    def move(self, group: Group, move: Move) -> bool:
        lanes = [self.lane(group, value) for value in move.values]
        group.env.update(zip(move.ids, lanes, strict=True))
        _free(group, move.free)
        return True

    def loop_begin(self, group: Group, begin: LoopBegin) -> bool:
        group.node = begin.node
        over = self.lane(group, begin.over)
        if isinstance(over, Shared) and not isinstance(over.value, Tensor):
            columns: list[Lane] = [Shared(item) for item in self._alone.items_of(over.value)]
        else:
            lists = [
                self._guard(group, i, lambda i=i: self._alone.items_of(over.of(i))) or []  # type: ignore[misc]
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
        lane = Shared(END) if bound is None else self.lane(group, bound)
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

    # -- nodes -------------------------------------------------------------------------------------------------------

    def run_node(self, group: Group, run: Run) -> bool:
        node = run.node
        group.node = node.id
        result = self._nodes[type(node)](group, node)
        if result is not None:
            group.env[node.id] = result
            self._made(group, result)
        _free(group, run.free)
        return True

    def read(self, group: Group, node: Read) -> Lane:
        assert group.place is not None
        return View(group.place.current)

    def const(self, group: Group, node: Const) -> Lane:
        lane = group.parameter(int(node.digest))
        if node.id not in group.program.copied:
            return lane
        return Items([lane.of(i).clone() for i in range(len(group))])

    def write(self, group: Group, node: Write) -> None:
        place = group.place
        assert place is not None
        work = place.current.tensor
        lane = algebra.numbers_of(resolved(self.lane(group, node.value)), work.dtype)
        new = torch.empty_like(work)
        try:
            if place.is_integer() or not isinstance(lane, Rows | Each | Shared):
                raise Uncovered
            new.copy_(fitted(place.name, lane, View(place.current).read(), work))
            self._count(group, "write", True)
        except Exception:
            self._count(group, "write", False)
            for i in range(len(group)):
                rows = place.ragged.slice_of(i)
                new[rows] = work[rows]
                self._guard(group, i, lambda i=i, rows=rows: new[rows].copy_(fit(place.name, lane.of(i), work[rows])))  # type: ignore[misc]
        place.assign(new)

    def call(self, group: Group, node: Call) -> Lane:
        lanes = [self.lane(group, arg) for arg in node.args]
        lane = resolved(lanes[0]) if len(lanes) == 1 else None
        if isinstance(lane, Rows | Each) and lane.tensor.ndim > 1:
            try:
                result = self._calls.call(node.module, [lane.tensor])
                self._count(group, "call", True)
                return Rows(result, lane.ragged) if isinstance(lane, Rows) else Each(result)
            except Exception:  # some request's value: find out whose
                self._count(group, f"call {node.module}", False)
        return Items(
            [
                self._guard(group, i, lambda i=i: self._calls.call(node.module, [lane.of(i) for lane in lanes]))  # type: ignore[misc]
                for i in range(len(group))
            ]
        )

    def save(self, group: Group, node: Save) -> None:
        if isinstance(node.value, Ref) and node.value.id in group.program.streams:
            for member in group.members:
                member.outbox.start(node.name)
            return
        self._send(group, node.name, self.lane(group, node.value), append=False)

    def export(self, group: Group, node: Export) -> None:
        lane = self.lane(group, node.value)
        for i, member in enumerate(group.members):
            self._guard(group, i, lambda i=i, member=member: self._alone.keep(member, node, lane.of(i)))  # type: ignore[misc]

    def import_(self, group: Group, node: Import) -> Lane:
        values = [
            self._guard(group, i, partial(self._alone.draw, member, node)) for i, member in enumerate(group.members)
        ]
        if node.id in group.program.copied:
            return Items([frozen_copy(value) for value in values])
        return constant_of(values)

    def log(self, group: Group, node: Log) -> None:
        lanes = [self.lane(group, arg) for arg in node.args]
        for i, member in enumerate(group.members):
            self._guard(group, i, lambda i=i, to=member.outbox: to.log(" ".join(printed(lane.of(i)) for lane in lanes)))  # type: ignore[misc]

    def _send(self, group: Group, name: str, lane: Lane, append: bool) -> None:
        lane = stacked(lane.values) or lane if isinstance(lane, Items) else lane
        is_one = not group.dead and isinstance(lane, Rows | Each | View | Several | Shared)
        if is_one and group.sheet.take(name, lane, append):
            self._count(group, "save", True)
            if excess := self._limits.excess(0, 0, group.sheet.num_bytes):
                self._fail_all(group, InterventionError(excess))
            return
        self._count(group, "save", False)
        group.sheet.spill([member.outbox for member in group.members], name)
        group.sheet.by_request.add(name)
        for i, member in enumerate(group.members):
            send = member.outbox.append if append else member.outbox.save
            self._guard(group, i, lambda i=i, send=send: send(name, lane.of(i)))  # type: ignore[misc]

    def op(self, group: Group, node: Op) -> Lane | None:
        if node.name == "py.append":
            target = node.args[0]
            stream = group.program.streams.get(target.id) if isinstance(target, Ref) else None
            if stream is not None:
                self._send(group, stream, self.lane(group, node.args[1]), append=True)
                return None
        try:
            if node.name in RANDOM or node.name in FACTORIES or node.name in MAY_CHANGE or "out" in node.kwargs:
                raise Uncovered
            result = self._change(group, node) if is_inplace(node.name) else self._compute(group, node)
            self._count(group, node.name, True)
            return result
        except Uncovered:
            self._count(group, node.name, False)
        except Exception as error:  # some request's value: each by itself, and those that fail say so
            self._count(group, f"{node.name}: {type(error).__name__}", False)
        return self._one_by_one(group, node)

    # -- operations ---------------------------------------------------------------------------------------------------

    def _compute(self, group: Group, node: Op) -> Lane:
        """A new value, or a part of one."""
        rule = rule_of(node.name)
        if rule.kind is Kind.INDEX:
            return self._index(group, node)
        if node.name == "py.attr":
            return self._attribute(group, node)
        args = [self.lane(group, arg) for arg in node.args]
        kwargs = {key: self.lane(group, value) for key, value in node.kwargs.items()}
        operation = self._alone.guard.operation("torch.matmul" if rule.kind is Kind.MATMUL else node.name)
        if all(isinstance(lane, Shared) for lane in [*args, *kwargs.values()]):
            if rule.kind is Kind.OPAQUE or group.program.changes_values:
                raise Uncovered
            return Shared(
                operation(*[lane.of(0) for lane in args], **{key: lane.of(0) for key, lane in kwargs.items()})
            )
        if node.name in {"tensor.to", "tensor.contiguous", "tensor.detach"} and group.program.changes_values:
            raise Uncovered  # it may give the value itself
        if rule.kind is Kind.POINTWISE:
            args = _spread_shared(args, len(group))
        return algebra.compute(rule, node.name, operation, args, kwargs)

    def _index(self, group: Group, node: Op) -> Lane:
        target = self.lane(group, node.args[0])
        if node.args[1] == _FULL and isinstance(target, View):
            return target
        is_kept = group.program.changes_values
        if isinstance(target, Items) and not is_kept:
            target = resolved(target)
        return algebra.part(target, self._key(group, node.args[1]), is_kept)

    def _attribute(self, group: Group, node: Op) -> Lane:
        target, name = self.lane(group, node.args[0]), node.args[1]
        if not isinstance(target, Several):
            raise Uncovered
        names = list(getattr(target.make, "__match_args__", ()))
        if name not in names:
            raise Uncovered
        return target.lanes[names.index(str(name))]

    def _key(self, group: Group, arg: Arg) -> list[Any]:
        elements = arg.items if isinstance(arg, Tuple) else [arg]
        return [self._element(group, element) for element in elements]

    def _element(self, group: Group, arg: Arg) -> Any:
        match arg:
            case None:
                return None
            case Dots():
                return Ellipsis
            case Slice():
                ends = [None if end is None else self.lane(group, end) for end in (arg.start, arg.stop, arg.step)]
                return slice(*ends)
            case List():
                raise Uncovered
            case _:
                return self.lane(group, arg)

    def _change(self, group: Group, node: Op) -> Lane:
        """In place: on the site where the program stands, or on a value of the group's own."""
        is_item = node.name == "py.setitem"  # its key is looked at by itself
        args = [Shared(None) if is_item and i == 1 else self.lane(group, arg) for i, arg in enumerate(node.args)]
        target = args[0]
        place = group.place
        is_site = place is not None and isinstance(target, View) and target.memory is place.current
        if node.writes is not None and (not is_site or place is None or place.name != node.writes):
            raise Uncovered
        if is_site:
            assert isinstance(target, View) and place is not None
            return self._change_site(group, node, target, args)
        if isinstance(target, View) and not isinstance(target.memory, Held):
            raise Uncovered
        if not isinstance(target, Rows | Each | View):
            raise Uncovered
        if place is not None and isinstance(target, Rows | Each) and place.aliases(target.tensor):
            raise Uncovered
        self._apply(group, node, target, args)
        storage = target.memory.tensor if isinstance(target, View) else target.tensor
        for member in group.members:
            member.outbox.changed(storage)
        return target

    def _change_site(self, group: Group, node: Op, target: View, args: list[Lane]) -> Lane:
        place = group.place
        assert place is not None
        if place.is_integer():
            for lane in args[2:] if node.name == "py.setitem" else args[1:]:
                if isinstance(lane, Items):
                    raise Uncovered
                refuse_floats(place.name, [lane.of(0)])
        sign = ADDS.get(node.name)
        if sign is not None and len(args) == 2 and not node.kwargs and (part := place.addend()) is not None:
            value = args[1]
            is_plain = target.pick is None and not target.columns and target.own is None
            is_plain = is_plain and not self.has_kernels
            if is_plain and place.ragged.is_single and isinstance(value, Each) and value.tensor.shape == part.shape:
                part.add_(value.tensor, alpha=sign)
                place.put_addend(part)
                return target
            view = View(Held(part, place.ragged), target.pick, target.columns, target.own)
            operation = torch.Tensor.add_ if sign > 0 else torch.Tensor.sub_
            if not by_table(group, node, view, self.has_kernels):
                in_place("tensor.add_" if sign > 0 else "tensor.sub_", operation, view, args[1:], {})
            place.put_addend(part)
        else:
            place.change(partial(self._apply, group, node, target, args))
        return target

    def _apply(self, group: Group, node: Op, target: Lane, args: list[Lane]) -> None:
        if by_table(group, node, target, self.has_kernels):
            return
        kwargs = {key: self.lane(group, value) for key, value in node.kwargs.items()}
        if node.name == "py.setitem":
            self._set_part(target, self._key(group, node.args[1]), args[2])
        elif rule_of(node.name).kind is Kind.POINTWISE:
            in_place(node.name, self._alone.guard.operation(node.name), target, args[1:], kwargs)
        else:
            raise Uncovered

    def _set_part(self, target: Lane, key: list[Any], value: Lane) -> None:
        rest = key[1:]
        is_scattered = bool(rest) and algebra.is_full(key[0]) and algebra.has_tensors(rest)
        if is_scattered and isinstance(target, View | Rows):
            view = target if isinstance(target, View) else View(Held(target.tensor, target.ragged))
            if view.pick is not None or view.columns:
                raise Uncovered
            tensor, ragged = view.memory.tensor, view.memory.ragged
            value = algebra.numbers_of(value, tensor.dtype)
            at = algebra.column_index(rest, ragged)
            shape = tensor[at].shape
            tensor[at] = spread_value(value, ragged, len(shape), tensor.dtype)
            return
        if isinstance(target, View | Rows | Each):
            value = algebra.numbers_of(value, dtype_of(target))
        part = algebra.part(target, key, True)
        in_place("tensor.copy_", torch.Tensor.copy_, part, [value], {})

    def _one_by_one(self, group: Group, node: Op) -> Lane | None:
        """Every request by itself, on its own part of the same memory."""
        results: list[Any] = []
        last = perf_counter()
        for i, member in enumerate(group.members):
            member.place = None if group.place is None else group.place.share(i)
            results.append(self._guard(group, i, partial(self._alone_op, group, node, i)))
            member.place = None
            now = perf_counter()
            self._guard(group, i, partial(self._charge, group, i, now - last))
            last = now
        return lane_of(results)

    def _alone_op(self, group: Group, node: Op, i: int) -> Any:
        args = [self._own(group, arg, i) for arg in node.args]
        kwargs = {key: self._own(group, value, i) for key, value in node.kwargs.items()}
        return self._alone.perform(group.members[i], node, args, kwargs)

    # -- values -------------------------------------------------------------------------------------------------------

    def lane(self, group: Group, arg: Arg) -> Lane:
        """An argument's values for all members."""
        match arg:
            case Ref():
                return group.parameter(arg.id) if arg.id < 0 else group.env[arg.id]
            case List() | Tuple() | Slice():
                return Items([self._own(group, arg, i) for i in range(len(group))])
            case _:
                return Shared(evaluate(arg, {}))

    def _own(self, group: Group, arg: Arg, i: int) -> Any:
        """An argument's value for one member."""
        return evaluate(arg, _Env(group, i))

    def _guard(self, group: Group, i: int, work: Callable[[], Any]) -> Any:
        """One member's own work; its failure is nobody else's."""
        if i in group.dead:
            return None
        try:
            return work()
        except Exception as error:
            self.blame(group, i, error)
            return None

    def _fail_all(self, group: Group, error: BaseException) -> None:
        for i, member in enumerate(group.members):
            if member.is_running:
                self.blame(group, i, error)

    def _count(self, group: Group, name: str, is_batched: bool) -> None:
        if is_batched:
            self.counts.batched += len(group)
        else:
            self.counts.one_by_one += len(group)
            self.counts.prevented[name] += len(group)


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


def _spread_shared(args: list[Lane], num: int) -> list[Lane]:
    """A tensor that all share beside numbers of each one's own: seen as a tensor each, without a copy."""
    if not any(isinstance(lane, Items) for lane in args) or any(isinstance(lane, Each | Rows | View) for lane in args):
        return args
    return [
        Each(lane.value.expand(num, *lane.value.shape))
        if isinstance(lane, Shared) and isinstance(lane.value, Tensor)
        else lane
        for lane in args
    ]


def _over(group: Group) -> Group:
    group.is_over = True
    return group


def _alive(group: Group) -> list[Any]:
    return [member for i, member in enumerate(group.members) if i not in group.dead]


def _free(group: Group, ids: tuple[int, ...]) -> None:
    for id in ids:
        group.env.pop(id, None)
