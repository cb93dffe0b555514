"""The routes behind `VLLM.connect` on a real HTTP server, whose engine is the toy of toy.py: no vLLM engine is started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from toy import HIDDEN, VOCAB, Toy, graph, toy_catalogue

from nnsight_vllm.client.prompts import make_prompt
from nnsight_vllm.errors import AdmissionError, UnknownEditError
from nnsight_vllm.frontend.bundling import Bundling
from nnsight_vllm.frontend.collected import Collected
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.server import traces
from nnsight_vllm.server.errors import Refused, answer_refused
from nnsight_vllm.trace.backend import Completion, Outcome, Prompt, Result
from nnsight_vllm.trace.backend import Request as Sent
from nnsight_vllm.trace.events import Notice, Receive
from nnsight_vllm.trace.source import hide_lines
from nnsight_vllm.trace.tree import Tree

__all__ = ["HIDDEN", "VOCAB", "ToyServer"]


class ToyTokenizer:
    """A token a word: its length."""

    def encode(self, text: str) -> list[int]:
        return [len(word) % VOCAB for word in text.split()]


@dataclass(frozen=True)
class ToySampling:
    max_tokens: int | None = 4
    n: int = 1
    temperature: float = 1.0
    extra_args: dict[str, Any] | None = None


@dataclass
class ToyRun:
    outcomes: Future[list[Outcome]] = field(default_factory=Future)
    is_aborted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.outcomes.set_running_or_notify_cancel()

    def abort(self) -> None:
        self.is_aborted.set()
        if not self.outcomes.done():
            self.outcomes.set_exception(RuntimeError("aborted"))


class ToyEngine:
    """Runs the requests of a trace one after the other. While `is_stuck` a run doesn't end by itself."""

    def __init__(self) -> None:
        self.tree = Tree(toy_catalogue())
        self.runs: list[ToyRun] = []
        self.requests: list[list[Sent]] = []
        self.error: Exception | None = None
        self.is_stuck = False
        self.is_running = threading.Event()

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        return make_prompt(inputs, ToyTokenizer(), VOCAB)

    def sampling(self, arguments: dict[str, Any]) -> ToySampling:
        try:
            return ToySampling(**arguments)
        except TypeError as error:
            raise AdmissionError(f"bad sampling arguments: {error}") from None

    def admit(self, request: Sent, tensors: object) -> None:
        if request.prompt.rows > 32:
            raise AdmissionError(
                f"the prompt must fit into one step: it has {request.prompt.rows} tokens; in the request"
            )

    def tenant(self, name: str) -> str:
        return f"secret:{name}"

    def stats(self) -> Stats:
        return Stats(alone=sum(map(len, self.requests)))

    def start(self, requests: list[Sent], tensors: dict[str, bytes], receive: Receive | None = None) -> ToyRun:
        run = ToyRun()
        self.runs.append(run)
        self.requests.append(requests)
        self.is_running.set()
        if not self.is_stuck:
            threading.Thread(target=self._run, args=(run, requests, tensors, receive)).start()
        return run

    def _run(self, run: ToyRun, requests: list[Sent], tensors: dict[str, bytes], receive: Receive | None) -> None:
        try:
            if self.error is not None:
                raise self.error
            outcomes = _outcomes(requests, tensors)
            _report(outcomes, receive)
            run.outcomes.set_result(outcomes)
        except Exception as error:
            run.outcomes.set_exception(error)


def _outcomes(requests: list[Sent], tensors: dict[str, bytes]) -> list[Outcome]:
    toy = Toy(modules=("double",))
    toy.store.put(tensors.values())
    related = Bundling(requests)
    links = related.links(range(len(requests)))
    found = {i: _outcome(toy, str(i), requests[i], links.get(i)) for i in related.in_order(range(len(requests)))}
    return [found[i] for i in range(len(requests))]


def _outcome(toy: Toy, name: str, request: Sent, links: Links | None) -> Outcome:
    tokens: list[int] = []
    rows = request.prompt.rows
    toy.add(name, list(request.graphs) or graph(), rows, links=links)
    for iteration in range(request.sampling.max_tokens or 4):
        toy.step(**{name: (rows, 0) if iteration == 0 else (1, rows + iteration - 1)})
        if any(delta.stopped or delta.failure for delta in toy.received.get(name, ())):
            break
        tokens.append(int(toy.tokens[0, 0]))
    sample = toy.collected.get(name, Collected()).sample
    logprobs = [{token: SimpleNamespace(logprob=-0.5, rank=1, decoded_token=str(token))} for token in tokens]
    completion = Completion(" ".join(map(str, tokens)), tokens, "length", logprobs=logprobs)
    ids = request.prompt.engine["prompt_token_ids"]
    return Outcome(Result([completion], request.prompt.text, ids, num_cached_tokens=0), [sample])


