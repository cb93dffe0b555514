"""Async mode on a tiny model: traces of many tasks in one batch, their events, and those that are left early.

Tolerance as in test_isolation.py: a request in a batch differs from the same one alone by the order of sums.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nv
from nnsight_vllm.errors import AdmissionError, EngineSettingError, InterventionError, RefusedError, ValueNotSetError
from nnsight_vllm.frontend.run import TraceRun
from nnsight_vllm.trace.stream import ended

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

PROMPT = [5, 17, 33, 90, 41, 7]
TOLERANCE = 1e-4
NUM_SEATS = 8
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SETTINGS: dict[str, Any] = {
    "mode": "async",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_batched_tokens": 128,
    "max_num_seqs": NUM_SEATS,
    "block_size": 32,
    "num_gpu_blocks_override": 21,  # twenty: eight short requests have room, eight of 100 tokens need 32
}


@pytest.fixture
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    engine = engines(tiny_checkpoint("llama"), **SETTINGS)
    yield engine
    engine.check_integrity()


def prompt(number: int, length: int = 0) -> list[int]:
    return [3 + (number * 31 + position * position) % 497 for position in range(length or 3 + number * 7 % 20)]


async def greedy(model: VLLM, ids: list[int] | None = None, max_tokens: int = 4) -> list[int]:
    """A plain request's tokens."""
    with model.trace(ids or PROMPT, max_tokens=max_tokens, **GREEDY) as tracer:
        result = tracer.result.save()
    await tracer
    return list(result.token_ids)


# -- events --------------------------------------------------------------------------------------------------------------


