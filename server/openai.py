"""vLLM's OpenAI routes with one field more. A request without it, for a model that isn't an edited one, goes straight to vLLM's own route.

Their bodies, statuses and streams are vLLM's: for a request with an intervention `intervention` is put into each choice of the answer, and
into the chunks of a stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.api_router import models
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from nnsight_vllm.server import journal
from nnsight_vllm.server.edited import EditedModel
from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.openai_run import Carried, current
from nnsight_vllm.server.schema import Intervention, Judged
from nnsight_vllm.server.state import interventions_of, tenant_of

router = APIRouter(route_class=Judged)

_ERRORS: dict[int | str, dict[str, Any]] = {
    HTTPStatus.OK.value: {"content": {"text/event-stream": {}}},
    **documented(400, 404, 413, 429),
}
_FIELD = Field(default=None, description="What to read and edit while this request runs.")


class CompletionWithIntervention(CompletionRequest):
    intervention: Intervention | None = _FIELD


class ChatCompletionWithIntervention(ChatCompletionRequest):
    intervention: Intervention | None = _FIELD


class ResponseWithIntervention(ResponsesRequest):
    intervention: Intervention | None = _FIELD


@router.post("/v1/completions", dependencies=[Depends(validate_json_request)], responses=_ERRORS)
async def create_completion(request: CompletionWithIntervention, raw_request: Request) -> Any:
    """OpenAI's completions, with an intervention."""
    return await _answered(completion.create_completion, request, raw_request)


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)], responses=_ERRORS)
async def create_chat_completion(request: ChatCompletionWithIntervention, raw_request: Request) -> Any:
    """OpenAI's chat completions, with an intervention."""
    return await _answered(chat.create_chat_completion, request, raw_request)


@router.post("/v1/responses", dependencies=[Depends(validate_json_request)], responses=_ERRORS)
async def create_responses(request: ResponseWithIntervention, raw_request: Request) -> Any:
    """OpenAI's responses, with an intervention."""
    return await _answered(responses.create_responses, request, raw_request)


@router.get("/v1/models")
async def show_available_models(raw_request: Request) -> Any:
    """The served models, and the tenant's edited ones."""
    known = (await models(raw_request).show_available_models()).model_dump()
    state = interventions_of(raw_request)
    known["data"] = state.edited.cards(tenant_of(raw_request), state.base_names, known["data"])
    return JSONResponse(content=known)


async def refuse_field(raw_request: Request) -> None:
    """For vLLM's other routes, which would pass over an intervention without a word."""
    if (await raw_request.body()).find(b'"intervention"') < 0:
        return
    with suppress(ValueError):  # bytes that are no JSON are for the route to refuse
        body = await raw_request.json()
        if isinstance(body, dict) and "intervention" in body:
            paths = ", ".join(r.path for r in router.routes if isinstance(r, APIRoute) and "POST" in r.methods)
            raise Refused(f"this route takes no intervention; those that do: {paths}", "intervention")


Route = Callable[[Any, Request], Awaitable[Any]]


async def _answered(route: Route, request: Any, raw_request: Request) -> Any:
    edited = _edited_model(request, raw_request)
    if request.intervention is None and edited is None:
        return await route(request, raw_request)
    if getattr(request, "use_beam_search", False):
        raise Refused("beam search can't go with an intervention", "use_beam_search")
    if getattr(request, "background", False):
        raise Refused("a response in the background can't have an intervention", "background")
    named, state, tenant = request.model, interventions_of(raw_request), tenant_of(raw_request)
    if edited is not None:
        request.model = state.base_names[0]
    carried = Carried(state, tenant, request.intervention, edited)
    is_taken = False
    running = ExitStack()
    running.enter_context(state.concurrent.enter(tenant))
    running.callback(journal.timed(lambda: carried.entry(raw_request.url.path)))
    current.set(carried)  # for all that this request still does: some handlers only call the engine while they stream
    try:
        await carried.read()
        response = await route(request, raw_request)
        if isinstance(response, StreamingResponse):
            events = await _begun(carried, response.body_iterator)
            response.body_iterator = _events_with(carried, events, named if edited else None)
            is_taken = True
            return _Closing(response, running.close)
        if isinstance(response, JSONResponse) and response.status_code == HTTPStatus.OK:
            carried.require_run()
            return _with_values(carried, response, named if edited else None)
        if carried.refusal is not None:  # vLLM may have made an answer of it that doesn't say where
            raise carried.refusal
        return response
    finally:
        if not is_taken:
            running.close()


