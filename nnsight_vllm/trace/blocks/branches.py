"""Constructs of a rewritten block that turned out to be over a proxy, or that turned out not to be.

Each object serves one execution of one construct. Over a plain value it only says which way Python goes. Over a proxy
it opens a block in the recorder, and does for the names bound inside what the engine will do for their values: it
puts back what they held before another path runs, and afterwards binds what holds whichever path runs: the same object,
a value that the recorder merges, or a `Poison`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Never, Protocol, cast

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks.bindings import UNBOUND
from nnsight_vllm.trace.blocks.poison import Poison, is_poison, kept

if TYPE_CHECKING:
    from nnsight_vllm.trace.blocks.control import Runtime

Values = dict[str, object]
Bound = Sequence[tuple[str, int]]  # names with the line that binds them first


class ScopeContext(Protocol):
    """A context object that records a block of its own, such as `tracer.cond(p)`; marked by `_nns_scope = True`."""

    def merge(self, names: list[str], before: list[object], after: list[object]) -> list[object]:
        """The names' values from here on: `before` where the block doesn't run, `after` where it does."""


class Opened:
    """A construct at a line of the block, open in the recorder if `symbolic`."""

    symbolic = False

    def __init__(self, runtime: Runtime, construct: str, bound: Bound, line: int) -> None:
        self.runtime = runtime
        self.place = f"{construct} at {runtime.filename}:{line}"
        self.lines = dict(bound)
        self.before: Values = {}

    def open(self) -> None:
        self.symbolic = True
        self.before = self.now()
        self.runtime.opened.append(self)

    def close(self) -> None:
        assert self.runtime.opened[-1] is self
        self.runtime.opened.pop()

    def now(self) -> Values:
        return self.runtime.bindings.get(self.lines)

    def restore(self) -> None:
        self.runtime.bindings.set(self.before)

    def poison(self, name: str, first: object, second: object) -> Poison:
        """What the name holds when its values on two paths, either perhaps `UNBOUND`, don't make one."""
        values = kept(*(value for value in (first, second) if value is not UNBOUND))
        inner = next((value.reason for value in (first, second) if isinstance(value, Poison)), None)
        is_partial = first is UNBOUND or second is UNBOUND
        how = "is bound on one path only" if is_partial else "has values that can't be merged on the two paths"
        return Poison(
            name, inner or f"it {how} of the {self.place} (first bound there at line {self.lines[name]})", values
        )


class Branch(Opened):
    """`if`, a conditional expression, `and` or `or`. `then` and `other` say which of its two paths Python runs."""

    def __init__(self, runtime: Runtime, construct: str, test: object, bound: Bound, line: int) -> None:
        super().__init__(runtime, construct, bound, line)
        self._values: Values | None = None
        if runtime.recorder.is_proxy(test):
            self._handle = runtime.recorder.begin_cond(test)
            self.open()
            self.then = self.other = True
        else:
            self.then = bool(test)
            self.other = not self.then

    def switch(self) -> None:
        """The first path has run: go on with the second."""
        self._values = self.now()
        self.restore()
        self.runtime.recorder.begin_else(self._handle)

    def done(self) -> None:
        """Both paths have run: bind the results."""
        self.finish([])

    def finish(self, results: list[tuple[object, object]]) -> list[object]:
        """Bind the names' results; `results` are pairs of further values, whose merged values are returned."""
        assert self._values is not None
        settled, pairs = settle(self, self._values, self.now())
        merged = self.runtime.recorder.end_cond(self._handle, [*pairs.values(), *results])
        self.close()
        self.runtime.bindings.set(settled | dict(zip(pairs, merged, strict=False)))
        return merged[len(pairs) :]


class Context(Opened):
    """`with`. Contexts that record a block of their own have the names bound inside merged; others are left alone."""

    def __init__(self, runtime: Runtime, bound: Bound, line: int) -> None:
        super().__init__(runtime, "`with` block", bound, line)
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
        settled, pairs = settle(self, otherwise, self.now())
        before, after = [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]
        merged = self._context.merge(list(pairs), before, after)
        self.close()
        self.runtime.bindings.set(settled | dict(zip(pairs, merged, strict=True)))


