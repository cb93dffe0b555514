"""Every step of a request is heard by itself and by its own listener, however far the engine is ahead of those who wait for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from nnsight_vllm.frontend.collector import Collector
from nnsight_vllm.frontend.listener import Listener, StepListener
from nnsight_vllm.graph.codec import encode_delta
from nnsight_vllm.graph.results import Delta, ListValue, Saved
from nnsight_vllm.trace.events import Notice


class Core:
    """Stands for vLLM's front end: names requests and puts all tokens so far of each sample into its request's queue."""

    def __init__(self) -> None:
        self.input_processor = SimpleNamespace(assign_request_id=self.assign)
        self.output_processor = SimpleNamespace(process_outputs=self.process, request_states={})
        self.tokens: dict[str, list[int]] = {}

    def assign(self, request: Any) -> None:
        request.external_req_id, request.request_id = request.request_id, f"{request.request_id}-1"

    def add(self, name: str, n: int = 1) -> tuple[RequestOutputCollector, list[str]]:
        """Its queue, and its samples' ids."""
        request = SimpleNamespace(request_id=name)
        self.input_processor.assign_request_id(request)
        queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, request.request_id)
        ids = [request.request_id] if n == 1 else [f"{i}_{request.request_id}" for i in range(n)]
        for i, id in enumerate(ids):
            self.tokens[id] = []
            self.output_processor.request_states[id] = SimpleNamespace(
                request_id=id,
                external_req_id=name,
                parent_req=request if n > 1 else None,
                request_index=i,
                detokenizer=object(),
                queue=queue,
            )
        return queue, ids

    def process(self, outputs: list[Any]) -> Any:
        for output in outputs:
            state, tokens = self.output_processor.request_states[output.request_id], self.tokens[output.request_id]
            tokens += output.new_token_ids
            is_last = output.finish_reason is not None
            reason = "length" if is_last else None
            text = "x" * len(tokens)
            completion = CompletionOutput(state.request_index, text, tokens, None, None, finish_reason=reason)
            state.queue.put(RequestOutput(state.external_req_id, None, [1], None, [completion], finished=is_last))
        return SimpleNamespace(reqs_to_abort=[])


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def collector(core: Core) -> Collector:
    return Collector(core)


def send(core: Core, collector: Collector, listener: Listener) -> tuple[RequestOutputCollector, str]:
    with collector.sending(listener):
        queue, (id,) = core.add("r")
    return queue, id


def run(core: Core, *steps: Any) -> None:
    for output in steps:
        core.output_processor.process_outputs([output])


def step(id: str, number: int, reason: Any = None) -> Any:
    """One engine output: a token, and a saved list that grows."""
    saved = Saved("s0", ListValue([number]), append=number > 0)
    data = encode_delta(Delta([saved], logs=[f"line {number}"]))
    message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return SimpleNamespace(
        request_id=id, new_token_ids=[number], new_logprobs=None, finish_reason=reason, pooling_output=message
    )


def refuse(error: Exception) -> None:
    raise error


def test_steps_that_nobody_read_in_between_are_heard_one_by_one(core: Core, collector: Collector) -> None:
    notices: list[Notice] = []
    listener = StepListener(4, notices.append, refuse)
    queue, id = send(core, collector, listener)
    run(core, *(step(id, number) for number in range(3)), step(id, 3, "length"))
    assert [(p.request, p.text, p.token_ids, p.values, p.logs) for p in notices] == [
        (4, "x", (number,), {"s0": [number]}, (f"line {number}",)) for number in range(3)
    ]
    outcome, last = listener.outcome(queue.get_nowait())
    assert [(p.token_ids, p.values, p.finish_reason) for p in last] == [((3,), {"s0": [3]}, "length")]
    assert last[0].result is outcome.result
    assert outcome.samples[0].values == {"s0": [0, 1, 2, 3]}
    assert outcome.result.token_ids == [0, 1, 2, 3]


def test_who_wants_the_end_only_is_left_alone(core: Core, collector: Collector) -> None:
    listener = Listener(refuse)
    queue, id = send(core, collector, listener)
    run(core, step(id, 0), step(id, 1, "length"))
    outcome, notices = listener.outcome(queue.get_nowait())
    assert (outcome.samples[0].values, notices) == ({"s0": [0, 1]}, [])


def test_what_goes_wrong_for_one_listener_is_its_own(core: Core, collector: Collector) -> None:
    errors: list[Exception] = []
    listener = StepListener(0, lambda notice: refuse(RuntimeError("the loop is closed")), errors.append)
    _, first = send(core, collector, listener)
    run(core, step(first, 0))
    collector.forget(listener)
    _, second = send(core, collector, Listener(errors.append))
    run(core, step(first, 1))  # nobody's any more
    run(core, step(second, 1))  # continues a list that this one doesn't know
    assert [str(error) for error in errors] == [
        "the loop is closed",
        "the engine sent a continuation of s0, which isn't a list",
    ]


@pytest.mark.parametrize("wants_steps", [True, False])
def test_requests_of_others_pass(core: Core, collector: Collector, wants_steps: bool) -> None:
    listener = StepListener(0, lambda notice: None, refuse) if wants_steps else Listener(refuse)
    send(core, collector, listener)
    queue, (id,) = core.add("r")
    run(core, step(id, 0))
    output = queue.get_nowait()
    assert isinstance(output, RequestOutput) and output.outputs[0].token_ids == [0]
    assert not listener.samples


def test_requests_of_one_name_are_heard_by_their_own_listeners(core: Core, collector: Collector) -> None:
    """Whichever ends first, and though vLLM gave them the same id."""
    listeners = [Listener(refuse) for _ in range(3)]
    with collector.sending(*listeners):
        sent = [core.add("r", n) for n in (1, 2, 1)]
    assert len({id for _, ids in sent for id in ids}) == 4 and collector.pending == 3
    run(core, step(sent[0][1][0], 0, "length"))
    collector.forget(listeners[0])
    for number in range(2):
        run(core, *(step(id, number) for _, ids in sent[1:] for id in ids))
    collector.forget(*listeners)
    values = [[listener.of(i).sample.values for i in sorted(listener.samples)] for listener in listeners]
    assert values == [[{"s0": [0]}], [{"s0": [0, 1]}] * 2, [{"s0": [0, 1]}]]
    assert not collector.pending


def test_a_listener_whose_request_was_never_sent_is_forgotten(core: Core, collector: Collector) -> None:
    listener = Listener(refuse)
    with collector.sending(listener):
        pass
    core.add("r")
    collector.forget(listener)
    assert not collector.pending and not listener.id
