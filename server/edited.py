"""Models that are the served one with a standing intervention. Plain clients name one as `BASE:name`, its tenant only.

In a folder each is a file, which is whole or isn't there; without a folder they end with the server.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import os
import re
import tempfile
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import pydantic
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from nnsight_vllm.errors import EngineSettingError, UnknownEditError
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.server.bodies import read_body
from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.schema import Closed, Intervention, refusal_of
from nnsight_vllm.server.short import lower
from nnsight_vllm.server.state import Interventions, interventions_of, tenant_of
from nnsight_vllm.server.tensors import Deleted

router = APIRouter(tags=["interventions"])

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PATH = "/v1/interventions/edits"
_NEW = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "intervention"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
        "intervention": {"$ref": "#/components/schemas/Intervention"},
    },
}


@dataclass(frozen=True)
class EditedModel:
    """`tensors` by digest; `references`: the digest of what a name meant when the model was made, whatever it means now."""

    name: str
    intervention: Intervention
    tensors: dict[str, bytes]
    references: dict[str, str] = field(default_factory=dict)

    def tensor_of(self, reference: str, param: str) -> tuple[str, bytes]:
        """Digest and bytes. Raises `Refused`."""
        name = self.references.get(reference, reference)
        if name not in self.tensors:
            raise Refused(f"the edited model has no tensor {reference[:64]!r}", param)
        return name, self.tensors[name]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    tenant: str
    name: str
    intervention: str  # JSON
    tensors: dict[str, bytes]
    references: dict[str, str]


class EditedModels:
    """All tenants'. Raises `EngineSettingError` that names the file which can't be read. Any thread may use it."""

    def __init__(self, directory: str | Path | None) -> None:
        self._directory = None if directory is None else Path(directory)
        self._models: dict[str, dict[str, EditedModel]] = {}  # by tenant and name
        self._lock = threading.Lock()
        if self._directory is not None:
            self._load(self._directory)

    def get(self, tenant: str, name: str) -> EditedModel | None:
        return self._models.get(tenant, {}).get(name)

    def put(self, tenant: str, model: EditedModel, most: int | None = None) -> None:
        """Keep it, in the place of an earlier one of its name. Raises `Refused` where the tenant has `most` others."""
        with self._lock:
            known = self._models.setdefault(tenant, {})
            if most is not None and model.name not in known and len(known) >= most:
                raise Refused(f"{len(known)} edited models; the limit is {most}", "name", kind="AdmissionError")
            if self._directory is not None:
                _write(self._directory / _file_name(tenant, model.name), tenant, model)
            self._models[tenant] = {**known, model.name: model}

    def delete(self, tenant: str, name: str) -> None:
        """Forget it. Raises `Refused` with status 404. Requests that run keep it."""
        with self._lock:
            known = dict(self._models.get(tenant, {}))
            if known.pop(name, None) is None:
                raise self._unknown(tenant, name)
            if self._directory is not None:
                (self._directory / _file_name(tenant, name)).unlink(missing_ok=True)
            self._models[tenant] = known

    def known(self, tenant: str, name: str) -> EditedModel:
        """Raises `Refused` with status 404, which names near ones of the tenant's."""
        found = self.get(tenant, name)
        if found is None:
            raise self._unknown(tenant, name)
        return found

    def cards(self, tenant: str, base_names: list[str], vllm_cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """vLLM's cards, and one like the base's for each of the tenant's edited models."""
        base = base_names[0]
        like = next((card for card in vllm_cards if card["id"] == base), {"object": "model"})
        ours = [{**like, "id": f"{base}:{one.name}", "parent": base} for one in self.list(tenant)]
        return [*vllm_cards, *ours]

    def _unknown(self, tenant: str, name: str) -> Refused:
        near = difflib.get_close_matches(name[:64], self._models.get(tenant, {}), n=3, cutoff=0.5)
        nearest = f" (nearest: {', '.join(near)})" if near else ""
        message = f"no edited model {name[:64]!r}{nearest}"
        return Refused(message, "name", status=HTTPStatus.NOT_FOUND, kind=UnknownEditError.__name__)

    def _load(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            paths = sorted(directory.glob("*.msgpack"))
        except OSError as error:
            raise EngineSettingError(f"--edits-dir {directory}: {error}") from None
        for path in paths:
            try:
                tenant, model = _read(path)
            except (OSError, ValueError) as error:  # of msgspec and pydantic, too
                raise EngineSettingError(f"--edits-dir: {path} can't be read: {error}") from None
            self._models.setdefault(tenant, {})[model.name] = model

    def list(self, tenant: str) -> list[EditedModel]:
        return list(self._models.get(tenant, {}).values())


def _file_name(tenant: str, name: str) -> str:
    return f"{hashlib.sha256(f'{tenant}/{name}'.encode()).hexdigest()}.msgpack"  # no tenant's name has a slash


def _write(path: Path, tenant: str, model: EditedModel) -> None:
    told = model.intervention.model_dump_json(exclude_unset=True)
    data = msgspec.msgpack.encode(_File(tenant, model.name, told, model.tensors, model.references))
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> tuple[str, EditedModel]:
    told = msgspec.msgpack.decode(path.read_bytes(), type=_File)
    if path.name != _file_name(told.tenant, told.name):
        raise ValueError(f"it is the file of another model, {told.name!r}")
    for name, data in told.tensors.items():
        if digest(data) != name:
            raise ValueError(f"the tensor {name} is damaged")
    intervention = Intervention.model_validate_json(told.intervention)
    return told.tenant, EditedModel(told.name, intervention, told.tensors, told.references)


# -- routes --------------------------------------------------------------------------------------------------------------


class _New(Closed):
    name: str
    intervention: Intervention


class ToldModel(BaseModel):
    """`model`: what clients call it. `tensors`: digests."""

    name: str
    model: str
    tensors: list[str]


class ShownModel(ToldModel):
    intervention: Intervention


class ToldModels(BaseModel):
    data: list[ToldModel]


@router.post(
    _PATH,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _NEW}}}},
    responses={**documented(400, 404, 413, 429), 200: {"model": ToldModel}},
)
async def create_edited(raw_request: Request) -> JSONResponse:
    """Make `BASE:name` a model, in the place of an earlier one of that name. Its tensors are those of now."""
    state, tenant = interventions_of(raw_request), tenant_of(raw_request)
    with state.concurrent.enter(tenant):
        body = await read_body(raw_request, state.limits.body_bytes)
        model = await asyncio.to_thread(_made, state, tenant, body)
        await asyncio.to_thread(state.edited.put, tenant, model, state.limits.edited_models)
    return JSONResponse(_told(state, model))


