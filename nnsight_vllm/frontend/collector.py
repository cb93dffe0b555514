"""Takes what workers send home off the engine's outputs, gives it to who listens, and ends requests that stopped or failed.

The deltas ride as byte tensors in `pooling_output`, a field that generating requests never use; they are taken off
before vLLM's output processor looks at them. Who listens is known by an id that is made here, before the engine sees the
request: several may go by the name that a client chose.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from nnsight_vllm.frontend.listener import Listener, StepListener
from nnsight_vllm.graph.codec import decode_deltas
from nnsight_vllm.graph.results import Delta

_senders: ContextVar[deque[Listener] | None] = ContextVar("senders", default=None)


class Collector:
    """Wraps one engine's output processor, and how it names requests. Requests without a listener are somebody else's."""

    def __init__(self, core: Any) -> None:
        inputs, self._processor = core.input_processor, core.output_processor
        self._assign_id, self._process = inputs.assign_request_id, self._processor.process_outputs
        self._listeners: dict[str, Listener] = {}
        inputs.assign_request_id = self._name
        self._processor.process_outputs = self._process_outputs

    @contextmanager
    def sending(self, *listeners: Listener) -> Iterator[None]:
        """The requests that this task or thread gives to vLLM in here are theirs, one each, in this order."""
        senders = deque(listeners)
        token = _senders.set(senders)
        try:
            yield
        finally:
            _senders.reset(token)
            senders.clear()  # tasks that vLLM began meanwhile live on with this context

    def forget(self, *listeners: Listener) -> None:
        """They don't listen any more, whether their requests were sent or not."""
        for listener in listeners:
            self._listeners.pop(listener.id, None)

    @property
    def pending(self) -> int:
        """Requests that somebody listens to."""
        return len(self._listeners)

    # -- in the place of vLLM's own, which does the rest -----------------------------------------------------------------

    def _name(self, request: Any) -> None:
        """vLLM's own ids of requests with one name differ in 32 random bits, or not at all if the environment says so."""
        self._assign_id(request)
        request.request_id = f"{request.external_req_id}-{uuid.uuid4().hex}"
        if senders := _senders.get():
            listener = senders.popleft()
            listener.id = request.request_id
            self._listeners[listener.id] = listener

    def _process_outputs(self, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        ended = [one.request_id for one in outputs if one.pooling_output is not None and self._take_off(one)]
        heard = self._heard(outputs) if self._listeners else {}
        processed = self._process(outputs, *args, **kwargs)
        processed.reqs_to_abort.extend(ended)
        for queue, listener in heard.items():
            # vLLM merges a request's outputs where their consumer is slow: this one is still alone.
            if queue.output is not None and not isinstance(queue.output, Exception) and not queue.output.finished:
                listener.hear(queue.get_nowait())
        return processed

    def _take_off(self, output: Any) -> bool:
        """Read the delta on an output. Returns whether the engine must still be told to end the request."""
        state = self._processor.request_states.get(output.request_id)
        if state is None or state.detokenizer is None:
            return False
        data, output.pooling_output = output.pooling_output, None
        deltas = decode_deltas(memoryview(data.numpy()))
        if (listener := self._listener(state)) is not None:
            for delta in deltas:
                listener.collect(state.request_index, delta)
        last = next((delta for delta in deltas if delta.stopped or delta.failure is not None), None)
        return last is not None and _end(output, last)

    def _heard(self, outputs: list[Any]) -> dict[Any, StepListener]:
        """The queues that these outputs go to, of requests whose listeners want every step."""
        found: dict[Any, StepListener] = {}
        for output in outputs:
            state = self._processor.request_states.get(output.request_id)
            listener = None if state is None else self._listener(state)
            if isinstance(listener, StepListener):
                found[state.queue] = listener
        return found

    def _listener(self, state: Any) -> Listener | None:
        """Who listens to a sample's request."""
        return self._listeners.get((state.parent_req or state).request_id)


def _end(output: Any, delta: Delta) -> bool:
    """Make the output the request's last one. `abort` keeps the detokenizer from dropping the last token as a stop."""
    from vllm.v1.engine import FinishReason

    if not delta.keep_token:
        output.new_token_ids = []
        output.new_logprobs = None
    is_running = output.finish_reason is None
    output.finish_reason = FinishReason.ABORT
    return is_running
