"""`VLLM.connect(url, mode="async")` against the routes on a real HTTP server; the engine is a toy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from toy_server import ToyServer

from nnsight_vllm import VLLM
from nnsight_vllm.errors import AdmissionError, BusyError, ConnectionFailed, EngineSettingError, InterventionError
from nnsight_vllm.remote import engine as remote_engine
from nnsight_vllm.remote.async_engine import pieces

PROMPT = [1, 2, 3]


@pytest.fixture
def server() -> Iterator[ToyServer]:
    with ToyServer() as running:
        yield running


@pytest.fixture
def model(server: ToyServer) -> Iterator[VLLM]:
    with VLLM.connect(server.url, mode="async") as connected:
        yield connected


async def total(model: VLLM, rows: int) -> float:
    with model.trace([1] * rows, max_tokens=1) as tracer:
        found = model[0].output.sum().save()
    await tracer
    return float(found)


def test_traces_of_many_tasks_are_awaited(model: VLLM) -> None:
    async def main() -> list[float]:
        return await asyncio.gather(*(total(model, rows) for rows in range(1, 9)))

    assert asyncio.run(main()) == [4.0 * rows for rows in range(1, 9)]


def test_a_stream_brings_steps_and_at_last_the_values(model: VLLM) -> None:
    async def main() -> None:
        with model.trace(PROMPT, max_tokens=3) as tracer:
            pair = model[0].output.topk(2).save()
            tracer.log("hello")
            done = tracer.result.save()
        events = [event async for event in tracer.stream()]
        assert "".join(event.text for event in events) == "0 0 0"
        assert [event.finish_reason for event in events] == [None, None, "length"]
        last = events[-1]
        assert last.logs == ("hello",) and last.values["done"].token_ids == [0, 0, 0] == done.token_ids
        assert torch.equal(last.values["pair"].values, pair.values)

    asyncio.run(main())


def test_a_trace_that_is_left_ends_in_the_engine(model: VLLM, server: ToyServer) -> None:
    server.engine.is_stuck = True

    async def main() -> None:
        with model.trace(PROMPT, max_tokens=3) as tracer:
            model[0].output.save()
        stream = tracer.stream()
        await asyncio.to_thread(server.engine.is_running.wait, 30)
        await stream.aclose()
        with model.trace(PROMPT, max_tokens=3) as tracer:
            model[0].output.save()
        server.engine.is_running.clear()
        waiting = asyncio.ensure_future(wait_for(tracer))
        await asyncio.to_thread(server.engine.is_running.wait, 30)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    assert len(server.engine.runs) == 2
    for run in server.engine.runs:
        assert run.is_aborted.wait(10)


async def wait_for(tracer: object) -> None:
    await tracer  # type: ignore[misc]


def test_a_model_that_is_closed_fails_what_still_runs(server: ToyServer) -> None:
    server.engine.is_stuck = True

    async def main() -> None:
        model = VLLM.connect(server.url, mode="async")
        waiting = asyncio.ensure_future(total(model, 1))
        await asyncio.to_thread(server.engine.is_running.wait, 30)
        await asyncio.to_thread(model.close)
        with pytest.raises(InterventionError, match="was closed while the trace ran"):
            await waiting

    asyncio.run(main())


def test_errors_are_those_of_sync_mode(model: VLLM, server: ToyServer) -> None:
    async def refused() -> None:
        with model.trace([1] * 40) as tracer:
            model[0].output[:] = 0
        await tracer

    async def failing() -> None:
        with model.trace(PROMPT) as tracer:
            late = model[0].output[model[0].output.sum().int() + 100]
            late.save()
        await tracer

    with pytest.raises(AdmissionError, match=r"one step.*test_remote_async\.py:\d+"):
        asyncio.run(refused())
    with pytest.raises(InterventionError, match=r"IndexError.*test_remote_async\.py:\d+"):
        asyncio.run(failing())
    server.concurrent.num_refused = 1
    assert asyncio.run(total(model, 1)) == 4.0
    server.concurrent.num_refused = 2
    with pytest.raises(BusyError):
        asyncio.run(total(model, 1))
    server.engine.error = InterventionError("the engine was closed while the trace ran")
    with pytest.raises(ConnectionFailed, match="was closed"):
        asyncio.run(total(model, 1))
    server.engine.error = AdmissionError("the engine refuses the request: no")
    with pytest.raises(AdmissionError, match=r"refuses the request.*test_remote_async\.py"):
        asyncio.run(total(model, 1))


def test_large_tensors_are_uploaded_and_again_when_forgotten(
    model: VLLM, server: ToyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "SMALL", 0)
    vector = torch.ones(4)

    async def main() -> None:
        with model.trace(PROMPT, max_tokens=1) as tracer:
            seen = (model[0].output + vector).save()
        await tracer
        assert seen.tolist() == [[2.0] * 4] * 3

    asyncio.run(main())
    server.tensors.data.clear()
    asyncio.run(main())
    assert server.tensors.num_puts == 2


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(EngineSettingError, match=r"mode='eventually'.*'sync' or 'async'"):
        VLLM.connect("http://localhost:1", mode="eventually")


def test_frames_are_whole_however_they_are_cut() -> None:
    frames = [b"a", b"", b"bcd" * 100]
    data = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)

    async def chunks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    async def whole(size: int) -> list[bytes]:
        return [piece async for piece in pieces(chunks(size))]

    for size in (1, 3, 5, 1000):
        assert asyncio.run(whole(size)) == frames
