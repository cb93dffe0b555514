"""When an evicted request starts again, and that nobody waits for what can't come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from nnsight_vllm.frontend.retry import Turnover


async def settled(task: asyncio.Task[bool]) -> bool:
    """Whether it is done once everything that can run has run."""
    for _ in range(3):
        await asyncio.sleep(0)
    return task.done()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def test_one_that_was_evicted_alone_has_no_hope() -> None:
    async def main() -> None:
        turnover = Turnover()
        since = turnover.enter()
        turnover.leave(is_evicted=True)
        assert not await turnover.next(since)

    run(main())


def test_an_evicted_one_waits_for_the_end_of_another() -> None:
    async def main() -> None:
        turnover = Turnover()
        turnover.enter()
        since = turnover.enter()
        turnover.leave(is_evicted=True)
        waiting = asyncio.ensure_future(turnover.next(since))
        assert not await settled(waiting)
        turnover.leave(is_evicted=False)
        assert await waiting

    run(main())


def test_what_has_ended_meanwhile_has_left_room() -> None:
    async def main() -> None:
        turnover = Turnover()
        turnover.enter()
        since = turnover.enter()
        turnover.leave(is_evicted=False)
        turnover.leave(is_evicted=True)
        assert await turnover.next(since)

    run(main())


def test_nobody_waits_for_others_that_wait_too() -> None:
    async def main() -> None:
        turnover = Turnover()
        first, second = turnover.enter(), turnover.enter()
        turnover.leave(is_evicted=True)
        waiting = asyncio.ensure_future(turnover.next(first))
        assert not await settled(waiting)
        turnover.leave(is_evicted=True)
        assert await waiting
        assert not await turnover.next(second)

    run(main())
