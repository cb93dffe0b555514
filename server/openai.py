"""vLLM's OpenAI routes with one field more. A request without it, for a model that isn't an edited one, goes straight to vLLM's own route.

Their bodies, statuses and streams are vLLM's: for a request with an intervention `intervention` is put into each choice of the answer, and
into the chunks of a stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import Field
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.api_router import models
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from nnsight_vllm.server import journal
from nnsight_vllm.server.bodies import InterventionRoute
from nnsight_vllm.server.closing import ClosingResponse
from nnsight_vllm.server.edited import EditedModel
from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.openai_run import OpenAIRun, current
from nnsight_vllm.server.schema import Intervention
from nnsight_vllm.server.state import state_of, tenant_of

router = APIRouter(route_class=InterventionRoute)

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
    state = state_of(raw_request)
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
    edited = _edited_model(request.model, raw_request)
    if request.intervention is None and edited is None:
        return await route(request, raw_request)
    if getattr(request, "use_beam_search", False):
        raise Refused("beam search can't go with an intervention", "use_beam_search")
    if getattr(request, "background", False):
        raise Refused("a response in the background can't have an intervention", "background")
    state, tenant = state_of(raw_request), tenant_of(raw_request)
    run = OpenAIRun(state, tenant, request.intervention, edited)
    with ExitStack() as running:
        running.enter_context(state.concurrent.enter(tenant))
        running.callback(journal.timed(lambda: run.entry(raw_request.url.path)))
        named = None
        if edited is not None:
            named, request.model = request.model, state.base_names[0]
        response = await _run(run, route, request, raw_request, named)
        if isinstance(response, StreamingResponse):
            return ClosingResponse(response, response.body_iterator, running.pop_all())
        return response


async def _run(run: OpenAIRun, route: Route, request: Any, raw_request: Request, named: str | None) -> Any:
    """vLLM's answer with the values in it, and with the edited model's name. Raises `Refused`."""
    current.set(run)  # for all that this request still does: some handlers only call the engine while they stream
    await run.read()
    response = await route(request, raw_request)
    if isinstance(response, StreamingResponse):
        first = await _begun(run, response.body_iterator)
        response.body_iterator = _events_with(run, first, response.body_iterator, named)
        return response
    if isinstance(response, JSONResponse) and response.status_code == HTTPStatus.OK:
        run.require_run()
        return _with_values(run, response, named)
    if run.refusal is not None:  # vLLM may have made an answer of it that doesn't say where
        raise run.refusal
    return response


def _edited_model(model: str | None, raw_request: Request) -> EditedModel | None:
    """The edited model that a request names, as `BASE:name`."""
    state = state_of(raw_request)
    if not model or model in state.base_names:
        return None
    base = next((base for base in state.base_names if model.startswith(f"{base}:")), None)
    return None if base is None else state.edited.get(tenant_of(raw_request), model.removeprefix(f"{base}:"))


# -- putting values into answers -----------------------------------------------------------------------------------------


def _with_values(run: OpenAIRun, response: JSONResponse, named: str | None) -> JSONResponse:
    body = json.loads(bytes(response.body))
    _put(run, body)
    if named is not None and "model" in body:
        body["model"] = named
    headers = {
        name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")
    }
    return JSONResponse(body, status_code=response.status_code, headers=headers, background=response.background)


def _put(run: OpenAIRun, body: dict[str, Any]) -> None:
    """Into each choice of an answer or of a chunk, or into a response, what is there for it."""
    if "choices" not in body and body.get("object") == "response":
        _put_one(run, body, 0)
    for choice in body.get("choices", ()):
        if not _is_opening(choice):
            _put_one(run, choice, choice["index"])


def _put_one(run: OpenAIRun, into: dict[str, Any], number: int) -> None:
    results = run.results.get(number)
    found = None if results is None else results.take()
    if found is not None:
        into["intervention"] = found


def _is_opening(choice: dict[str, Any]) -> bool:
    """A chat's first chunk says whose turn it is, and belongs to no token."""
    delta = choice.get("delta")
    return delta is not None and "role" in delta and not delta.get("content") and choice.get("finish_reason") is None


async def _begun(run: OpenAIRun, events: Any) -> list[Any]:
    """The first events, until the request was taken. Raises `Refused` while the answer can still be an error."""
    try:
        first = await _first_events(run, events)
        if run.refusal is not None:
            raise run.refusal
    except BaseException:  # the answer never begins, so nobody else ends what the engine has begun
        await events.aclose()
        raise
    return first


async def _first_events(run: OpenAIRun, events: Any) -> list[Any]:
    first = []
    async for event in events:
        first.append(event)
        if run.is_admitted:
            break
    return first


async def _events_with(
    run: OpenAIRun, first: list[Any], events: Any, named: str | None
) -> AsyncGenerator[str | bytes, None]:
    try:
        for event in first:
            yield _event_with(run, event, named)
        async for event in events:
            yield _event_with(run, event, named)
        run.require_run()
    finally:
        await events.aclose()


def _event_with(run: OpenAIRun, event: str | bytes, named: str | None) -> str | bytes:
    head, mark, data = event.partition("data: ") if isinstance(event, str) else ("", "", "")
    if not mark or not data.startswith("{"):
        return event  # the end's mark, or a sign of life
    body = json.loads(data)
    response = body.get("response") if body.get("type") == "response.completed" else None
    if body.get("type") == "response.output_text.delta":
        _put_one(run, body, 0)
    _put(run, body if response is None else response)
    for place in (body, body.get("response")):
        if named is not None and isinstance(place, dict) and "model" in place:
            place["model"] = named
    return f"{head}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
