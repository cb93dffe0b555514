"""A recorder of control flow without a model: what it recorded can be run, so a test compares it with plain Python."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks import block, frames
from nnsight_vllm.trace.blocks.poison import Poison, is_poison

Env = dict[int, object]


class Value:
    """A proxy: known by its number when the recorded program runs."""

    def __init__(self, recorder: FakeRecorder) -> None:
        self.recorder = recorder
        self.id = next(recorder.numbers)

    def __add__(self, other: object) -> Value:
        return self.recorder.op(operator.add, self, other)

    def __radd__(self, other: object) -> Value:
        return self.recorder.op(operator.add, other, self)

    def __sub__(self, other: object) -> Value:
        return self.recorder.op(operator.sub, self, other)

    def __mul__(self, other: object) -> Value:
        return self.recorder.op(operator.mul, self, other)

    def __rmul__(self, other: object) -> Value:
        return self.recorder.op(operator.mul, other, self)

    def __gt__(self, other: object) -> Value:
        return self.recorder.op(operator.gt, self, other)

    def __lt__(self, other: object) -> Value:
        return self.recorder.op(operator.lt, self, other)

    def __bool__(self) -> bool:
        raise ControlFlowError(f"truth of a value ({block.why_native(sys._getframe(1))})")

    def __iter__(self) -> Iterator[object]:
        raise ControlFlowError(f"iteration over a value ({block.why_native(sys._getframe(1))})")


Step = Callable[[Env], None]


@dataclass
class Cond:
    test: Value
    then: list[Step] = field(default_factory=list)
    orelse: list[Step] = field(default_factory=list)
    yields: list[tuple[object, object, int]] = field(default_factory=list)

    def run(self, env: Env) -> None:
        taken = bool(env[self.test.id])
        for step in self.then if taken else self.orelse:
            step(env)
        env |= {out: known(env, then if taken else other) for then, other, out in self.yields}


@dataclass
class Loop:
    over: Value
    item: Value
    inits: list[object]
    carried: list[Value]
    body: list[Step] = field(default_factory=list)
    yields: list[object] = field(default_factory=list)
    outs: list[Value] = field(default_factory=list)

    def run(self, env: Env) -> None:
        now = [known(env, init) for init in self.inits]
        for item in list(env[self.over.id]):  # type: ignore[call-overload]
            env |= {self.item.id: item, **dict(zip([value.id for value in self.carried], now, strict=True))}
            for step in self.body:
                step(env)
            now = [known(env, value) for value in self.yields]
        env |= dict(zip([value.id for value in self.outs], now, strict=True))


class FakeRecorder:
    """A `BlockRecorder`; `value` makes inputs, `run` runs the program, `calls` counts recorded blocks."""

    def __init__(self) -> None:
        self.numbers = iter(range(1_000_000))
        self.env: Env = {}
        self.steps: list[Step] = []
        self._outer: list[list[Step]] = []
        self.calls: list[str] = []

    def value(self, content: object) -> Value:
        value = Value(self)
        self.env[value.id] = content
        return value

    def op(self, function: Callable[..., object], *args: object) -> Value:
        result = Value(self)
        self.steps.append(lambda env: env.update({result.id: function(*(known(env, arg) for arg in args))}))
        return result

    def run(self) -> None:
        assert not self._outer, "a block is still open"
        for step in self.steps:
            step(self.env)

    def is_proxy(self, value: object) -> bool:
        return isinstance(value, Value)

    def can_merge(self, value: object) -> bool:
        return value is None or isinstance(value, Value | int | float)

    def begin_cond(self, test: Value) -> Cond:
        self.calls.append("cond")
        cond = Cond(test)
        self._open(cond.then)
        return cond

    def begin_else(self, handle: Cond) -> None:
        self._close()
        self._open(handle.orelse)

    def end_cond(self, handle: Cond, pairs: list[tuple[object, object]]) -> list[object]:
        self._close()
        outs = [Value(self) for _ in pairs]
        handle.yields = [(*pair, out.id) for pair, out in zip(pairs, outs, strict=True)]
        self.steps.append(handle.run)
        return list(outs)

    def begin_loop(self, over: Value, inits: list[object]) -> tuple[Loop, object, list[object]]:
        self.calls.append("loop")
        loop = Loop(over, Value(self), inits, [Value(self) for _ in inits])
        self._open(loop.body)
        return loop, loop.item, list(loop.carried)

    def end_loop(self, handle: Loop, values: list[object]) -> list[object]:
        self._close()
        handle.yields, handle.outs = values, [Value(self) for _ in values]
        self.steps.append(handle.run)
        return list(handle.outs)

    def logical_not(self, value: Value) -> Value:
        return self.op(operator.not_, value)

    def cond(self, test: object) -> CondBlock:
        return CondBlock(self, test)

    def _open(self, steps: list[Step]) -> None:
        self._outer.append(self.steps)
        self.steps = steps

    def _close(self) -> None:
        self.steps = self._outer.pop()


class CondBlock:
    """`with recorder.cond(p):`, which leaves the node open for the `else_` and the merge that follow."""

    _nns_scope = True

    def __init__(self, recorder: FakeRecorder, test: object) -> None:
        self.recorder = recorder
        self.test = test if isinstance(test, Value) else recorder.value(test)

    def __enter__(self) -> CondBlock:
        self.handle = self.recorder.begin_cond(self.test)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.recorder.begin_else(self.handle)

    def merge(self, names: list[str], before: list[object], after: list[object]) -> list[object]:
        return self.recorder.end_cond(self.handle, list(zip(after, before, strict=True)))

    def else_(self) -> ElseBlock:
        return ElseBlock(self)


class ElseBlock:
    _nns_scope = True

    def __init__(self, cond: CondBlock) -> None:
        self.cond = cond

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def merge(self, names: list[str], before: list[object], after: list[object]) -> list[object]:
        return self.cond.recorder.end_cond(self.cond.handle, list(zip(before, after, strict=True)))


class Trace:
    """The context manager in small: what `model.trace` does around a block, then running what was recorded."""

    def __init__(self, recorder: FakeRecorder | None = None) -> None:
        self.recorder = recorder or FakeRecorder()
        self.was_rewritten = False

    def __enter__(self) -> Trace:
        self.frame = sys._getframe(1)
        self.body = block.prepare(self.frame)
        if self.body is not None:
            self.was_rewritten = True
            self.body.skip(self.frame)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, block.SkipBody):
            assert self.body is not None
            self.body.run(self.recorder)
        elif error is not None:
            return False
        self.recorder.run()
        self._deliver()
        return True

    def value(self, content: object) -> Any:
        """A proxy that is `content` when the program runs."""
        return self.recorder.value(content)

    def cond(self, test: object) -> CondBlock:
        return self.recorder.cond(test)

    def _deliver(self) -> None:
        found = {name: known(self.recorder.env, value) for name, value in frames.names(self.frame).items()}
        own = {name: value for name, value in frames.names(self.frame).items() if isinstance_value(value)}
        frames.write_names(self.frame, {name: found[name] for name in own})


def isinstance_value(value: object) -> bool:
    return not is_poison(value) and isinstance(value, Value)


def known(env: Env, value: object) -> object:
    """A value's content in the run; what isn't a proxy is its own."""
    if isinstance(value, Poison) or not isinstance(value, Value):
        return value
    return env.get(value.id, value)
