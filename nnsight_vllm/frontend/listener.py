"""Who waits for one go of one request through vLLM: keeps what its samples send home, and makes notices of it step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nnsight_vllm.frontend.collected import Collected, Fresh
from nnsight_vllm.graph.results import Delta
from nnsight_vllm.trace.backend import Completion, Outcome, Result
from nnsight_vllm.trace.events import Notice, Receive


class Listener:
    """Keeps what comes. `fail` gets what goes wrong with it, since to raise would end the engine's output for everybody.

    `id` is vLLM's own for the request, once it's sent.
    """

    id = ""

    def __init__(self, fail: Callable[[Exception], None], keeps_fresh: bool = False) -> None:
        self.samples: dict[int, Collected] = {}
        self._fail = fail
        self._keeps_fresh = keeps_fresh

    def collect(self, sample: int, delta: Delta) -> None:
        """What a step of a sample sent home."""
        try:
            self.of(sample).add(delta)
        except Exception as error:
            self._fail(error)

    def of(self, sample: int) -> Collected:
        if sample not in self.samples:
            self.samples[sample] = Collected(fresh=Fresh() if self._keeps_fresh else None)
        return self.samples[sample]

    def outcome(self, output: Any) -> tuple[Outcome, list[Notice]]:
        """What became of the request, and the notices that nobody was told yet; `output` is the last one."""
        collected = [self.of(completion.index) for completion in output.outputs]
        for found in collected:
            found.read_sheets()
        return outcome_of(output, collected), []


class StepListener(Listener):
    """Tells `receive` of each step. `request` is the request's index in the trace."""

    def __init__(self, request: int, receive: Receive, fail: Callable[[Exception], None]) -> None:
        super().__init__(fail, keeps_fresh=True)
        self._request = request
        self._receive = receive
        self._latest: dict[int, Any] = {}  # vLLM's completions, each with all of its sample so far
        self._told: dict[int, tuple[int, int]] = {}  # characters and tokens

    def hear(self, output: Any) -> None:
        """vLLM's output of a step that isn't the last one."""
        try:
            for notice in list(self._notices(output)):
                self._receive(notice)
        except Exception as error:
            self._fail(error)

    def outcome(self, output: Any) -> tuple[Outcome, list[Notice]]:
        notices = list(self._notices(output))
        output.outputs = [self._latest[sample] for sample in sorted(self._latest)]
        outcome, _ = super().outcome(output)
        if notices:
            notices[-1] = replace(notices[-1], result=outcome.result)
        return outcome, notices

    def _notices(self, output: Any) -> Iterator[Notice]:
        for completion in output.outputs:
            self._latest[completion.index] = completion
            found = self.of(completion.index)
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


def outcome_of(output: Any, collected: list[Collected]) -> Outcome:
    """What became of a request; `output` is vLLM's, with all its samples."""
    completions = [_completion(sample, found) for sample, found in zip(output.outputs, collected, strict=True)]
    result = Result(
        completions, output.prompt, list(output.prompt_token_ids), output.prompt_logprobs, output.num_cached_tokens
    )
    return Outcome(result, [found.sample for found in collected])


def reason_of(reason: str | None, found: Collected) -> str | None:
    """Why a sample ended; vLLM's own `reason` says only that we ended it."""
    if found.sample.failure is not None:
        return "error"
    return "stop" if found.is_stopped else reason


def _completion(output: Any, found: Collected) -> Completion:
    return Completion(
        text=output.text,
        token_ids=list(output.token_ids),
        finish_reason=reason_of(output.finish_reason, found),
        stop_reason=output.stop_reason,
        logprobs=output.logprobs,
        cumulative_logprob=output.cumulative_logprob,
    )