@router.get(_PATH, responses={**documented(), 200: {"model": ToldModels}})
async def list_edited(raw_request: Request) -> JSONResponse:
    """The tenant's edited models."""
    state = interventions_of(raw_request)
    return JSONResponse({"data": [_told(state, one) for one in state.edited.list(tenant_of(raw_request))]})


@router.get(f"{_PATH}/{{name}}", responses={**documented(404), 200: {"model": ShownModel}})
async def get_edited(name: str, raw_request: Request) -> JSONResponse:
    """One of them, with its intervention."""
    state = interventions_of(raw_request)
    model = state.edited.known(tenant_of(raw_request), name)
    intervention = model.intervention.model_dump(mode="json", exclude_unset=True)
    return JSONResponse({**_told(state, model), "intervention": intervention})


@router.delete(f"{_PATH}/{{name}}", responses={**documented(404), 200: {"model": Deleted}})
async def delete_edited(name: str, raw_request: Request) -> JSONResponse:
    """Forget one. Requests that run keep it."""
    await asyncio.to_thread(interventions_of(raw_request).edited.delete, tenant_of(raw_request), name)
    return JSONResponse({"deleted": True})


def _told(state: Interventions, model: EditedModel) -> dict[str, Any]:
    return {"name": model.name, "model": f"{state.base_names[0]}:{model.name}", "tensors": sorted(model.tensors)}


def _made(state: Interventions, tenant: str, body: bytes) -> EditedModel:
    try:
        new = _New.model_validate_json(body)
    except pydantic.ValidationError as error:
        found = error.errors()
        raise refusal_of(dict(found[0]), len(found) - 1) from None
    if not _NAME.fullmatch(new.name):
        raise Refused(f"a name has 1 to 64 of A-Z a-z 0-9 . _ -; got {new.name[:80]!r}", "name")
    if new.intervention.save:
        raise Refused("an edited model saves nothing; a request that names it may", "intervention.save")
    references: dict[str, str] = {}

    def find(reference: str, param: str) -> tuple[str, bytes]:
        try:
            found = state.tensors.get(tenant, reference)
        except Refused as error:
            raise Refused(error.message, param, status=error.status, kind=error.kind) from None
        references[reference] = found[0]
        return found

    # A prompt of one token and no end: any position may still come. What depends on more is told by each request.
    lowered = lower(new.intervention, state.engine.tree, 1, None, find, state.limits.graph_nodes)
    if lowered.names:
        raise Refused("an edited model saves nothing; a request that names it may", "intervention.graph")
    size, most = sum(map(len, lowered.tensors.values())), state.limits.constant_bytes
    if size > most:
        raise Refused(f"{size} bytes of constants; the limit is {most}", "intervention", kind="AdmissionError")
    return EditedModel(new.name, new.intervention, dict(lowered.tensors), references)
