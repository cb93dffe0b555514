"""`with model.session()`: several traces that run together when the session ends, and whose values meet.

A trace inside of a session is recorded when its block ends and runs with the others. What one trace recorded may be used in
another, as between the invokes of one trace; what is done to it between traces goes on in its own. Containers of the
session are Python's, their items may be values that are still to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from nnsight_vllm.errors import ControlFlowError, RefusedError
from nnsight_vllm.trace.backend import Backend
from nnsight_vllm.trace.blocks.block import Body, SkipBody, prepare_repeated
from nnsight_vllm.trace.bundle import Bundle
from nnsight_vllm.trace.deliver import deliver
from nnsight_vllm.trace.dispatch import Dispatch
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorded_trace import RecordedTrace, raise_all, run_all
from nnsight_vllm.trace.recording import is_recording
from nnsight_vllm.trace.source import user_frame, user_line

if TYPE_CHECKING:
    from typing import Self


_open: ContextVar[tuple[Session, ...]] = ContextVar("nnsight_vllm_sessions", default=())


def session_of(backend: Backend) -> Session | None:
    """The session that is open in this thread or task, if it's one of this engine."""
    return next((session for session in _open.get() if session.backend is backend), None)


def kept_by_session(container: KeptList | KeptDict) -> bool:
    """Have the open session settle a container when it ends. Whether there is one."""
    sessions = _open.get()
    if sessions:
        sessions[-1].containers.append(container)
    return bool(sessions)


class Session:
    """The context of several traces."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.bundle = Bundle(goes_on=True)
        self.traces: list[RecordedTrace] = []
        self.containers: list[KeptList | KeptDict] = []
        self._frame: FrameType

    def __enter__(self) -> Self:
        if is_recording():
            raise RefusedError(f"a session can't be opened inside a trace; {user_line()}")
        if session_of(self.backend) is not None:
            raise RefusedError(f"a session can't be opened inside another one; {user_line()}")
        self._frame = user_frame()
        _open.set((*_open.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.set(tuple(session for session in _open.get() if session is not self))
        try:
            if kind is None:
                self._run()
        finally:
            for one in self.traces:
                one.fail_recorders()

    def iter(self, items: Iterable[Any]) -> RepeatedBlock:
        """Run a block once for each item: `with session.iter(prompts) as prompt`, or `for prompt in session.iter(prompts)`."""
        return RepeatedBlock(items)

    def _run(self) -> None:
        errors = run_all(self.backend, self.traces, names=True)
        for container in self.containers:
            container.settle()
        alive = _frames_from(self._frame)
        for frame in [self._frame, *(trace.frame for trace in self.traces if trace.frame is not self._frame)]:
            if frame in alive:
                deliver(frame)
        raise_all(errors, "of the session")


class RepeatedBlock:
    """A `with` block that runs once for each item, or the items themselves."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self._body: Body | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> Any:
        frame = user_frame()
        body = prepare_repeated(frame)
        if isinstance(body, str):
            raise ControlFlowError(
                f"`with session.iter(...)` can't run its block several times here: {body}; write `for item in "
                f"session.iter(...)`; {user_line()}"
            )
        self._body = body
        body.skip(frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._body is None or kind is None or not issubclass(kind, SkipBody):
            return False
        self._body.run_each(Dispatch(), self._items)
        return True


class KeptList(list[Any]):
    """`nv.list()` between the traces of a session."""

    def save(self) -> Self:
        """A list of the session is the user's already; its values are there when the session is over."""
        return self

    def settle(self) -> None:
        self[:] = [_settled(item) for item in self]


class KeptDict(dict[Any, Any]):
    """`nv.dict()` between the traces of a session."""

    def save(self) -> Self:
        return self

    def settle(self) -> None:
        self.update({key: _settled(item) for key, item in self.items()})


def _settled(value: object) -> object:
    return value.value if isinstance(value, Proxy) and value._has_value else value


def _frames_from(frame: FrameType) -> list[FrameType]:
    """The frame and those that called it: the ones that are still running when its session ends."""
    found, at = list[FrameType](), frame
    while at is not None:
        found.append(at)
        at = at.f_back  # type: ignore[assignment]
    return found
