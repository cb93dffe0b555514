"""The model of fake_model.py in async mode: its backend answers on a thread of its own, with the notices it was given."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from fake_model import FakeBackend, FakeModel

from nnsight_vllm.trace.async_tracer import AsyncTracer
from nnsight_vllm.trace.backend import Outcome, Request
from nnsight_vllm.trace.events import Notice, Receive


@dataclass
class FakeRun:
    """Ends when `finish` is called."""

    requests: list[Request]
    receive: Receive | None
    outcomes: Future[list[Outcome]] = field(default_factory=Future)
    num_aborts: int = 0

    def __post_init__(self) -> None:
        self.outcomes.set_running_or_notify_cancel()

    def abort(self) -> None:
        self.num_aborts += 1
        if not self.outcomes.done():
            self.outcomes.set_result([])


@dataclass
class FakeAsyncBackend(FakeBackend):
    """With `answers` a run ends by itself, after its notices; without, the test ends it."""

    notices: list[Notice] = field(default_factory=list)
    answers: bool = True
    runs: list[FakeRun] = field(default_factory=list)

    def start(self, requests: list[Request], tensors: dict[str, bytes], receive: Receive | None = None) -> FakeRun:
        run = FakeRun(requests, receive)
        self.runs.append(run)
        if self.answers:
            threading.Thread(target=self.answer, args=(run,)).start()
        return run

    def answer(self, run: FakeRun) -> None:
        for notice in self.notices if run.receive else ():
            assert run.receive is not None
            run.receive(notice)
        run.outcomes.set_result(self.run(run.requests, {}))


class FakeAsyncModel(FakeModel):
    """What `VLLM(mode="async")` is to the user."""

    def __init__(self, *notices: Notice, answers: bool = True, **values: object) -> None:
        super().__init__()
        self.__dict__["backend"] = FakeAsyncBackend(
            self.backend.tree, values=dict(values), notices=list(notices), answers=answers
        )

    @property
    def backend(self) -> FakeAsyncBackend:
        backend: FakeAsyncBackend = self.__dict__["backend"]
        return backend

    def trace(self, *inputs: object, **arguments: object) -> AsyncTracer:
        return AsyncTracer(self.backend, inputs, arguments)
