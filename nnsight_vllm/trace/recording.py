"""A program while it is recorded, and the values in it.

These are the two things that everything else here is about, and each knows the other: a value asks the recording that is
open to note what happens to it, a recording takes values as arguments. What it does with them is the `Recorder`'s: it knows the
sites, the blocks and the other invokes, and they know recordings and values only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

from nnsight_vllm.errors import RecordError, RefusedError, ScopeError, ValueNotSetError
from nnsight_vllm.graph.nodes import Arg, Const, Node, Ref
from nnsight_vllm.trace.scope import Root, Scope
from nnsight_vllm.trace.source import SourceLine, user_line


class Recording(ABC):
    """The nodes of one invoke with the lines that made them; after the run, the values that came home.

    `num_samples`: how often the program runs.
    `used`: values that an operation took since the open iteration block began. `replaced`: what stands for a value in the
    open block. With `goes_on` more may be added when its block is over.
    """

    def __init__(self, num_samples: int, goes_on: bool) -> None:
        self.scope = self.body = Scope("body", None, user_line())
        self.lines: dict[int, SourceLine] = {}
        self.values: dict[str, object] = {}
        self.state: Literal["recording", "closed", "done", "failed"] = "recording"
        self.unset = "this value exists when the block is over, and not if it was only scanned"
        self.why_failed = "its trace failed"
        self.pending: RecordError | None = None
        self.used: set[tuple[Recording, int | None]] = set()
        self.replaced: dict[int, Arg] = {}
        self.num_samples = num_samples
        self._goes_on = goes_on
        self._slots = 0

    def new_id(self) -> int:
        """A fresh id, tied to the user's current line."""
        id = len(self.lines)
        self.lines[id] = user_line()
        return id

    def new_slot(self) -> str:
        """A name for something that is saved."""
        self._slots += 1
        return f"s{self._slots - 1}"

    @property
    def save_names(self) -> set[str]:
        """The names that saved values come home under."""
        return {f"s{i}" for i in range(self._slots)}

    def add(self, node: Node) -> None:
        """Append to the open block. Raises if the invoke is over."""
        self.require_open()
        self.scope.nodes.append(node)

    def constant(self, digest: str) -> Ref:
        """A reference to a tensor that travels by its digest."""
        id = self.new_id()
        self.add(Const(id, digest))
        return Ref(id)

    def require_open(self) -> None:
        goes_on = self.state == "closed" and self._goes_on and not is_recording()
        if self.state != "recording" and not goes_on:
            raise RefusedError(
                f"this invoke is already recorded; nothing can be added to it, and {self.unset}; {user_line()}"
            )

    @abstractmethod
    def op(
        self, name: str, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        """Record one operation. `function` is its local twin, run on meta tensors for shapes and aliasing."""

    @abstractmethod
    def encode(self, value: object) -> Arg:
        """`value` as data. Raises for what can't travel."""

    @abstractmethod
    def localized(self, value: Any) -> Any:
        """The argument with what stands here for values of other invokes; those that are known by now are themselves."""

    @abstractmethod
    def use(self, value: RunValue) -> Arg:
        """A reference to the value. Raises `ScopeError` if no path leads from it to here."""

    @abstractmethod
    def save(self, value: RunValue) -> str:
        """Send the value home, as it is here. Returns the name it comes home under."""

    @abstractmethod
    def stop(self) -> None:
        """End the request at this point of the program."""


class RunValue:
    """A value of the run: where it was recorded, and what it is once the run is over.

    `_metas` are its shapes: one variant, or two where the number of rows varies. `_maybe` are the sites that it may be a view
    of, where meta tensors can't tell.
    """

    def __init__(
        self,
        recorder: Recording,
        node: int | None,
        metas: tuple[object, ...],
        scope: Scope | None,
        maybe: frozenset[Root] = frozenset(),
    ) -> None:
        self._recorder = recorder
        self._node = node
        self._metas = metas
        self._scope = scope
        self._maybe = maybe
        self._slot: str | None = None
        self._item_of: tuple[int | None, Arg] | None = None

    @property
    def value(self) -> Any:
        """The saved value, once the run is over."""
        if not self._is_done:
            raise ValueNotSetError(f"{self._recorder.unset}; {user_line()}")
        if self._recorder.state == "failed":
            raise ValueNotSetError(f"this value was never computed: {self._recorder.why_failed} ({self._where()})")
        if self._slot is None:
            raise ValueNotSetError(f"this value wasn't saved: call .save() on it inside the block ({self._where()})")
        if self._slot not in self._recorder.values:
            raise ValueNotSetError(f"this value was never computed: the run didn't reach its save ({self._where()})")
        return self._recorder.values[self._slot]

    @property
    def _is_done(self) -> bool:
        return self._recorder.state in {"done", "failed"}

    @property
    def _has_value(self) -> bool:
        return self._slot is not None and self._slot in self._recorder.values

    @property
    def _here(self) -> Recording:
        """Who records what happens to the value: the invoke that is open, which may be another than its own."""
        return opened() or self._recorder

    def _visible_node(self) -> int:
        """Its node. Raises `ScopeError` if no path leads from there to here."""
        if self._scope is None or self._node is None:
            raise RefusedError(f"tracer.result is known after the run, it can't be computed with; {user_line()}")
        if not self._scope.is_visible():
            where = "branch" if self._scope.kind in {"then", "else"} else "loop"
            raise ScopeError(f"this value exists only inside the {where} at {self._scope.line}; used at {user_line()}")
        return self._node

    def _where(self) -> str:
        line = None if self._node is None else self._recorder.lines.get(self._node)
        return "recorded at " + str(line) if line else "tracer.result"


_open: ContextVar[Recording | None] = ContextVar("nnsight_vllm_recorder", default=None)


def opened() -> Recording | None:
    """That of the invoke that is open; each thread and each asyncio task has its own.

    A task that was started in a block keeps a copy of its context, and may outlive it.
    """
    recording = _open.get()
    return recording if recording is not None and recording.state == "recording" else None


def is_recording() -> bool:
    return opened() is not None


def push(recording: Recording) -> None:
    if is_recording():
        raise RefusedError(f"an invoke can't be opened inside another one; {user_line()}")
    _open.set(recording)


def pop() -> None:
    _open.set(None)


def unwrap(value: Any) -> Any:
    """An argument with values of the run that are known as themselves."""
    if isinstance(value, RunValue):
        return value.value
    if isinstance(value, tuple | list) and type(value) in {tuple, list}:
        return type(value)(unwrap(item) for item in value)
    if isinstance(value, dict):
        return {key: unwrap(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(unwrap(value.start), unwrap(value.stop), unwrap(value.step))
    return value


def values_in(value: object) -> Iterator[RunValue]:
    """The values of the run inside an argument."""
    match value:
        case RunValue():
            yield value
        case tuple() | list():
            for item in value:
                yield from values_in(item)
        case dict():
            yield from values_in(list(value.values()))
        case slice():
            yield from values_in((value.start, value.stop, value.step))