def _edited_model(request: Any, raw_request: Request) -> EditedModel | None:
    """The edited model that the request names, as `BASE:name`."""
    state = interventions_of(raw_request)
    if not request.model or request.model in state.base_names:
        return None
    for base in state.base_names:
        if request.model.startswith(f"{base}:"):
            return state.edited.get(tenant_of(raw_request), request.model.removeprefix(f"{base}:"))
    return None


# -- putting values into answers -----------------------------------------------------------------------------------------


def _with_values(carried: Carried, response: JSONResponse, named: str | None) -> JSONResponse:
    body = json.loads(bytes(response.body))
    _put(carried, body)
    if named is not None and "model" in body:
        body["model"] = named
    headers = {
        name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")
    }
    return JSONResponse(body, status_code=response.status_code, headers=headers, background=response.background)


def _put(carried: Carried, body: dict[str, Any]) -> None:
    """Into each choice of an answer or of a chunk, or into a response, what is there for it."""
    if "choices" in body:
        for choice in body["choices"]:
            if not _is_opening(choice):
                _put_one(carried, choice, choice["index"])
    elif body.get("object") == "response":
        _put_one(carried, body, 0)


def _put_one(carried: Carried, into: dict[str, Any], number: int) -> None:
    told = carried.told.get(number)
    found = None if told is None else told.take()
    if found is not None:
        into["intervention"] = found


def _is_opening(choice: dict[str, Any]) -> bool:
    """A chat's first chunk says whose turn it is, and belongs to no token."""
    delta = choice.get("delta")
    return delta is not None and "role" in delta and not delta.get("content") and choice.get("finish_reason") is None


async def _begun(carried: Carried, events: Any) -> AsyncGenerator[Any, None]:
    """The events, once the request was taken. Raises `Refused` while the answer can still be an error."""
    held: list[Any] = []
    try:
        async for event in events:
            held.append(event)
            if carried.is_admitted:
                break
        if carried.refusal is not None:
            raise carried.refusal
    except BaseException:  # the answer never begins, so nobody else ends what the engine has begun
        await events.aclose()
        raise

    async def all_of_them() -> AsyncGenerator[Any, None]:
        try:
            for event in held:
                yield event
            async for event in events:
                yield event
        finally:
            await events.aclose()

    return all_of_them()


async def _events_with(carried: Carried, events: Any, named: str | None) -> AsyncIterator[str | bytes]:
    try:
        async for event in events:
            yield _event_with(carried, event, named) if isinstance(event, str) else event
        carried.require_run()
    finally:
        await events.aclose()


def _event_with(carried: Carried, event: str, named: str | None) -> str:
    head, mark, data = event.partition("data: ")
    if not mark or not data.startswith("{"):
        return event  # the end's mark, or a sign of life
    body = json.loads(data)
    response = body.get("response") if body.get("type") == "response.completed" else None
    if body.get("type") == "response.output_text.delta":
        _put_one(carried, body, 0)
    _put(carried, body if response is None else response)
    for place in (body, body.get("response")):
        if named is not None and isinstance(place, dict) and "model" in place:
            place["model"] = named
    return f"{head}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Closing(Response):
    """A response, and what to do when it's sent or was given up."""

    def __init__(self, response: Response, close: Callable[[], None]) -> None:
        self._response = response
        self._close = close
        self.background: BackgroundTask | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            self._close()
