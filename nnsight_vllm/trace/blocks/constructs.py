"""A construct of a rewritten block, such as an `if`: what it binds, and what its names hold once all its paths have run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nnsight_vllm.trace.blocks.bindings import UNBOUND, Bindings
from nnsight_vllm.trace.blocks.poison import Poison, is_poison, kept

Values = dict[str, object]
Bound = Sequence[tuple[str, int]]  # names with the line that binds them first


class BlockRecorder(Protocol):
    """What records the blocks. Handles are its own; the runtime only hands them back."""

    def is_proxy(self, value: object, /) -> bool:
        """Whether the value is only known when the graph runs."""

    def can_merge(self, value: object, /) -> bool:
        """Whether a branch can yield the value and a loop can carry it."""

    def begin_cond(self, test: Any, /) -> Any:
        """Open the block that runs where `test` is true."""

    def begin_else(self, handle: Any, /) -> None:
        """Close that block and open the one that runs otherwise."""

    def end_cond(self, handle: Any, pairs: list[tuple[object, object]], /) -> list[object]:
        """Close the node. Each (value of the first block, of the second) becomes one value."""

    def begin_loop(self, over: Any, inits: list[object], /) -> tuple[Any, object, list[object]]:
        """Open a loop's body. Returns the item, and what stands for each of the `inits` inside."""

    def end_loop(self, handle: Any, values: list[object], /) -> list[object]:
        """Close the body. `values` are handed to the next trip; returned is what holds after the last."""

    def logical_not(self, value: Any, /) -> object:
        """Record `not value`."""


@dataclass(eq=False)
class BlockRun:
    """One run of a rewritten block. `opened`: the constructs that are open in the recorder."""

    recorder: BlockRecorder
    bindings: Bindings
    filename: str
    opened: list[Construct] = field(default_factory=list)


class Construct:
    """A construct at a line of the block, open in the recorder if `symbolic`."""

    symbolic = False

    def __init__(self, run: BlockRun, construct: str, bound: Bound, line: int) -> None:
        self.run = run
        self.place = f"{construct} at {run.filename}:{line}"
        self.lines = dict(bound)
        self.before: Values = {}

    def open(self) -> None:
        self.symbolic = True
        self.before = self.now()
        self.run.opened.append(self)

    def close(self) -> None:
        assert self.run.opened[-1] is self
        self.run.opened.pop()

    def now(self) -> Values:
        return self.run.bindings.get(self.lines)

    def restore(self) -> None:
        self.run.bindings.set(self.before)

    def poison(self, name: str, first: object, second: object) -> Poison:
        """What the name holds when its values on two paths, either perhaps `UNBOUND`, don't make one."""
        values = kept(*(value for value in (first, second) if value is not UNBOUND))
        inner = next((value.reason for value in (first, second) if isinstance(value, Poison)), None)
        is_partial = first is UNBOUND or second is UNBOUND
        how = "is bound on one path only" if is_partial else "has values that can't be merged on the two paths"
        return Poison(
            name, inner or f"it {how} of the {self.place} (first bound there at line {self.lines[name]})", values
        )

    def can_merge(self, value: object) -> bool:
        """Whether the engine can go on with the value, on whichever path or trip."""
        return value is not UNBOUND and not is_poison(value) and self.run.recorder.can_merge(value)

    def settle(self, first: Values, second: Values) -> tuple[Values, dict[str, tuple[object, object]]]:
        """Compare the names' values on two paths: those that need no merging, and the pairs that do."""
        settled: Values = {}
        pairs: dict[str, tuple[object, object]] = {}
        for name, one in first.items():
            two = second[name]
            if one is two or _is_same_plain(one, two):
                settled[name] = one
            elif self.can_merge(one) and self.can_merge(two):
                pairs[name] = one, two
            else:
                settled[name] = self.poison(name, one, two)
        return settled, pairs


def _is_same_plain(one: object, two: object) -> bool:
    return type(one) is type(two) and type(one) in (bool, int, str, bytes) and one == two
