"""Every step of a request is heard by itself, however far the engine is ahead of those who wait for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from nnsight_vllm.frontend.attempt import Attempt
from nnsight_vllm.frontend.listening import ListenedCollector
from nnsight_vllm.graph.codec import encode_delta
from nnsight_vllm.graph.results import Delta, ListValue, Saved
from nnsight_vllm.trace.events import Notice


class Processor:
    """Stands for vLLM's output processor: puts all tokens so far into the request's queue."""

    def __init__(self) -> None:
        self.queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, "r-0")
        state = SimpleNamespace(
            external_req_id="r", parent_req=None, request_index=0, detokenizer=object(), queue=self.queue
        )
        self.request_states: dict[str, Any] = {"r-0": state}
        self.tokens: list[int] = []

    def process_outputs(self, outputs: list[Any]) -> Any:
        for output in outputs:
            self.tokens += output.new_token_ids
            is_last = output.finish_reason is not None
            reason = "length" if is_last else None
            completion = CompletionOutput(0, "x" * len(self.tokens), self.tokens, None, None, finish_reason=reason)
            self.queue.put(RequestOutput("r", None, [1], None, [completion], finished=is_last))
        return SimpleNamespace(reqs_to_abort=[])


def step(number: int, reason: Any = None) -> Any:
    """One engine output: a token, and a saved list that grows."""
    saved = Saved("s0", ListValue([number]), append=number > 0)
    data = encode_delta(Delta([saved], logs=[f"line {number}"]))
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return SimpleNamespace(
        request_id="r-0", new_token_ids=[number], new_logprobs=None, finish_reason=reason, pooling_output=message
    )


def refuse(error: Exception) -> None:
    raise error


def test_steps_that_nobody_read_in_between_are_heard_one_by_one() -> None:
    notices: list[Notice] = []
    processor = Processor()
    collector: Any = ListenedCollector(processor)
    attempt = Attempt(4, notices.append, refuse)
    collector.listen("r", attempt)
    for number in range(3):
        processor.process_outputs([step(number)])
    processor.process_outputs([step(3, "length")])
    assert [(p.request, p.text, p.token_ids, p.values, p.logs) for p in notices] == [
        (4, "x", (number,), {"s0": [number]}, (f"line {number}",)) for number in range(3)
    ]
    outcome, last = attempt.outcome(processor.queue.get_nowait())
    assert [(p.token_ids, p.values, p.finish_reason) for p in last] == [((3,), {"s0": [3]}, "length")]
    assert outcome.samples[0].values == {"s0": [0, 1, 2, 3]}
    assert outcome.result.token_ids == [0, 1, 2, 3]


def test_who_wants_the_end_only_is_left_alone() -> None:
    processor = Processor()
    collector: Any = ListenedCollector(processor)
    attempt = Attempt(0, None, refuse)
    collector.listen("r", attempt)
    processor.process_outputs([step(0)])
    processor.process_outputs([step(1, "length")])
    outcome, notices = attempt.outcome(processor.queue.get_nowait())
    assert (outcome.samples[0].values, notices) == ({"s0": [0, 1]}, [])


def test_what_goes_wrong_for_one_listener_is_its_own() -> None:
    errors: list[Exception] = []
    processor = Processor()
    collector: Any = ListenedCollector(processor)
    attempt = Attempt(0, lambda notice: refuse(RuntimeError("the loop is closed")), errors.append)
    collector.listen("r", attempt)
    processor.process_outputs([step(0)])
    collector.forget("r")
    collector.listen("r", Attempt(0, None, errors.append))
    processor.process_outputs([step(1)])  # continues a list that this one doesn't know
    assert [str(error) for error in errors] == [
        "the loop is closed",
        "the engine sent a continuation of s0, which isn't a list",
    ]


@pytest.mark.parametrize("wants_steps", [True, False])
def test_requests_of_others_pass(wants_steps: bool) -> None:
    processor = Processor()
    collector: Any = ListenedCollector(processor)
    collector.listen("somebody", Attempt(0, (lambda notice: None) if wants_steps else None, refuse))
    processor.process_outputs([step(0)])
    assert processor.queue.get_nowait().outputs[0].token_ids == [0]