def test_the_values_of_an_iteration_come_with_its_token(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(PROMPT, max_tokens=6, logprobs=1, **GREEDY) as tracer:
            tokens = nv.list().save()
            first = model.model.layers[1].output[0].save()
            with tracer.all():
                row = model.model.layers[2].output[0][-1].save()
                tokens.append(model.samples.output)
                nv.log("drew", model.samples.output)
            done = tracer.result.save()
        events = [event async for event in tracer.stream()]
        assert [event.token_ids for event in events] == [(token,) for token in done.token_ids]
        assert [[int(token) for token in event.values["tokens"]] for event in events] == [[t] for t in done.token_ids]
        assert [event.logs for event in events] == [(f"drew tensor([{token}])",) for token in done.token_ids]
        assert "".join(event.text for event in events) == done.text
        assert [event.finish_reason for event in events] == [None] * 5 + ["length"]
        assert ["first" in event.values for event in events] == [True] + [False] * 5
        assert torch.equal(events[0].values["first"], first)
        rows = [event.values["row"] for event in events]
        assert [tuple(value.shape) for value in rows] == [(128,)] * 6
        assert torch.equal(rows[-1], row) and not torch.equal(rows[0], rows[1])
        assert events[-1].values["done"] is done
        assert len(done.logprobs) == 6 and tracer.logs == [line for event in events for line in event.logs]
        assert len(tokens) == 6
        assert not any(event.replaced or event.restarted for event in events)
        with model.trace(PROMPT, max_tokens=6, logprobs=1, **GREEDY) as tracer:
            again = tracer.result.save()
        await tracer
        assert (again.token_ids, again.text) == (done.token_ids, done.text)

    asyncio.run(main())


def test_a_list_that_changes_otherwise_than_by_growing_is_marked(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(PROMPT, max_tokens=3, **GREEDY) as tracer:
            kept = nv.list().save()
            kept.append(model.model.layers[0].output[0][-1].clone())
            with tracer.iter[1]:
                kept[0].mul_(2)
            with tracer.iter[2]:
                kept.append(model.samples.output)
        got: list[Any] = []
        marks = []
        async for event in tracer.stream():
            if "kept" in event.replaced:
                got.clear()
            got += event.values.get("kept", [])
            marks.append("kept" in event.replaced)
        assert marks == [False, True, False]
        assert len(got) == len(kept) == 2
        assert all(torch.equal(one, other) for one, other in zip(got, kept, strict=True))

    asyncio.run(main())


def test_each_sample_of_a_request_has_events_of_its_own(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(PROMPT, n=3, seed=3, temperature=1.0, max_tokens=5, ignore_eos=True) as tracer:
            tokens = nv.list().save()
            done = tracer.result.save()
            with tracer.all():
                tokens.append(model.samples.output)
        texts, ends = [""] * 3, []
        ids: list[list[int]] = [[], [], []]
        values: list[list[int]] = [[], [], []]
        async for event in tracer.stream():
            texts[event.sample] += event.text
            ids[event.sample] += event.token_ids
            values[event.sample] += [int(token) for token in event.values["tokens"]]
            ends += [event.sample] if event.finish_reason else []
        assert sorted(ends) == [0, 1, 2]
        assert texts == [output.text for output in done.outputs]
        assert ids == [output.token_ids for output in done.outputs]
        assert values == [output.token_ids for output in done.outputs]
        assert [[int(token) for token in sample] for sample in tokens] == values

    asyncio.run(main())


def test_a_consumer_that_comes_late_gets_every_step(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(PROMPT, max_tokens=60, **GREEDY) as tracer:
            rows = nv.list().save()
            with tracer.all():
                rows.append(model.model.layers[0].output[0][-1])
                norm = model.model.layers[1].output[0].norm().save()
        stream = tracer.stream()
        await ended(stream._run)  # the whole answer is there, and nothing was read
        events = [event async for event in stream]
        assert [len(event.token_ids) for event in events] == [1] * 60
        assert [len(event.values["rows"]) for event in events] == [1] * 60
        assert len({float(event.values["norm"]) for event in events}) == 60
        assert len(rows) == 60 and float(norm) == float(events[-1].values["norm"])

    asyncio.run(main())


def test_stops_and_stop_strings_end_streams(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(PROMPT, max_tokens=8, min_tokens=8, **GREEDY) as tracer:
            with tracer.iter[2]:
                last = model.model.layers[0].output[0].save()
                tracer.stop()
            stopped = tracer.result.save()
        events = [event async for event in tracer.stream()]
        assert [event.token_ids for event in events] == [(token,) for token in stopped.token_ids] + [()]
        assert (len(stopped.token_ids), events[-1].finish_reason, last.shape) == (2, "stop", (1, 128))
        with model.trace(PROMPT, max_tokens=8, **GREEDY) as tracer:
            whole = tracer.result.save()
        await tracer
        stop = whole.text[2:4]
        with model.trace(PROMPT, max_tokens=8, stop=[stop], **GREEDY) as tracer:
            cut = tracer.result.save()
        text = "".join([event.text async for event in tracer.stream()])
        assert text == cut.text == whole.text[: whole.text.index(stop)]

    asyncio.run(main())


# -- many tasks ----------------------------------------------------------------------------------------------------------

Body = Callable[["VLLM", Any], list[Any]]


def plain(model: VLLM, tracer: Any) -> list[Any]:
    return []


def reads(model: VLLM, tracer: Any) -> list[Any]:
    rows = nv.list().save()
    with tracer.all():
        rows.append(model.logits.output)
    return [rows]


def steers(model: VLLM, tracer: Any) -> list[Any]:
    vector = torch.linspace(-1, 1, 128)
    with tracer.all():
        model.model.layers[1].output[0][:] += vector
    return []


def edits_and_saves(model: VLLM, tracer: Any) -> list[Any]:
    stream = model.model.layers[1].output[0]
    stream[-1] += torch.linspace(-1, 1, 128)
    return [stream.save(), model.logits.output.save()]


def chooses(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[1]:
        model.samples.output = 77
    return []


def decides(model: VLLM, tracer: Any) -> list[Any]:
    stream = model.model.layers[1].output[0]
    with tracer.cond(stream[0].sum() > stream[-1].sum()) as condition:
        stream[-1] *= 2
    with condition.else_():
        stream[-1] *= -1
    return [stream.save()]


def stops(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[2]:
        last = model.model.layers[1].output[0].save()
        tracer.stop()
    return [last]


def fails(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[1]:
        stream = model.model.layers[1].output[0]
        stream[(stream[:, 0] > 1e9).nonzero()[0]] = 0
    return []


BODIES: list[Body] = [plain, reads, steers, edits_and_saves, chooses, decides, stops, fails]


async def run_one(model: VLLM, number: int, streams: bool) -> tuple[Any, ...]:
    """One task's trace: tokens, why it ended, saved values, how it failed; by its events where it streams."""
    body, error, tokens = BODIES[number % len(BODIES)], "", list[int]()
    with model.trace(prompt(number), max_tokens=4 + number % 5, **GREEDY) as tracer:
        saved = body(model, tracer)
        done = tracer.result.save()
    try:
        if streams:
            async for event in tracer.stream():
                tokens += event.token_ids
                error = str(event.failure or "")
        else:
            await tracer
    except InterventionError as raised:
        error = str(raised)
    assert not streams or tokens == done.token_ids
    values = [] if error else [proxy.value for proxy in saved]
    return body.__name__, list(done.token_ids), done.finish_reason, values, error


def test_thirty_tasks_at_once_each_get_what_they_get_alone(model: VLLM) -> None:
    async def main() -> None:
        together = await asyncio.gather(*(run_one(model, number, number % 3 > 0) for number in range(30)))
        for number, (name, tokens, reason, values, error) in enumerate(together):
            _, alone_tokens, alone_reason, alone, alone_error = await run_one(model, number, False)
            assert (name, tokens, reason, error) == (name, alone_tokens, alone_reason, alone_error)
            assert_close(values, alone)
        reasons = [reason for _, _, reason, _, _ in together]
        assert (reasons.count("error"), reasons.count("stop")) == (3, 3)

    asyncio.run(main())


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    else:
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max()))


def test_traces_of_different_tasks_run_as_one_group(model: VLLM) -> None:
    before = model.stats()

    async def one(number: int) -> None:
        with model.trace(prompt(number, 6), max_tokens=20, **GREEDY) as tracer:
            with tracer.all():
                model.model.layers[1].output[0][:] += 0.1 * number
        await tracer

    async def main() -> None:
        await asyncio.gather(*map(one, range(NUM_SEATS)))

    asyncio.run(main())
    after = model.stats()
    assert after.batched - before.batched > (after.alone - before.alone)
    assert after.program_misses - before.program_misses == 1


def test_several_loops_on_several_threads_share_the_engine(model: VLLM) -> None:
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = asyncio.run(greedy(model, prompt(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == [asyncio.run(greedy(model, prompt(n))) for n in range(3)]


def test_what_is_not_a_coroutine_works_inside_of_one_and_outside(model: VLLM) -> None:
    assert "layers" in repr(model)
    assert model.stats().programs >= 0

    async def main() -> None:
        with model.trace(PROMPT, max_tokens=100, **GREEDY) as tracer:
            h = model.model.layers[0].output[0]
            h += torch.full((128,), 0.25)  # a constant, held while it runs
        async with tracer.stream() as events:
            await anext(events)
            model.check_integrity()
            assert "layers" in repr(model) and model.stats().programs > 0
            assert len(await greedy(model)) == 4
        engine: Any = model._engine
        assert engine.tensors.in_use == 0

    asyncio.run(main())


def test_the_llm_serves_plain_requests_on_its_own_loop(model: VLLM) -> None:
    from vllm import SamplingParams

    async def generate() -> list[int]:
        params = SamplingParams(max_tokens=4, **GREEDY)
        outputs = [output async for output in model.llm.generate({"prompt_token_ids": PROMPT}, params, "mine")]
        return list(outputs[-1].outputs[0].token_ids)

    tokens = asyncio.run_coroutine_threadsafe(generate(), model.loop).result()
    assert tokens == asyncio.run(greedy(model))

    async def waits_for_itself() -> None:
        model.check_integrity()

    with pytest.raises(RuntimeError, match="use another thread"):
        asyncio.run_coroutine_threadsafe(waits_for_itself(), model.loop).result()


# -- errors --------------------------------------------------------------------------------------------------------------


def test_a_failure_is_raised_when_the_others_have_their_values(model: VLLM) -> None:
    async def main(streams: bool, num_failing: int) -> None:
        with model.trace(max_tokens=4, **GREEDY) as tracer:
            for _ in range(num_failing):
                with tracer.invoke(PROMPT):
                    fails(model, tracer)
            with tracer.invoke(PROMPT):
                h = model.model.layers[1].output[0].save()
                done = tracer.result.save()
        failures = []
        try:
            if streams:
                async for event in tracer.stream():
                    failures += [event] if event.failure else []
            else:
                await tracer
        except* InterventionError as group:
            assert len(group.exceptions) == num_failing
            assert all("test_async.py" in str(error) for error in group.exceptions)
        assert (h.shape, len(done.token_ids)) == ((6, 128), 4)
        assert [(event.finish_reason, event.invoke) for event in failures] == [
            ("error", i) for i in range(num_failing if streams else 0)
        ]

    for streams in (False, True):
        asyncio.run(main(streams, 1))
        asyncio.run(main(streams, 2))


def test_what_vllm_refuses_ends_the_whole_trace(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(temperature=0.0) as tracer:
            with tracer.invoke(PROMPT, max_tokens=100):
                h: Any = model.model.layers[1].output[0].save()
            with tracer.invoke(PROMPT, max_tokens=None, min_tokens=1000):
                model.model.layers[1].output[0].save()
        with pytest.raises(AdmissionError, match="min_tokens"):
            await tracer
        with pytest.raises(ValueNotSetError, match="its trace failed"):
            _ = h.value

    asyncio.run(main())


def test_an_evicted_request_starts_again_and_says_so(model: VLLM) -> None:
    before = model.stats().restarted

    async def one(number: int) -> tuple[list[int], list[Any], int]:
        with model.trace(prompt(number, 40), max_tokens=60, **GREEDY) as tracer:
            sums = nv.list().save()
            with tracer.all():
                h = model.model.layers[0].output[0]
                h[:] += 0.1
                sums.append(h[-1].sum())
            done = tracer.result.save()
        tokens: list[int] = []
        values: list[Any] = []
        num_restarts = 0
        async for event in tracer.stream():
            if event.restarted:
                tokens.clear()
                values.clear()
                num_restarts += 1
            tokens += event.token_ids
            values += event.values.get("sums", [])
        assert tokens == done.token_ids and len(values) == len(sums) == 60
        return tokens, values, num_restarts

    async def main() -> None:
        together = await asyncio.gather(*map(one, range(NUM_SEATS)))
        restarts = sum(count for _, _, count in together)
        assert model.stats().restarted - before == restarts > 0
        for number, (tokens, values, _) in enumerate(together):
            alone_tokens, alone, _ = await one(number)
            assert tokens == alone_tokens
            assert_close(torch.stack(values), torch.stack(alone))

    asyncio.run(main())


def test_values_pass_between_the_invokes_of_a_trace_and_evicted_ones_get_them_again(model: VLLM) -> None:
    before = model.stats()
    layers = model.model.layers

    async def main() -> None:
        with model.trace(max_tokens=60, **GREEDY) as tracer:
            with tracer.invoke(prompt(0, 40)):
                vector = layers[0].output[0][-1]
                saved = vector.save()
            answers = []
            for number in range(1, NUM_SEATS):
                with tracer.invoke(prompt(number, 40)):
                    with tracer.iter[2:]:
                        layers[1].output[0][-1] += 0.1 * vector
                    answers.append(tracer.result.save())
        num_restarts = 0
        async for event in tracer.stream():
            num_restarts += event.restarted
        assert model.stats().restarted - before.restarted == num_restarts > 0
        for number, answer in enumerate(answers, 1):
            with model.trace(prompt(number, 40), max_tokens=60, **GREEDY) as tracer:
                with tracer.iter[2:]:
                    layers[1].output[0][-1] += 0.1 * saved
                expected = tracer.result.save()
            await tracer
            assert answer.token_ids == expected.token_ids

    asyncio.run(main())
    assert model.stats().num_kept == 0
    with pytest.raises(RefusedError, match="make its traces invokes of one trace"):
        model.session()


# -- leaving -------------------------------------------------------------------------------------------------------------


def long(model: VLLM, number: int = 0) -> Any:
    """A trace that holds a constant, edits and saves, and runs for a hundred steps; the prompt is a step of its own."""
    with model.trace(prompt(number, 20), max_tokens=100, **GREEDY) as tracer:
        rows = nv.list().save()
        with tracer.all():
            h = model.model.layers[0].output[0]
            h[:] += torch.full((128,), 0.25 + number)
            rows.append(h[-1])
    return tracer


async def leaves_before_anything_came(model: VLLM) -> None:
    long(model).stream()
    await long(model, 1).stream().aclose()


async def breaks_at_the_first_token(model: VLLM) -> None:
    async for event in long(model).stream():
        assert len(event.token_ids) == 1
        break


async def closes_in_the_middle(model: VLLM) -> None:
    async with long(model).stream() as events:
        for _ in range(5):
            await anext(events)


async def is_cancelled(model: VLLM) -> None:
    async def consume() -> None:
        async for _ in long(model).stream():
            reached.set()

    async def wait() -> None:
        await long(model, 1)

    reached = asyncio.Event()
    tasks = [asyncio.create_task(consume()), asyncio.create_task(wait())]
    await reached.wait()
    for task in tasks:
        task.cancel()
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [
        asyncio.CancelledError
    ] * 2


async def is_out_of_time(model: VLLM) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await long(model)


async def raises_in_the_loop(model: VLLM) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in long(model).stream():
            _ = 1 / 0


async def leaves_while_it_waits_for_a_seat(model: VLLM) -> None:
    seated = [long(model, number).stream() for number in range(NUM_SEATS)]
    for stream in seated:
        await anext(stream)
    waiting = [long(model, number).stream() for number in range(3)]
    await greedy_is_sent(model)
    for stream in [*waiting, *seated]:
        assert stream in seated or stream._notices.empty()
        await stream.aclose()


async def greedy_is_sent(model: VLLM) -> None:
    """Wait until vLLM knows of all requests that were started before."""
    engine: Any = model._engine
    while len(engine._states()) < NUM_SEATS + 3:
        await asyncio.sleep(0)


async def leaves_several_samples(model: VLLM) -> None:
    with model.trace(PROMPT, n=3, temperature=1.0, max_tokens=100, ignore_eos=True) as tracer:
        model.model.layers[0].output[0][:] += 0.5
    async for _ in tracer.stream():
        break


async def leaves_while_a_long_prompt_is_computed(model: VLLM) -> None:
    """A plain prompt takes what a step of 128 tokens has left beside others, so it comes in pieces."""
    first = long(model).stream()
    await anext(first)
    with model.trace(max_tokens=5, **GREEDY) as tracer:
        for number in range(3):
            with tracer.invoke(prompt(number, 100)):
                pass
    events = tracer.stream()
    await anext(events)
    await events.aclose()
    await first.aclose()


LEAVING: list[Callable[[VLLM], Awaitable[None]]] = [
    leaves_before_anything_came,
    breaks_at_the_first_token,
    closes_in_the_middle,
    is_cancelled,
    is_out_of_time,
    raises_in_the_loop,
    leaves_while_it_waits_for_a_seat,
    leaves_several_samples,
    leaves_while_a_long_prompt_is_computed,
]


@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_nothing_stays_of_a_trace_that_is_left(
    model: VLLM, leave: Callable[[VLLM], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = asyncio.run(greedy(model))
    reasons = _note_why_requests_end(monkeypatch)

    async def main() -> None:
        await leave(model)
        model.check_integrity()
        assert_free(model)
        assert not reasons or "abort" in reasons  # not all of them ran to their ends; none where nothing was sent yet
        assert await greedy(model) == expected

    asyncio.run(main())
    assert_free(model)


def _note_why_requests_end(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reasons: list[str] = []
    last_output = TraceRun._last_output

    async def noted(self: TraceRun, *arguments: Any) -> Any:
        output = await last_output(self, *arguments)
        reasons.append(output.outputs[0].finish_reason)
        return output

    monkeypatch.setattr(TraceRun, "_last_output", noted)
    return reasons


def assert_free(model: VLLM) -> None:
    engine: Any = model._engine
    processor = model.llm.output_processor
    assert not processor.request_states and not processor.parent_requests and not processor.external_req_ids
    assert not engine.runs and not engine.collector.pending and not engine.tensors.in_use


def test_those_that_stay_in_a_group_get_what_they_get_alone(model: VLLM) -> None:
    async def stays(number: int, others_left: asyncio.Event) -> tuple[list[int], list[Any]]:
        tracer = long(model, number)
        tokens: list[int] = []
        rows: list[Any] = []
        async with tracer.stream() as events:
            async for event in events:
                tokens += event.token_ids
                rows += event.values["rows"]
                if len(tokens) == 3:
                    await others_left.wait()
        return tokens, rows

    async def main() -> None:
        others_left = asyncio.Event()
        staying = [asyncio.create_task(stays(number, others_left)) for number in (1, 3, 5)]
        leaving = [long(model, number).stream() for number in (0, 2, 4, 6)]
        for stream in leaving:
            await anext(stream)
        for stream in leaving:
            await stream.aclose()
        others_left.set()
        together = await asyncio.gather(*staying)
        for number, (tokens, rows) in zip((1, 3, 5), together, strict=True):
            alone_tokens, alone = await stays(number, others_left)
            assert tokens == alone_tokens and len(rows) == 100
            assert_close(torch.stack(rows[1:]), torch.stack(alone[1:]))
            assert_close(rows[0], alone[0])

    asyncio.run(main())


def test_memory_of_traces_that_were_left_is_there_for_the_next(model: VLLM) -> None:
    """Forty requests of three blocks each in a cache of twenty: if any kept theirs, the last ones would be evicted."""
    before = model.stats().restarted

    async def main() -> None:
        for _ in range(5):
            streams = [long(model, number).stream() for number in range(NUM_SEATS)]
            for stream in streams:
                for _ in range(15):
                    await anext(stream)
            for stream in streams:
                await stream.aclose()
        results = []
        with model.trace(max_tokens=24, **GREEDY) as tracer:
            for number in range(NUM_SEATS):
                with tracer.invoke(prompt(number, 40)):
                    model.model.layers[0].output[0][:] += 0.5
                    results.append(tracer.result.save())
        await tracer
        assert [len(result.token_ids) for result in results] == [24] * NUM_SEATS

    asyncio.run(main())
    assert model.stats().restarted == before


def test_a_consumer_whose_loop_is_gone_is_given_up(model: VLLM) -> None:
    loop = asyncio.new_event_loop()
    tracer = long(model)

    async def start() -> Any:
        stream = tracer.stream()
        await anext(stream)
        return stream

    stream = loop.run_until_complete(start())
    loop.close()
    assert isinstance(stream._run.outcomes.exception(), RuntimeError)  # waits for it
    model.check_integrity()
    assert_free(model)
    stream._is_over = True


# -- the engine ----------------------------------------------------------------------------------------------------------


def test_modes_are_two() -> None:
    with pytest.raises(EngineSettingError, match=r"mode='eventually'.*'sync' or 'async'"):
        nv.VLLM("./nowhere", mode="eventually")


def test_closing_fails_what_runs_and_a_later_trace_starts_anew(
    engines: Engines, tiny_checkpoint: Callable[[str], str]
) -> None:
    model = engines(tiny_checkpoint("llama"), **SETTINGS)
    early = long(model)

    async def main() -> None:
        stream = long(model).stream()
        await anext(stream)
        model.close()
        with pytest.raises(InterventionError, match="closed while the trace ran"):
            async for _ in stream:
                pass
        with pytest.raises(InterventionError, match="closed before the trace ran"):
            await early

    asyncio.run(main())


# -- edits ---------------------------------------------------------------------------------------------------------------


def test_tasks_with_edits_and_caches_of_their_own(model: VLLM) -> None:
    with model.edit("banned") as banned:
        model.logits.output[:, :250] = float("-inf")

    async def ask(edited: VLLM, **more: Any) -> tuple[list[int], list[int]]:
        with edited.trace(PROMPT, max_tokens=4, **GREEDY, **more) as tracer:
            cache = tracer.cache(model.samples)
            result = tracer.result.save()
        await tracer
        return list(result.token_ids), [int(token) for token in cache.samples.output]

    async def main() -> None:
        plain = await greedy(model)
        found = await asyncio.gather(ask(banned), ask(model), ask(model, edits=["banned"]), ask(model))
        for tokens, collected in found:
            assert tokens == collected
        assert found[0] == found[2] and min(found[0][0]) >= 250
        assert found[1][0] == found[3][0] == plain

    asyncio.run(main())
    del model.edits["banned"]
