"""Every step of a request is heard by itself and by its own listener, however far the engine is ahead of those who wait for it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_core import Core, step
from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector

from nnsight_vllm.frontend.collector import Collector
from nnsight_vllm.frontend.listener import Listener, StepListener
from nnsight_vllm.trace.events import Notice


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
