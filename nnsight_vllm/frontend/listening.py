"""A collector for vLLM's asynchronous engine, which knows who waits for each request and tells them step by step.

vLLM merges a request's outputs where their consumer is slow. For those who want every step, an output is taken away while it
is still alone: right after vLLM has processed the step, before anybody else on the loop runs.
"""

from __future__ import annotations

from typing import Any, Protocol

from nnsight_vllm.frontend.collector import Collector, public_id
from nnsight_vllm.graph.results import Delta


class Listener(Protocol):
    """Who waits for a request. Neither method raises: that would end the engine's output for everybody."""

    wants_steps: bool

    def collect(self, sample: int, delta: Delta) -> None:
        """What a step of a sample sent home."""

    def hear(self, output: Any) -> None:
        """vLLM's output of a step, if it isn't the last one."""


class ListenedCollector(Collector):
    """Hands on to listeners. Requests without one are somebody else's, and what they send is dropped."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self._listeners: dict[str, Listener] = {}

    def listen(self, request_id: str, listener: Listener) -> None:
        self._listeners[request_id] = listener

    def forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)

    @property
    def pending(self) -> int:
        return len(self._listeners)

    def process_outputs(self, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        heard = self._heard(outputs) if self._listeners else {}
        processed = super().process_outputs(outputs, *args, **kwargs)
        for queue, listener in heard.items():
            output = queue.output
            if output is not None and not isinstance(output, Exception) and not output.finished:
                listener.hear(queue.get_nowait())
        return processed

    def _heard(self, outputs: list[Any]) -> dict[Any, Listener]:
        """The queues that these outputs go to, of requests whose listeners want every step."""
        found: dict[Any, Listener] = {}
        for output in outputs:
            state = self._processor.request_states.get(output.request_id)
            listener = None if state is None else self._listeners.get(public_id(state))
            if listener is not None and listener.wants_steps:
                found[state.queue] = listener
        return found

    def _keep(self, state: Any, delta: Delta) -> None:
        listener = self._listeners.get(public_id(state))
        if listener is not None:
            listener.collect(state.request_index, delta)