@dataclass(frozen=True)
class Kinds:
    """Names that a loop treats apart: those of its item, and those that its body binds by `name += ...` only."""

    targets: tuple[str, ...]
    augmented: tuple[str, ...]


class Loop(Opened):
    """`for` over a proxy: its body runs once, with an item that stands for all of them.

    A name that holds one thing before the body and another after it is carried from trip to trip. `name += ...` on
    something that has its own `+=` is expected to change that thing, so the name goes on holding it.
    """

    def __init__(self, runtime: Runtime, over: object, bound: Bound, kinds: Kinds, line: int) -> None:
        super().__init__(runtime, "`for`", bound, line)
        self._over = over
        self._kinds = kinds

    def __iter__(self) -> Iterator[object]:
        recorder, bindings = self.runtime.recorder, self.runtime.bindings
        self.open()
        names = [name for name, value in self.before.items() if self._is_carried(name, value)]
        handle, item, carried = recorder.begin_loop(self._over, [self.before[name] for name in names])
        stale = {name: self._stale(name) for name in self._not_carried(names)}
        bindings.set(stale)
        bindings.set(dict(zip(names, carried, strict=True)))
        yield item
        after = self.now()
        values = [
            after[name] if self._can_go_on(after[name]) else first for name, first in zip(names, carried, strict=True)
        ]
        outs = recorder.end_loop(handle, values)
        self.close()
        unchanged = {name: self.before[name] for name, poison in stale.items() if after[name] is poison}
        bindings.set({name: self._last(name, after[name]) for name in self.lines if name not in names} | unchanged)
        for name, first, out in zip(names, carried, outs, strict=True):
            is_value = after[name] is first or self._can_go_on(after[name])
            bindings.set({name: out if is_value else self.poison(name, self.before[name], after[name])})

    def _is_carried(self, name: str, value: object) -> bool:
        return name not in self._kinds.targets and self._can_go_on(value) and not self._is_changed_in_place(name, value)

    def _is_changed_in_place(self, name: str, value: object) -> bool:
        is_proxy = value is not UNBOUND and not is_poison(value) and self.runtime.recorder.is_proxy(value)
        return is_proxy and name in self._kinds.augmented and hasattr(type(value), "__iadd__")

    def _can_go_on(self, value: object) -> bool:
        """Whether a trip can hand the value on to the next."""
        return value is not UNBOUND and not is_poison(value) and self.runtime.recorder.can_merge(value)

    def _not_carried(self, names: list[str]) -> list[str]:
        """Names bound before whose value the loop changes but can't carry."""
        apart = {*names, *self._kinds.targets}
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
        if self.before[name] is not UNBOUND and name not in self._kinds.targets:
            return self.poison(name, self.before[name], after)
        return Poison(name, f"the {self.place} binds it (line {self.lines[name]}), and may run zero times", kept(after))

    def _refuse_rebound(self, name: str) -> Never:
        raise ControlFlowError(
            f"{self.runtime.filename}:{self.lines[name]}: `{name}` is given a new value by an operator like `+=`, which the "
            f"{self.place} can't see beforehand: write `{name} = {name} + ...`"
        )


def settle(construct: Opened, first: Values, second: Values) -> tuple[Values, dict[str, tuple[object, object]]]:
    """Compare the names' values on two paths: those that need no merging, and the pairs that do."""
    settled: Values = {}
    pairs: dict[str, tuple[object, object]] = {}
    for name, one in first.items():
        two = second[name]
        if one is two or _is_same_plain(one, two):
            settled[name] = one
        elif _is_value(one, construct) and _is_value(two, construct):
            pairs[name] = one, two
        else:
            settled[name] = construct.poison(name, one, two)
    return settled, pairs


def _is_same_plain(one: object, two: object) -> bool:
    return type(one) is type(two) and type(one) in (bool, int, str, bytes) and one == two


def _is_value(value: object, construct: Opened) -> bool:
    return value is not UNBOUND and not is_poison(value) and construct.runtime.recorder.can_merge(value)
