"""The routes of edited models: made of an intervention and the tensors that it names by then, listed, shown and forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pydantic
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from nnsight_vllm.server.bodies import read_body
from nnsight_vllm.server.edited import EditedModel
from nnsight_vllm.server.errors import Refused, documented, require_at_most
from nnsight_vllm.server.names import NAME, NAME_RULE
from nnsight_vllm.server.schema import Closed, Intervention
from nnsight_vllm.server.schema_errors import refusal_of
from nnsight_vllm.server.short import lower
from nnsight_vllm.server.state import ServerState, state_of, tenant_of
from nnsight_vllm.server.tensor_routes import Deleted

router = APIRouter(tags=["interventions"])

_PATH = "/v1/interventions/edits"
_NEW = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "intervention"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "intervention": {"$ref": "#/components/schemas/Intervention"},
    },
}


class _NewEditedModel(Closed):
    name: str
    intervention: Intervention


class EditedModelSummary(BaseModel):
    """`model`: what clients call it. `tensors`: digests."""

    name: str
    model: str
    tensors: list[str]


class EditedModelDetails(EditedModelSummary):
    intervention: Intervention


class EditedModelList(BaseModel):
    data: list[EditedModelSummary]


@router.post(
    _PATH,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _NEW}}}},
    responses={**documented(400, 404, 413, 429), 200: {"model": EditedModelSummary}},
)
async def create_edited(raw_request: Request) -> JSONResponse:
    """Make `BASE:name` a model, in the place of an earlier one of that name. Its tensors are those of now."""
    state, tenant = state_of(raw_request), tenant_of(raw_request)
    with state.concurrent.enter(tenant):
        body = await read_body(raw_request, state.limits.body_bytes)
        model = await asyncio.to_thread(_read_model, state, tenant, body)
        await asyncio.to_thread(state.edited.put, tenant, model, state.limits.edited_models)
    return JSONResponse(_summary(state, model))


@router.get(_PATH, responses={**documented(), 200: {"model": EditedModelList}})
async def list_edited(raw_request: Request) -> JSONResponse:
    """The tenant's edited models."""
    state = state_of(raw_request)
    return JSONResponse({"data": [_summary(state, one) for one in state.edited.list(tenant_of(raw_request))]})


@router.get(f"{_PATH}/{{name}}", responses={**documented(404), 200: {"model": EditedModelDetails}})
async def get_edited(name: str, raw_request: Request) -> JSONResponse:
    """One of them, with its intervention."""
    state = state_of(raw_request)
    model = state.edited.known(tenant_of(raw_request), name)
    intervention = model.intervention.model_dump(mode="json", exclude_unset=True)
    return JSONResponse({**_summary(state, model), "intervention": intervention})


@router.delete(f"{_PATH}/{{name}}", responses={**documented(404), 200: {"model": Deleted}})
async def delete_edited(name: str, raw_request: Request) -> JSONResponse:
    """Forget one. Requests that run keep it."""
    await asyncio.to_thread(state_of(raw_request).edited.delete, tenant_of(raw_request), name)
    return JSONResponse({"deleted": True})


def _summary(state: ServerState, model: EditedModel) -> dict[str, Any]:
    return {"name": model.name, "model": f"{state.base_names[0]}:{model.name}", "tensors": sorted(model.tensors)}


def _read_model(state: ServerState, tenant: str, body: bytes) -> EditedModel:
    try:
        new = _NewEditedModel.model_validate_json(body)
    except pydantic.ValidationError as error:
        found = error.errors()
        raise refusal_of(dict(found[0]), len(found) - 1) from None
    if not NAME.fullmatch(new.name):
        raise Refused(f"{NAME_RULE}; got {new.name[:80]!r}", "name")
    if new.intervention.save:
        raise Refused("an edited model saves nothing; a request that names it may", "intervention.save")
    references: dict[str, str] = {}

    def find(reference: str, param: str) -> tuple[str, bytes]:
        references[reference], data = state.tensors.get(tenant, reference, param)
        return references[reference], data

    # A prompt of one token and no end: any position may still come. What depends on more is told by each request.
    lowered = lower(new.intervention, state.engine.tree, 1, None, find, state.limits.graph_nodes)
    if lowered.names:
        raise Refused("an edited model saves nothing; a request that names it may", "intervention.graph")
    size = sum(map(len, lowered.tensors.values()))
    require_at_most(state.limits.constant_bytes, size, "bytes of constants", "intervention")
    return EditedModel(new.name, new.intervention, dict(lowered.tensors), references)
