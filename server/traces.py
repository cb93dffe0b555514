"""The routes behind `VLLM.connect`: what the model has, prompts and sampling before a recording, and traces that run.

A trace is msgpack both ways (`nnsight_vllm/wire/trace.py`): graphs are bytes, values are raw. Its client may go at any time; the engine
then ends all that it began.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from concurrent.futures import Future
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nnsight_vllm.client.trace_codec import encode_outcomes
from nnsight_vllm.errors import IntegrityError, NNsightError
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.graph.nodes import VERSION
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.server import journal, metrics
from nnsight_vllm.server.bodies import read_body
from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.limits import ServerLimits
from nnsight_vllm.server.state import ServerState, state_of, tenant_of
from nnsight_vllm.server.streamed import not_run, streamed_trace
from nnsight_vllm.server.trace_requests import MissingTensors, TraceReader
from nnsight_vllm.trace.backend import Outcome
from nnsight_vllm.trace.events import Receive, RunningTrace
from nnsight_vllm.trace.tree import Tree
from nnsight_vllm.wire.trace import FRAMES, MSGPACK, PREFIX, Described, Prepared

router = APIRouter(tags=["interventions"])

_ERRORS = documented(400, 409, 412, 413, 429, 503)
_ASKED = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "prompts": {"type": "array", "items": {"type": "string"}, "default": []},
        "samplings": {"type": "array", "items": {"type": "object"}, "default": []},
    },
}
_descriptions: WeakKeyDictionary[Tree, bytes] = WeakKeyDictionary()  # a large model's takes milliseconds


def _schema_of(kind: type) -> Any:
    """A message's schema, with what it refers to in it."""
    (schema,), parts = msgspec.json.schema_components([kind])

    def whole(part: Any) -> Any:
        if isinstance(part, dict) and "$ref" in part:
            return whole(parts[part["$ref"].rpartition("/")[2]])
        if isinstance(part, dict):
            return {key: whole(one) for key, one in part.items()}
        return [whole(one) for one in part] if isinstance(part, list) else part

    return whole(schema)


_GONE = 499
"""The status that nobody reads, since the client has gone."""


@router.get(f"{PREFIX}/model", responses={**documented(), 304: {"description": "The model of `If-None-Match`."}})
async def describe_model(raw_request: Request) -> Response:
    """Modules in the model's order, sites in the order in which they fire, with shapes. The ETag changes with the model."""
    content = _described(state_of(raw_request))
    tag = _tag(content)
    if raw_request.headers.get("if-none-match") == tag:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})
    return Response(content, media_type="application/json", headers={"ETag": tag})


@router.get(f"{PREFIX}/limits", responses={**documented(), 200: {"model": ServerLimits}})
async def show_limits(raw_request: Request) -> JSONResponse:
    """What a request with graphs may have at most; each limit is a flag of the server."""
    return JSONResponse(dataclasses.asdict(state_of(raw_request).limits))


@router.get(
    f"{PREFIX}/stats",
    responses={**documented(503), 200: {"content": {"application/json": {"schema": _schema_of(Stats)}}}},
)
async def show_stats(raw_request: Request) -> Response:
    """What the engine ran since it started, for all its users."""
    stats = await asyncio.to_thread(state_of(raw_request).engine.stats)
    return Response(msgspec.json.encode(stats), media_type="application/json")


@router.get(f"{PREFIX}/integrity", responses=documented(503))
async def show_integrity(raw_request: Request) -> dict[str, list[str]]:
    """What the engine still holds of requests that have ended, which is a defect: a line each, and none if all is well."""
    try:
        await asyncio.to_thread(state_of(raw_request).engine.check_integrity)
    except IntegrityError as error:
        return {"leftovers": str(error).split("; ")}
    return {"leftovers": []}


@router.post(
    f"{PREFIX}/prepare",
    responses={**_ERRORS, 200: {"content": {"application/json": {"schema": _schema_of(Prepared)}}}},
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _ASKED}}}},
)
async def prepare(raw_request: Request) -> Response:
    """Token ids of prompts, and what sampling arguments come to: `{"prompts": [[1, 2]], "samplings": [{"max_tokens": 16, "n": 1}]}`."""
    body = await read_body(raw_request, state_of(raw_request).limits.body_bytes)
    prepared = await asyncio.to_thread(_reader(raw_request).prepared, body)
    return Response(msgspec.json.encode(prepared), media_type="application/json")


