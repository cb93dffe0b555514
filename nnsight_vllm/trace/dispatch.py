"""What rewritten control flow talks to: the recorder of whichever invoke is open when a proxy turns up."""

from __future__ import annotations

from nnsight_vllm.trace.flow import Flow, can_merge
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorder import current
from nnsight_vllm.trace.scope import CondHandle, LoopHandle


class Dispatch:
    """A `BlockRecorder`."""

    def is_proxy(self, value: object) -> bool:
        return isinstance(value, Proxy) and not value._is_done

    def can_merge(self, value: object) -> bool:
        return can_merge(value)

    def begin_cond(self, test: object) -> CondHandle:
        return _flow().begin_cond(test)

    def begin_else(self, handle: CondHandle) -> None:
        _flow().begin_else(handle)

    def end_cond(self, handle: CondHandle, pairs: list[tuple[object, object]]) -> list[object]:
        return _flow().end_cond(handle, pairs)

    def begin_loop(self, over: object, inits: list[object]) -> tuple[LoopHandle, object, list[object]]:
        return _flow().begin_loop(over, inits)

    def end_loop(self, handle: LoopHandle, values: list[object]) -> list[object]:
        return _flow().end_loop(handle, values)

    def logical_not(self, value: object) -> object:
        return _flow().logical_not(value)


def _flow() -> Flow:
    return current("control flow over a value").flow
