"""`tracer.iter[...]`, `tracer.all()` and `module.all()`: blocks that run at several iterations of a request."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from nnsight_vllm.errors import ControlFlowError, RefusedError
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorder import current
from nnsight_vllm.trace.source import user_line


class IterationBlock:
    """A `with` block, or a `for` loop of one recorded trip, over some of the request's iterations."""

    def __init__(self, index: object, within: str | None = None) -> None:
        self._range = _as_range(index)
        self._within = within

    def __enter__(self) -> Proxy:
        recorder = current("tracer.iter")
        start, stop, step = self._range
        first = recorder.places.cursor.at.iteration if start is None else start
        return recorder.flow.begin_iterations(first, stop, step, self._within)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            current("tracer.iter").flow.end_iterations()
        else:
            current("tracer.iter").flow.abandon_iterations()

    def __iter__(self) -> Iterator[Proxy]:
        line = user_line()
        index = self.__enter__()
        finished = False
        try:
            yield index
            finished = True
        finally:
            recorder = current("tracer.iter")
            if finished:
                recorder.flow.end_iterations()
            else:
                recorder.flow.abandon_iterations()
                recorder.pending = ControlFlowError(f"an iteration block can't be left early (break, return); {line}")


class IterationIndexer:
    """`tracer.iter`: indexing it makes the block."""

    def __getitem__(self, index: object) -> IterationBlock:
        return IterationBlock(index)


def _as_range(index: object) -> tuple[int | None, int | None, int]:
    if isinstance(index, bool):
        raise RefusedError(f"tracer.iter takes a number or a slice, got {index!r}; {user_line()}")
    if isinstance(index, int):
        return _checked(index, index + 1, 1)
    if isinstance(index, range):
        return _checked(index.start, index.stop, index.step)
    if isinstance(index, slice) and all(isinstance(part, int | None) for part in (index.start, index.stop, index.step)):
        return _checked(index.start, index.stop, 1 if index.step is None else index.step)
    raise RefusedError(f"tracer.iter takes a number, a range or a slice of numbers, got {index!r}; {user_line()}")


def _checked(start: int | None, stop: int | None, step: int) -> tuple[int | None, int | None, int]:
    if (start or 0) < 0 or (stop is not None and stop < 0) or step < 1:
        raise RefusedError(f"iterations count from 0 upwards, got {start}:{stop}:{step}; {user_line()}")
    return start, stop, step