@router.post(
    f"{PREFIX}/trace",
    responses={**_ERRORS, 200: {"content": {MSGPACK: {"schema": {"type": "string", "format": "binary"}}}}},
    openapi_extra={
        "requestBody": {"required": True, "content": {MSGPACK: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def trace(raw_request: Request) -> Response:
    """Run a trace: requests with graphs that may use each other's values. With `If-Match`, only on the model of that ETag.

    Where `Accept` names frames, the answer is a stream of what each step brings, and at last the outcomes.
    """
    state, tenant = state_of(raw_request), tenant_of(raw_request)
    wanted = raw_request.headers.get("if-match")
    if wanted is not None and wanted != _tag(_described(state)):
        raise Refused(
            "the server runs another model than the one that was asked for: connect again",
            status=HTTPStatus.PRECONDITION_FAILED,
            kind="ConnectionFailed",
        )
    with ExitStack() as held:
        held.enter_context(state.concurrent.enter(tenant))
        body = await read_body(raw_request, state_of(raw_request).limits.body_bytes)
        try:
            requests, tensors = await asyncio.to_thread(_reader(raw_request).trace, body)
        except MissingTensors as missing:
            error: Any = missing.body()
            error["error"]["tensors"] = missing.digests
            return JSONResponse(error, status_code=int(missing.status))

        def start(receive: Receive | None = None) -> RunningTrace:
            for request in requests:
                metrics.count_request(request.graphs)
            run = state.engine.start(requests, tensors, receive)
            where = {"id": journal.asked_id(raw_request), "route": raw_request.url.path, "tenant": tenant}
            tell = journal.timed(lambda: {**where, "requests": len(requests), "outcome": _ended(run.outcomes)})
            run.outcomes.add_done_callback(lambda _: tell())
            return run

        if FRAMES in raw_request.headers.get("accept", ""):
            return streamed_trace(start, held.pop_all())
        outcomes = await _outcomes(start(), raw_request)
        if outcomes is None:
            return Response(status_code=_GONE)
        return Response(await asyncio.to_thread(encode_outcomes, outcomes), media_type=MSGPACK)


def _ended(outcomes: Future[list[Outcome]]) -> str:
    """How a trace ended, in a word. Failures are counted."""
    if outcomes.cancelled():
        return "left"
    if (error := outcomes.exception()) is not None:
        return type(error).__name__
    failures = [sample.failure for outcome in outcomes.result() for sample in outcome.samples if sample.failure]
    for failure in failures:
        metrics.failed.labels(failure.kind).inc()
    return failures[0].kind if failures else "answered"


async def _outcomes(run: Any, raw_request: Request) -> list[Outcome] | None:
    """Wait for a run, or for its client to go; then nothing of it is left in the engine. None if the client went."""
    ended = asyncio.wrap_future(run.outcomes)
    ended.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio says that nobody asked
    gone = asyncio.ensure_future(_disconnected(raw_request))
    try:
        await asyncio.wait([ended, gone], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            run.abort()
            await asyncio.wait([ended])
            return None
    except asyncio.CancelledError:
        run.abort()
        raise
    finally:
        gone.cancel()
    try:
        outcomes: list[Outcome] = ended.result()
    except NNsightError as error:
        raise not_run(error) from None
    return outcomes


async def _disconnected(raw_request: Request) -> None:
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass


def _reader(raw_request: Request) -> TraceReader:
    state, tenant = state_of(raw_request), tenant_of(raw_request)
    return TraceReader(state.engine, state.limits, tenant, functools.partial(state.tensors.by_digest, tenant))


def _described(state: ServerState) -> bytes:
    tree = state.engine.tree
    known = _descriptions.get(tree)
    if known is None:
        known = _descriptions[tree] = msgspec.json.encode(Described(state.base_names, VERSION, tree.catalogue))
    return known


@functools.lru_cache(maxsize=4)
def _tag(described: bytes) -> str:
    return f'"{digest(described)}"'
