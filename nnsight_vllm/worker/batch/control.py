"""Runs programs, instruction by instruction, until they wait or are over: the same for a request alone and for a group.

One method an instruction kind; it returns True where the program has to wait. Where a value has to be looked at, `ValueStrategy` does
that: a request has plain ones, a group lanes. The members of a group may part there; then their parts repeat the instruction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Generic, TypeVar

from nnsight_vllm.errors import OutOfOrderError
from nnsight_vllm.graph.nodes import Arg, Export, Log, Save, Write
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
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.cursor import Cursor, IterationsFrame, LoopFrame
from nnsight_vllm.worker.ops.usage import Clock

C = TypeVar("C", bound=Cursor)
_WITHOUT_VALUE = frozenset([Write, Save, Log, Export])


class ValueStrategy(ABC, Generic[C]):
    """What the control loop asks of values. An answer of None: the members parted.

    `nodes`: what runs a node and returns its value, by the node's kind.
    """

    nodes: Mapping[type, Callable[[C, Any], Any]]

    @abstractmethod
    def lag(self, cursor: C, at: At) -> int | None:
        """How many iterations from now the instruction waits for."""

    @abstractmethod
    def truth(self, cursor: C, test: Arg) -> bool | None: ...

    @abstractmethod
    def items(self, cursor: C, over: Arg) -> list[Any] | None:
        """What a loop goes over."""

    @abstractmethod
    def bound(self, cursor: C, bound: Arg) -> Any:
        """A number of an `IterationsFrame`."""

    @abstractmethod
    def goes_on(self, cursor: C, frame: IterationsFrame) -> bool | None:
        """Whether the block has another iteration."""

    @abstractmethod
    def index(self, numbers: Any) -> Any:
        """A number of an `IterationsFrame` as a value."""

    @abstractmethod
    def value(self, cursor: C, arg: Arg) -> Any: ...

    @abstractmethod
    def made(self, cursor: C, value: Any) -> None:
        """A node made a value: see whether somebody holds too much now."""

    @abstractmethod
    def check_time(self, cursor: C) -> float:
        """The time may be up: fail whose it is. Returns when to look again, on `perf_counter`."""


class Control(Generic[C]):
    """`orders`: site name -> its place in the model's firing order. `num_run`: nodes that were run."""

    def __init__(self, orders: Mapping[str, int], values: ValueStrategy[C], clock: Clock, limits: Limits) -> None:
        self._orders = orders
        self._values = values
        self._nodes = values.nodes
        self._clock = clock
        self._limits = limits
        self.num_run = 0
        self._methods: dict[type, Callable[[C, Any], bool | None]] = {
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

    def run(self, cursor: C) -> None:
        """Go on until the program waits or is over. What it raises fails whoever runs here."""
        first = cursor.program.code[cursor.pc]
        if type(first) is At:  # often it waits at once: nothing to take the time of
            cursor.pc += 1
            if self.at(cursor, first):
                return
        until = self._clock.start(cursor.spent)
        try:
            self._go(cursor, until)
        finally:
            self._clock.stop(cursor.spent, cursor.size)

    def _go(self, cursor: C, until: float) -> None:
        code = cursor.program.code
        while not cursor.is_over:
            instruction = code[cursor.pc]
            cursor.pc += 1
            if self._methods[type(instruction)](cursor, instruction):
                return
            if perf_counter() > until and not cursor.is_over:
                until = self._values.check_time(cursor)

    def at(self, cursor: C, at: At) -> bool:
        lag = self._values.lag(cursor, at)
        if lag is None or (lag == 0 and cursor.place is not None and cursor.place.name == at.site):
            return False
        if at.site is not None and (lag, self._orders[at.site]) <= (0, cursor.order):
            when = f"{-lag} iterations ago" if lag else "in this iteration"
            raise OutOfOrderError(f"{at.site} has passed, {when}")
        cursor.site, cursor.lag = at.site, lag
        is_there = at.site is None and lag <= 0
        cursor.pc -= not is_there
        return not is_there

    def run_node(self, cursor: C, run: Run) -> None:
        node = run.node
        cursor.node = node.id
        self.num_run += 1
        value = self._nodes[type(node)](cursor, node)
        if type(node) not in _WITHOUT_VALUE:
            cursor.env[node.id] = value
            self._values.made(cursor, value)
        for id in run.free:
            cursor.env.pop(id, None)

    def halt(self, cursor: C, halt: Halt) -> None:
        cursor.stop(cursor.has_token)

    def branch(self, cursor: C, branch: Branch) -> None:
        cursor.node = branch.node
        if self._values.truth(cursor, branch.test) is False:
            cursor.pc = branch.target

    def jump(self, cursor: C, jump: Jump) -> None:
        cursor.pc = jump.target

    def move(self, cursor: C, move: Move) -> None:
        values = [self._values.value(cursor, value) for value in move.values]
        cursor.env.update(zip(move.ids, values, strict=True))
        for id in move.free:
            cursor.env.pop(id, None)

    def loop_begin(self, cursor: C, begin: LoopBegin) -> None:
        cursor.node = begin.node
        items = self._values.items(cursor, begin.over)
        if items is not None:
            cursor.frames.append(LoopFrame(items))

    def loop_next(self, cursor: C, step: LoopNext) -> None:
        frame = cursor.frames[-1]
        assert isinstance(frame, LoopFrame)
        if frame.position == len(frame.items):
            cursor.frames.pop()
            cursor.pc = step.exit
            return
        cursor.spent.at(self._clock.step).trip(self._limits)
        cursor.env[step.item] = frame.items[frame.position]
        frame.position += 1

    def iter_begin(self, cursor: C, begin: IterBegin) -> None:
        start, stop, step = (self._values.bound(cursor, bound) for bound in (begin.start, begin.stop, begin.step))
        cursor.frames.append(IterationsFrame(start, stop, step, start))

    def iter_next(self, cursor: C, step: IterNext) -> None:
        frame = cursor.frames[-1]
        assert isinstance(frame, IterationsFrame)
        goes_on = self._values.goes_on(cursor, frame)
        if goes_on:
            frame.current, frame.upcoming = frame.upcoming, frame.upcoming + frame.step
            cursor.env[step.index] = self._values.index(frame.current)
        elif goes_on is not None:
            cursor.frames.pop()
            cursor.pc = step.exit

    def free(self, cursor: C, free: Free) -> None:
        for id in free.ids:
            cursor.env.pop(id, None)

    def end(self, cursor: C, end: End) -> None:
        cursor.end()
