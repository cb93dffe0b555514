"""A request that runs through vLLM's own handlers: whose values it gets, and what is heard of it where the engine evicts it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fake_core import Core, eviction, step

from nnsight_vllm.frontend.collector import Collector
from nnsight_vllm.frontend.retry import RestartPolicy
from nnsight_vllm.frontend.served_engine import Heard, ServedEngine
from nnsight_vllm.trace.backend import Prompt, Request


class Served(ServedEngine):
    """On a fake of vLLM's front end. `sent`: the ids of samples, by request in the order of sending."""

    def __init__(self) -> None:
        self.core = Core()
        self.collector = Collector(self.core)
        self.restarts = RestartPolicy()
        self.sent: list[str] = []
        self._num_carried = 0

    def sendable(self, request: Request, tensors: dict[str, bytes], tied: object) -> tuple[Any, Any]:
        return None, None

    async def generate(self, prompt: Any, params: Any, id: str) -> AsyncGenerator[Any, None]:
        queue, (own,) = self.core.add(id)
        self.sent.append(own)
        is_over = False
        while not is_over:
            output = await queue.get()
            is_over = bool(output.finished)
            yield output

    def carry(self, id: str = "r") -> AsyncGenerator[Heard, None]:
        return self.carried(self.generate, id, Request(Prompt(1, None, None), None, b""), {})

    async def until_sent(self, count: int) -> None:
        while len(self.sent) < count:
            await asyncio.sleep(0)

    def step(self, *outputs: Any) -> None:
        for output in outputs:
            self.core.output_processor.process_outputs([output])

    def assert_free(self) -> None:
        assert not (self.collector.pending or self.restarts.num_running or self._num_carried)


async def collected(heard_ones: AsyncGenerator[Heard, None]) -> list[Heard]:
    return [heard async for heard in heard_ones]


def values(heard_ones: list[Heard]) -> list[object]:
    return [item for heard in heard_ones for fresh in heard.fresh.values() for item in fresh.values.get("s0", [])]  # type: ignore[attr-defined]


def on_a_loop(main: Callable[[Served], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        served = Served()
        await main(served)
        served.assert_free()

    asyncio.run(run())


def test_requests_of_one_id_get_their_own_values() -> None:
    async def main(served: Served) -> None:
        both = [asyncio.ensure_future(collected(served.carry())) for _ in range(2)]
        await served.until_sent(2)
        first, second = served.sent
        served.step(
            step(first, 0), step(second, 0), step(second, 1), step(first, 1, "length"), step(second, 2, "length")
        )
        found = [await one for one in both]
        assert [values(heard_ones) for heard_ones in found] == [[0, 1], [0, 1, 2]]
        assert {heard.output.request_id for heard_ones in found for heard in heard_ones} == {"r"}

    on_a_loop(main)


def test_one_that_is_evicted_unheard_starts_again_when_another_has_ended() -> None:
    async def main(served: Served) -> None:
        other, own = (asyncio.ensure_future(collected(served.carry(id))) for id in ("other", "own"))
        await served.until_sent(2)
        served.step(eviction(served.sent[1]), step(served.sent[0], 0, "length"))
        await served.until_sent(3)
        served.step(step(served.sent[2], 0, "length"))
        (heard,) = await own
        assert (heard.failure, heard.output.request_id, values([heard])) == (None, "own-1", [0])
        assert served.restarts.num_restarted == 1
        await other

    on_a_loop(main)


def test_one_that_is_evicted_alone_tells_why() -> None:
    async def main(served: Served) -> None:
        own = asyncio.ensure_future(collected(served.carry()))
        await served.until_sent(1)
        served.step(eviction(served.sent[0]))
        (heard,) = await own
        assert heard.failure is not None and heard.failure.retryable
        assert served.restarts.num_restarted == 0

    on_a_loop(main)


def test_one_that_was_heard_of_does_not_start_again() -> None:
    async def main(served: Served) -> None:
        other = asyncio.ensure_future(collected(served.carry("other")))
        await served.until_sent(1)
        own = served.carry()
        first = asyncio.ensure_future(anext(own))
        await served.until_sent(2)
        served.step(step(served.sent[1], 0))
        assert (await first).failure is None
        served.step(eviction(served.sent[1]), step(served.sent[0], 0, "length"))
        (last,) = await collected(own)
        assert last.failure is not None and last.failure.retryable
        await other
        assert len(served.sent) == 2

    on_a_loop(main)


def test_one_that_nobody_waits_for_any_more_leaves_nothing() -> None:
    async def main(served: Served) -> None:
        unheard = asyncio.ensure_future(collected(served.carry()))
        heard = served.carry()
        first = asyncio.ensure_future(anext(heard))
        await served.until_sent(2)
        served.step(step(served.sent[1], 0))
        await first
        await heard.aclose()
        unheard.cancel()
        await asyncio.wait([unheard])

    on_a_loop(main)
