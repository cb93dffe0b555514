"""A trace that is recorded now and run later: awaited to its end, or iterated over while it runs.

    async for event in tracer.stream(): ...
    await tracer

Either way the saved values are there afterwards, in their proxies and in the names of the frame that recorded them.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from types import TracebackType
from typing import Any

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.trace.deliver import deliver
from nnsight_vllm.trace.edits import Standing
from nnsight_vllm.trace.events import AsyncBackend, Event, Notice, Receive, RunningTrace
from nnsight_vllm.trace.naming import names_of_saves
from nnsight_vllm.trace.recorded_trace import Invoke, raise_all
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.stream import Stream, ended
from nnsight_vllm.trace.tracer import Tracer

_UNSET = "this value exists when its trace has run: `await` the tracer, or iterate over its `stream()`"
_LEFT = "its trace was left before the end"


class AsyncTracer(Tracer):
    """The context of a trace in async mode. It runs once."""

    _is_due = False  # recorded, and not run

    def __init__(
        self,
        backend: AsyncBackend,
        inputs: tuple[object, ...],
        arguments: dict[str, object],
        standing: Standing | None = None,
    ) -> None:
        self._engine = backend
        self._names: list[dict[str, list[str]]] = []
        super().__init__(backend, inputs, arguments, runs=False, standing=standing)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        is_over = super().__exit__(kind, error, trace)
        self._is_due = is_over
        for recorder in self.recorders:
            recorder.unset = _UNSET
        return is_over

    def add(self, invoke: Invoke) -> None:
        is_new = invoke not in self.invokes
        super().add(invoke)
        frame = self.frame if invoke is self._only else invoke.frame
        names = names_of_saves(invoke.recorder, frame)
        if is_new:
            self._names.append(names)
        else:
            self._names[self.invokes.index(invoke)] |= names

    # -- running -----------------------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """Start the trace; iterate over its events with `async for`. Leaving early ends its requests.

        Errors are raised when all requests are over, as by `await tracer`.
        """
        return Stream(self._start, self._event, self._finish, self._leave)

    def __await__(self) -> Generator[Any, None, None]:
        """Run the trace to its end."""
        return self._wait().__await__()

    async def _wait(self) -> None:
        run = self._start()
        try:
            await ended(run)
        except BaseException:  # cancelled, timed out, or thrown away
            self._leave(run)
            raise
        self._finish(run)

    def _start(self, receive: Receive | None = None) -> RunningTrace:
        """Send the requests off."""
        if not self._is_due:
            raise RefusedError(f"the trace recorded at {self.line} has run already, or failed; {user_line()}")
        self._is_due = False
        return self._engine.start(self.requests(), self.tensors, receive)

    def _finish(self, run: RunningTrace) -> None:
        """The requests are over: give names and proxies their values. Raises what failed."""
        try:
            errors = self.settle(run.outcomes.result())
            deliver(self.frame)
            raise_all(errors, "of the trace")
        finally:
            self.fail_recorders()
            self._forget_frames()

    def _leave(self, run: RunningTrace) -> None:
        """Nobody waits for the run any more."""
        run.abort()
        for recorder in self.recorders:
            recorder.why_failed = _LEFT
        self.fail_recorders()
        self._forget_frames()

    def _event(self, notice: Notice) -> Event:
        """A notice in the user's terms."""
        names = self._names[notice.request]
        values = {name: value for slot, value in notice.values.items() for name in names.get(slot, [slot])}
        if notice.result is not None:
            values.update(dict.fromkeys(names.get("result", ()), notice.result))
        failure = None if notice.failure is None else self.invokes[notice.request].error_of(notice.failure)
        return Event(
            notice.request,
            notice.sample,
            notice.text,
            notice.token_ids,
            values,
            frozenset(name for slot in notice.replaced for name in names.get(slot, [slot])),
            notice.logs,
            notice.finish_reason,
            failure,
            notice.restarted,
        )

    def _forget_frames(self) -> None:
        """They would keep alive whatever their functions had."""
        for recording in (self, *self.invokes):
            for name in ("frame", "_body"):
                recording.__dict__.pop(name, None)

    def __del__(self) -> None:
        if self._is_due and self.invokes:
            warnings.warn(
                f"the trace recorded at {self.line} was never run: `await` the tracer, or iterate over its `stream()`",
                RuntimeWarning,
                stacklevel=1,
            )