def _report(outcomes: list[Outcome], receive: Receive | None) -> None:
    if receive is not None:
        for notice in (notice for i, outcome in enumerate(outcomes) for notice in _notices(i, outcome)):
            receive(notice)


def _notices(request: int, outcome: Outcome) -> Iterator[Notice]:
    """A notice a token; all values come with the last one."""
    (sample,) = outcome.samples
    token_ids = outcome.result.token_ids
    for token in token_ids[:-1]:
        yield Notice(request, text=f"{token} ", token_ids=(token,))
    yield Notice(
        request,
        text=" ".join(map(str, token_ids[-1:])),
        token_ids=tuple(token_ids[-1:]),
        values=sample.values,
        logs=tuple(sample.logs),
        finish_reason="length",
        failure=sample.failure,
        result=outcome.result,
    )


@dataclass(frozen=True)
class ToyLimits:
    graph_nodes: int = 200
    trace_nodes: int = 2000
    trace_requests: int = 64
    constant_bytes: int = 1 << 22
    body_bytes: int = 1 << 22


class ToyTensors:
    def __init__(self) -> None:
        self.data: dict[tuple[str, str], bytes] = {}
        self.num_puts = 0

    def by_digest(self, tenant: str, digest: str) -> bytes | None:
        return self.data.get((tenant, digest))


class ToyConcurrent:
    """Refuses the next `num_refused` requests."""

    num_refused = 0
    retry_after = "0"

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        if self.num_refused:
            self.num_refused -= 1
            headers = {"Retry-After": self.retry_after}
            raise Refused("too many requests", status=HTTPStatus.TOO_MANY_REQUESTS, headers=headers)
        yield


class ToyServer:
    """Answers at `url` while its block is open. With `key` it wants that."""

    def __init__(self, key: str | None = None) -> None:
        self.engine = ToyEngine()
        self.tensors = ToyTensors()
        self.concurrent = ToyConcurrent()
        self.edits: dict[str, Any] = {}
        self.asked: list[str] = []  # the paths of requests
        self.url = ""
        self._server = uvicorn.Server(uvicorn.Config(self._app(key), port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self) -> ToyServer:
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _app(self, key: str | None) -> FastAPI:
        app = FastAPI()
        app.state.interventions = SimpleNamespace(
            engine=self.engine,
            base_names=["toy"],
            limits=ToyLimits(),
            tenants=SimpleNamespace(of=lambda request: ""),
            tensors=self.tensors,
            concurrent=self.concurrent,
        )

        async def hide() -> None:
            hide_lines()

        app.include_router(traces.router, dependencies=[Depends(hide)])
        app.exception_handler(Refused)(answer_refused)

        @app.middleware("http")
        async def look(request: Request, call_next: Any) -> Any:
            self.asked.append(request.url.path)
            if key is not None and request.headers.get("authorization") != f"Bearer {key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

        @app.put("/v1/interventions/tensors/{name}")
        async def put(name: str, request: Request) -> JSONResponse:
            data = await request.body()
            assert digest(data) == name
            self.tensors.data["", name] = data
            self.tensors.num_puts += 1
            return JSONResponse({})

        @app.post("/v1/interventions/edits")
        async def edit(request: Request) -> JSONResponse:
            body = await request.json()
            self.edits[body["name"]] = body["intervention"]
            return JSONResponse({})

        @app.delete("/v1/interventions/edits/{name}")
        async def forget(name: str) -> JSONResponse:
            if name not in self.edits:
                raise Refused(f"no edit {name!r}", status=HTTPStatus.NOT_FOUND, kind=UnknownEditError.__name__)
            del self.edits[name]
            return JSONResponse({})

        @app.post("/detokenize")
        async def detokenize(request: Request) -> JSONResponse:
            return JSONResponse({"prompt": " ".join("x" * id for id in (await request.json())["tokens"])})

        return app
