"""When an evicted request starts again, and that nobody waits for what can't come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any

from nnsight_vllm.frontend.retry import Attempt, RestartPolicy


class Running:
    """A request in the engine, until it leaves."""

    def __init__(self, policy: RestartPolicy, after: Attempt | None = None) -> None:
        self._stack = ExitStack()
        self.attempt = self._stack.enter_context(policy.attempt(after))

    def leave(self, is_evicted: bool) -> None:
        self.attempt.is_evicted = is_evicted
        self._stack.close()


async def settled(task: asyncio.Task[bool]) -> bool:
    """Whether it is done once everything that can run has run."""
    for _ in range(3):
        await asyncio.sleep(0)
    return task.done()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def test_one_that_was_evicted_alone_has_no_hope() -> None:
    async def main() -> None:
        policy = RestartPolicy()
        own = Running(policy)
        own.leave(is_evicted=True)
        assert not await policy.gets_room(own.attempt)

    run(main())


def test_one_that_stayed_has_no_other_go() -> None:
    async def main() -> None:
        policy = RestartPolicy()
        own, _ = Running(policy), Running(policy)
        own.leave(is_evicted=False)
        assert not await policy.gets_room(own.attempt)

    run(main())


def test_an_evicted_one_waits_for_the_end_of_another() -> None:
    async def main() -> None:
        policy = RestartPolicy()
        other, own = Running(policy), Running(policy)
        own.leave(is_evicted=True)
        waiting = asyncio.ensure_future(policy.gets_room(own.attempt))
        assert not await settled(waiting)
        other.leave(is_evicted=False)
        assert await waiting

    run(main())


def test_what_has_ended_meanwhile_has_left_room() -> None:
    async def main() -> None:
        policy = RestartPolicy()
        other, own = Running(policy), Running(policy)
        other.leave(is_evicted=False)
        own.leave(is_evicted=True)
        assert await policy.gets_room(own.attempt)

    run(main())


def test_nobody_waits_for_others_that_wait_too() -> None:
    async def main() -> None:
        policy = RestartPolicy()
        first, second = Running(policy), Running(policy)
        first.leave(is_evicted=True)
        waiting = asyncio.ensure_future(policy.gets_room(first.attempt))
        assert not await settled(waiting)
        second.leave(is_evicted=True)
        assert await waiting
        assert not await policy.gets_room(second.attempt)

    run(main())


def test_goes_after_the_first_are_counted() -> None:
    policy = RestartPolicy()
    first = Running(policy)
    first.leave(is_evicted=True)
    second = Running(policy, first.attempt)
    assert (second.attempt.number, policy.num_restarted, policy.num_running) == (1, 1, 1)
