"""Traces that are recorded now and run later: names, values, contexts, and what happens to those that nobody waits for."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from fake_async import FakeAsyncModel
from fake_model import FakeModel

import nnsight_vllm as nv
from nnsight_vllm.errors import InterventionError, RefusedError, ValueNotSetError
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.trace.backend import Completion, Result
from nnsight_vllm.trace.events import Event, Notice

PROMPT = "four words of prompt"


def test_after_await_names_and_proxies_have_their_values() -> None:
    async def main() -> None:
        model = FakeAsyncModel(s0=10, s1=20)
        with model.trace(PROMPT) as tracer:
            a = model.model.layers[0].output[0].save()
            kept = {"b": model.model.norm.output.save()}
            done = tracer.result.save()
        assert model.backend.runs == []
        await tracer
        assert (a, done.text, kept["b"].value, kept["b"] + 1) == (10, "text", 20, 21)
        assert type(a) is int

    asyncio.run(main())


def test_a_module_level_trace_sets_module_level_names() -> None:
    names: dict[str, Any] = {"model": FakeAsyncModel(s0=10), "prompt": PROMPT, "asyncio": asyncio}
    exec(
        "with model.trace(prompt) as tracer:\n"
        "    a = model.model.norm.output.save()\n"
        "async def main():\n"
        "    await tracer\n"
        "asyncio.run(main())\n",
        names,
    )
    assert names["a"] == 10


def test_a_function_that_has_returned_leaves_proxies_that_get_their_values() -> None:
    def record(model: FakeAsyncModel) -> tuple[Any, Any]:
        with model.trace(PROMPT) as tracer:
            a = model.model.norm.output.save()
        return tracer, a

    async def main() -> None:
        tracer, a = record(FakeAsyncModel(s0=10))
        await tracer
        assert a.value == 10

    asyncio.run(main())


def test_control_flow_over_values_is_recorded_in_coroutines() -> None:
    async def main() -> None:
        model = FakeAsyncModel(s0=5)
        with model.trace(PROMPT) as tracer:
            h = model.model.layers[0].output[0]
            out = (h * 2 if h.sum() > 0 else h * 3).save()
        await tracer
        assert "cond" in model.printed
        assert out == 5

    asyncio.run(main())


def test_a_value_asked_for_too_early_says_what_to_do() -> None:
    async def main() -> None:
        model = FakeAsyncModel(s0=10)
        with model.trace(PROMPT) as tracer:
            a: Any = model.model.norm.output.save()
        with pytest.raises(ValueNotSetError, match=r"`await` the tracer.*test_async_tracer\.py:\d+"):
            _ = a.value
        with pytest.raises(RefusedError, match="`await` the tracer"):
            _ = a + 1
        await tracer

    asyncio.run(main())


def test_a_trace_that_never_runs_is_reported_with_its_line() -> None:
    def record() -> None:
        model = FakeAsyncModel()
        with model.trace(PROMPT):
            model.model.norm.output.save()

    with pytest.warns(RuntimeWarning, match=r"test_async_tracer\.py:\d+.*was never run"):
        record()
        gc.collect()


def test_an_error_in_the_block_is_all_that_is_heard_of_it() -> None:
    model = FakeAsyncModel()
    with pytest.raises(ZeroDivisionError):
        with model.trace(PROMPT) as tracer:
            a: Any = model.model.norm.output.save()
            _ = 1 / 0
    with pytest.raises(ValueNotSetError, match="its trace failed"):
        _ = a.value
    with pytest.raises(RefusedError, match="has run already, or failed"):
        asyncio.run(wait_for(tracer))


async def wait_for(tracer: Any) -> None:
    await tracer


def test_a_trace_runs_once() -> None:
    async def main() -> None:
        model = FakeAsyncModel()
        with model.trace(PROMPT) as tracer:
            pass
        await tracer
        with pytest.raises(RefusedError, match=r"test_async_tracer\.py:\d+.* has run already"):
            await tracer
        with pytest.raises(RefusedError, match="has run already"):
            tracer.stream()

    asyncio.run(main())


def test_sync_traces_say_that_they_can_not_be_awaited_or_streamed() -> None:
    model = FakeModel()
    with model.trace(PROMPT) as tracer:
        pass
    with pytest.raises(RefusedError, match=r"mode='async'.*ran when its block ended"):
        tracer.stream()
    with pytest.raises(RefusedError, match="mode='async'"):
        asyncio.run(wait_for(tracer))
    with model.scan(PROMPT) as scanned:
        pass
    with pytest.raises(RefusedError, match="only scanned"):
        scanned.stream()


# -- tasks ---------------------------------------------------------------------------------------------------------------


def test_tasks_that_record_at_the_same_time_do_not_see_each_other() -> None:
    async def record(model: FakeAsyncModel, here: asyncio.Event, there: asyncio.Event, layer: int) -> str:
        with model.trace(PROMPT) as tracer:
            model.model.layers[layer].mlp.output.save()
            here.set()
            await there.wait()  # the other one is in its block now
            model.model.layers[layer].output[0].save()
        await tracer
        return str(tracer.graph)

    async def main() -> None:
        model, one, two = FakeAsyncModel(), asyncio.Event(), asyncio.Event()
        first, second = await asyncio.gather(record(model, one, two, 0), record(model, two, one, 2))
        assert "layers.0.mlp" in first and "layers.2" not in first
        assert "layers.2.mlp" in second and "layers.0" not in second

    asyncio.run(main())


def test_a_task_started_in_a_block_may_trace_after_it() -> None:
    async def later(model: FakeAsyncModel, over: asyncio.Event) -> Any:
        await over.wait()
        with model.trace(PROMPT) as tracer:
            a = model.model.norm.output.save()
        await tracer
        return a

    async def main() -> None:
        model, over = FakeAsyncModel(s0=10), asyncio.Event()
        with model.trace(PROMPT) as tracer:
            task = asyncio.create_task(later(model, over))
        over.set()
        assert await task == 10
        await tracer

    asyncio.run(main())


# -- events --------------------------------------------------------------------------------------------------------------


def test_events_call_values_by_the_names_of_their_block() -> None:
    result = Result([Completion("text", [1], "stop")])
    notices = [
        Notice(0, values={"s0": 1, "s1": [2]}, token_ids=(7,), text="a"),
        Notice(1, values={"s0": 3, "s2": 4}, replaced=frozenset({"s0"})),
        Notice(0, values={"s1": [5]}, finish_reason="stop", result=result),
    ]
    found: list[Event] = []

    async def main() -> None:
        model = FakeAsyncModel(*notices)
        with model.trace() as tracer:
            for _ in range(2):
                with tracer.invoke(PROMPT):
                    h = model.model.layers[0].output[0].save()
                    rows = nv.list().save()
                    both = [model.model.norm.output.save()]
                    done = tracer.result.save()
        async for event in tracer.stream():
            found.append(event)
        assert h is not None and rows is not None and both and done.text == "text"

    asyncio.run(main())
    assert [event.values for event in found] == [
        {"h": 1, "rows": [2]},
        {"h": 3, "both[0]": 4},
        {"rows": [5], "done": result},
    ]
    assert [(event.invoke, event.text, event.token_ids) for event in found] == [
        (0, "a", (7,)),
        (1, "", ()),
        (0, "", ()),
    ]
    assert found[1].replaced == {"h"}
    assert [event.finish_reason for event in found] == [None, None, "stop"]


def test_values_without_a_name_keep_that_of_their_save_and_branches_share_theirs() -> None:
    found: list[dict[str, object]] = []

    async def main() -> None:
        model = FakeAsyncModel(Notice(0, values={"s0": 1, "s3": 2}))
        with model.trace(PROMPT) as tracer:
            h = model.model.layers[0].output[0]
            (h * 1).save()
            if h.sum() > 0:
                model.model.layers[1].mlp.output[:] = 0
                out = (h * 2).save()
            else:
                out = (h * 3).save()
        found.extend([event.values async for event in tracer.stream()])
        del out

    asyncio.run(main())
    assert found == [{"s0": 1, "out": 2}]


def test_a_failure_is_an_error_with_the_line_in_its_event() -> None:
    async def main() -> None:
        model = FakeAsyncModel(Notice(0, failure=Failure("IndexError", "no such row", 0), finish_reason="error"))
        with model.trace(PROMPT) as tracer:
            model.model.layers[0].output[0].save()
        (event,) = [event async for event in tracer.stream()]
        assert isinstance(event.failure, InterventionError)
        assert "no such row" in str(event.failure) and "test_async_tracer.py" in str(event.failure)

    asyncio.run(main())


# -- leaving -------------------------------------------------------------------------------------------------------------


def recorded(model: FakeAsyncModel) -> tuple[Any, Any]:
    with model.trace(PROMPT) as tracer:
        a = model.model.norm.output.save()
    return tracer, a


async def breaks(model: FakeAsyncModel, tracer: Any) -> None:
    async for _ in tracer.stream():
        break


async def closes(model: FakeAsyncModel, tracer: Any) -> None:
    stream = tracer.stream()
    await anext(stream)
    await stream.aclose()
    await stream.aclose()


async def leaves_the_context(model: FakeAsyncModel, tracer: Any) -> None:
    async with tracer.stream() as events:
        await anext(events)


async def forgets(model: FakeAsyncModel, tracer: Any) -> None:
    tracer.stream()


async def is_cancelled_while_it_streams(model: FakeAsyncModel, tracer: Any) -> None:
    async def consume() -> None:
        async for _ in tracer.stream():
            reached.set()

    reached = asyncio.Event()
    task = asyncio.create_task(consume())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def is_cancelled_while_it_waits(model: FakeAsyncModel, tracer: Any) -> None:
    task = asyncio.create_task(wait_for(tracer))
    while not model.backend.runs:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


LEAVING = [breaks, closes, leaves_the_context, forgets, is_cancelled_while_it_streams, is_cancelled_while_it_waits]


@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_whoever_leaves_ends_the_requests(leave: Any) -> None:
    async def main() -> None:
        model = FakeAsyncModel(answers=False)
        tracer, a = recorded(model)
        start = model.backend.start

        def start_with_a_piece(*args: Any) -> Any:
            run = start(*args)
            if run.receive is not None:
                run.receive(Notice(0, text="first"))
            return run

        model.backend.__dict__["start"] = start_with_a_piece
        await leave(model, tracer)
        (run,) = model.backend.runs
        assert run.num_aborts == 1
        with pytest.raises(ValueNotSetError, match="left before the end"):
            _ = a.value

    asyncio.run(main())


def test_a_stream_that_ended_by_itself_aborts_nothing() -> None:
    async def main() -> None:
        model = FakeAsyncModel(Notice(0))
        tracer, _ = recorded(model)
        stream = tracer.stream()
        assert len([event async for event in stream]) == 1
        assert [event async for event in stream] == []
        await stream.aclose()
        del stream
        assert model.backend.runs[0].num_aborts == 0

    asyncio.run(main())


def test_an_error_of_the_engine_is_raised_by_either_way() -> None:
    async def main(streams: bool) -> None:
        model = FakeAsyncModel(answers=False)
        tracer, a = recorded(model)
        waiting = asyncio.create_task(breaks(model, tracer) if streams else wait_for(tracer))
        while not model.backend.runs:
            await asyncio.sleep(0)
        model.backend.runs[0].outcomes.set_exception(InterventionError("it is gone"))
        with pytest.raises(InterventionError, match="it is gone"):
            await waiting
        with pytest.raises(ValueNotSetError, match="its trace failed"):
            _ = a.value

    asyncio.run(main(streams=True))
    asyncio.run(main(streams=False))


def test_a_trace_that_has_run_lets_go_of_its_frame() -> None:
    class Big:
        """Something that can be referred to weakly."""

    async def main() -> tuple[Any, weakref.ref[Big]]:
        big = Big()
        tracer = FakeAsyncModel().trace(PROMPT)
        with tracer:
            pass
        await tracer
        return tracer, weakref.ref(big)

    gc.disable()
    try:
        tracer, big = asyncio.run(main())
        assert tracer.invokes and big() is None
    finally:
        gc.enable()
