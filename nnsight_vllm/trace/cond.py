"""`with tracer.cond(p):` and `with cond.else_():`, the written-out form of `if`."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.recorder import Recorder
    from nnsight_vllm.trace.scope import CondHandle


class CondBlock:
    """A branch that is recorded once. A plain Python test is recorded too: the engine tests it."""

    _nns_scope = True  # rewritten code asks `merge` for the names that the block binds

    def __init__(self, recorder: Recorder, test: object) -> None:
        self._recorder = recorder
        self._test = test
        self._handle: CondHandle | None = None

    def __enter__(self) -> CondBlock:
        if self._handle is not None:
            raise RefusedError(f"this cond was used already; write a new one; {user_line()}")
        self._handle = self._recorder.flow.begin_cond(self._test)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._handle is not None
        if kind is None:
            self._recorder.flow.end_cond(self._handle, [])

    def else_(self) -> ElseBlock:
        """A block that runs where the test is false."""
        if self._handle is None:
            raise RefusedError(f".else_() comes after the cond's own block; {user_line()}")
        return ElseBlock(self._recorder, self._handle)

    def merge(self, names: list[str], before: list[object], after: list[object]) -> list[object]:
        """The names' values after the block: what it bound where it ran, the old value otherwise."""
        assert self._handle is not None
        return self._recorder.flow.add_results(self._handle, list(zip(after, before, strict=True)))


class ElseBlock:
    """The other branch of a `CondBlock`."""

    _nns_scope = True

    def __init__(self, recorder: Recorder, handle: CondHandle) -> None:
        self._recorder = recorder
        self._handle = handle

    def __enter__(self) -> None:
        self._recorder.flow.resume_else(self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._recorder.flow.close_else(self._handle)

    def merge(self, names: list[str], before: list[object], after: list[object]) -> list[object]:
        """The names' values after both blocks."""
        return self._recorder.flow.add_results(self._handle, list(zip(before, after, strict=True)))
