"""One go of one request through vLLM's asynchronous engine: what it sends home, and the notices that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nnsight_vllm.frontend.collector import Collected, Fresh
from nnsight_vllm.frontend.engine import outcome_of, reason_of
from nnsight_vllm.graph.results import Delta
from nnsight_vllm.trace.backend import Outcome
from nnsight_vllm.trace.events import Notice, Receive


class Attempt:
    """Listens to one request. `request` is its index in the trace; what goes wrong while it listens goes to `fail`."""

    def __init__(self, request: int, receive: Receive | None, fail: Callable[[Exception], None]) -> None:
        self.wants_steps = receive is not None
        self._request = request
        self._receive = receive
        self._fail = fail
        self._collected: dict[int, Collected] = {}
        self._latest: dict[int, Any] = {}  # vLLM's completions, each with all of its sample so far
        self._told: dict[int, tuple[int, int]] = {}  # characters and tokens

    def collect(self, sample: int, delta: Delta) -> None:
        try:
            self._of(sample).add(delta)
        except Exception as error:
            self._fail(error)

    def hear(self, output: Any) -> None:
        try:
            self._tell(list(self._notices(output)))
        except Exception as error:
            self._fail(error)

    def outcome(self, output: Any) -> tuple[Outcome, list[Notice]]:
        """What became of the request, and the notices that nobody was told yet; `output` is the last one."""
        notices = list(self._notices(output)) if self.wants_steps else []
        for completion in output.outputs:
            self._latest[completion.index] = completion
        output.outputs = [self._latest[sample] for sample in sorted(self._latest)]
        collected = [self._of(completion.index) for completion in output.outputs]
        for found in collected:
            found.read_sheets()
        return outcome_of(output, collected), notices

    def _of(self, sample: int) -> Collected:
        if sample not in self._collected:
            self._collected[sample] = Collected(fresh=Fresh() if self.wants_steps else None)
        return self._collected[sample]

    def _tell(self, notices: list[Notice]) -> None:
        assert self._receive is not None
        for notice in notices:
            self._receive(notice)

    def _notices(self, output: Any) -> Iterator[Notice]:
        for completion in output.outputs:
            self._latest[completion.index] = completion
            found = self._of(completion.index)
            num_characters, num_tokens = self._told.get(completion.index, (0, 0))
            self._told[completion.index] = len(completion.text), len(completion.token_ids)
            fresh = found.take_fresh()
            reason = completion.finish_reason
            yield Notice(
                self._request,
                completion.index,
                completion.text[num_characters:],
                tuple(completion.token_ids[num_tokens:]),
                fresh.values,
                frozenset(fresh.replaced),
                tuple(fresh.logs),
                None if reason is None else reason_of(reason, found),
                None if reason is None else found.sample.failure,
            )
