"""Constructs of a rewritten block that turned out to be over a proxy, or that turned out not to be.

Each object serves one execution of one construct. Over a plain value it only says which way Python goes. Over a proxy
it opens a block in the recorder, and does for the names bound inside what the engine will do for their values: it
puts back what they held before another path runs, and afterwards binds what holds whichever path runs: the same object,
a value that the recorder merges, or a `Poison`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Never, Protocol, cast

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks.bindings import UNBOUND
from nnsight_vllm.trace.blocks.constructs import BlockRun, Bound, Construct, Values
from nnsight_vllm.trace.blocks.poison import Poison, is_poison, kept


class ScopeContext(Protocol):
    """A context object that records a block of its own, such as `tracer.cond(p)`; marked by `_nns_scope = True`."""

    def merge(self, names: list[str], before: list[object], after: list[object]) -> list[object]:
        """The names' values from here on: `before` where the block doesn't run, `after` where it does."""


class IfConstruct(Construct):
    """`if`, a conditional expression, `and` or `or`. `then` and `other` say which of its two paths Python runs."""

    def __init__(self, run: BlockRun, construct: str, test: object, bound: Bound, line: int) -> None:
        super().__init__(run, construct, bound, line)
        self._values: Values | None = None
        if run.recorder.is_proxy(test):
            self._handle = run.recorder.begin_cond(test)
            self.open()
            self.then = self.other = True
        else:
            self.then = bool(test)
            self.other = not self.then

    def switch(self) -> None:
        """The first path has run: go on with the second."""
        self._values = self.now()
        self.restore()
        self.run.recorder.begin_else(self._handle)

    def done(self) -> None:
        """Both paths have run: bind the results."""
        self.finish([])

    def finish(self, results: list[tuple[object, object]]) -> list[object]:
        """Bind the names' results; `results` are pairs of further values, whose merged values are returned."""
        assert self._values is not None
        settled, pairs = self.settle(self._values, self.now())
        merged = self.run.recorder.end_cond(self._handle, [*pairs.values(), *results])
        self.close()
        self.run.bindings.set(settled | dict(zip(pairs, merged, strict=False)))
        return merged[len(pairs) :]


class WithConstruct(Construct):
    """`with`. Contexts that record a block of their own have the names bound inside merged; others are left alone."""

    def __init__(self, run: BlockRun, bound: Bound, line: int) -> None:
        super().__init__(run, "`with` block", bound, line)
        self._otherwise: Values | None = None
        self._context: ScopeContext | None = None

    def watch(self, context: object) -> object:
        """Take the context object that the statement enters, and pass it on."""
        if getattr(type(context), "_nns_scope", False):
            self._context = cast(ScopeContext, context)
            if not self.symbolic:
                self.open()
        return context

    def switch(self) -> None:
        """The block has run and its `.else_()` follows."""
        self._otherwise = self.now()
        self.restore()

    def done(self) -> None:
        """The block, or the pair of blocks, has run: bind the results."""
        assert self._context is not None
        otherwise = self.before if self._otherwise is None else self._otherwise
        settled, pairs = self.settle(otherwise, self.now())
        before, after = [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]
        merged = self._context.merge(list(pairs), before, after)
        self.close()
        self.run.bindings.set(settled | dict(zip(pairs, merged, strict=True)))


@dataclass(frozen=True)
class LoopNames:
    """Names that a loop treats apart: those of its item, and those that its body binds by `name += ...` only."""

    targets: tuple[str, ...]
    augmented: tuple[str, ...]


class ForConstruct(Construct):
    """`for` over a proxy: its body runs once, with an item that stands for all of them.

    A name that holds one thing before the body and another after it is carried from trip to trip. `name += ...` on
    something that has its own `+=` is expected to change that thing, so the name goes on holding it.
    """

    def __init__(self, run: BlockRun, over: object, bound: Bound, names: LoopNames, line: int) -> None:
        super().__init__(run, "`for`", bound, line)
        self._over = over
        self._names = names

    def __iter__(self) -> Iterator[object]:
        recorder, bindings = self.run.recorder, self.run.bindings
        self.open()
        names = [name for name, value in self.before.items() if self._is_carried(name, value)]
        handle, item, carried = recorder.begin_loop(self._over, [self.before[name] for name in names])
        stale = {name: self._stale(name) for name in self._not_carried(names)}
        bindings.set(stale)
        bindings.set(dict(zip(names, carried, strict=True)))
        yield item
        after = self.now()
        values = [
            after[name] if self.can_merge(after[name]) else first for name, first in zip(names, carried, strict=True)
        ]
        outs = recorder.end_loop(handle, values)
        self.close()
        unchanged = {name: self.before[name] for name, poison in stale.items() if after[name] is poison}
        bindings.set({name: self._last(name, after[name]) for name in self.lines if name not in names} | unchanged)
        for name, first, out in zip(names, carried, outs, strict=True):
            is_value = after[name] is first or self.can_merge(after[name])
            bindings.set({name: out if is_value else self.poison(name, self.before[name], after[name])})

    def _is_carried(self, name: str, value: object) -> bool:
        return name not in self._names.targets and self.can_merge(value) and not self._is_changed_in_place(name, value)

    def _is_changed_in_place(self, name: str, value: object) -> bool:
        is_proxy = value is not UNBOUND and not is_poison(value) and self.run.recorder.is_proxy(value)
        return is_proxy and name in self._names.augmented and hasattr(type(value), "__iadd__")

    def _not_carried(self, names: list[str]) -> list[str]:
        """Names bound before whose value the loop changes but can't carry."""
        apart = {*names, *self._names.targets}
        bound = {name: value for name, value in self.before.items() if value is not UNBOUND and name not in apart}
        return [name for name, value in bound.items() if not self._is_changed_in_place(name, value)]

    def _stale(self, name: str) -> Poison:
        line = self.lines[name]
        reason = f"the {self.place} binds it anew (line {line}), and a value of its kind can't go from trip to trip"
        return Poison(name, reason, kept(self.before[name]))

    def _last(self, name: str, after: object) -> object:
        """What a name holds after the loop that isn't carried: unusable, for there may have been no trip."""
        if after is UNBOUND or after is self.before[name]:
            return after
        if self._is_changed_in_place(name, self.before[name]):
            self._refuse_rebound(name)
        if self.before[name] is not UNBOUND and name not in self._names.targets:
            return self.poison(name, self.before[name], after)
        return Poison(name, f"the {self.place} binds it (line {self.lines[name]}), and may run zero times", kept(after))

    def _refuse_rebound(self, name: str) -> Never:
        raise ControlFlowError(
            f"{self.run.filename}:{self.lines[name]}: `{name}` is given a new value by an operator like `+=`, which the "
            f"{self.place} can't see beforehand: write `{name} = {name} + ...`"
        )
