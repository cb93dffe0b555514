"""The routes of uploaded tensors."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from nnsight_vllm.server.bodies import read_body
from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.names import NAME, NAME_RULE
from nnsight_vllm.server.state import state_of, tenant_of
from nnsight_vllm.server.tensor_bytes import check_tensor, header_of

router = APIRouter(tags=["interventions"])

_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATH = "/v1/interventions/tensors"
_BINARY = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


class Deleted(BaseModel):
    deleted: bool


class StoredTensor(BaseModel):
    """`dtype` as safetensors calls it."""

    digest: str
    bytes: int
    dtype: str
    shape: list[int]


class PutTensor(StoredTensor):
    name: str | None


class ListedTensor(StoredTensor):
    names: list[str]


class ListedTensors(BaseModel):
    data: list[ListedTensor]


@router.put(
    f"{_PATH}/{{sha256}}",
    openapi_extra={"requestBody": _BINARY},
    responses={**documented(400, 413, 429), 200: {"model": PutTensor}},
)
async def put_tensor(
    sha256: str,
    raw_request: Request,
    name: Annotated[str | None, Query(description="A name under which it's found, too.")] = None,
) -> JSONResponse:
    """Upload safetensors bytes with one tensor named `tensor`, whose sha256 is in the path."""
    state, tenant = state_of(raw_request), tenant_of(raw_request)
    if not _DIGEST.fullmatch(sha256):
        raise Refused("expected a sha256 as 64 hexadecimal digits, in lower case", "sha256")
    if name is not None and (not NAME.fullmatch(name) or _DIGEST.fullmatch(name)):
        raise Refused(f"{NAME_RULE} and is no sha256; got {name[:80]!r}", "name")
    with state.concurrent.enter(tenant):  # bounds the bytes that uploads hold while they come
        data = await read_body(raw_request, min(state.limits.constant_bytes, state.limits.stored_bytes))
        await asyncio.to_thread(_check, sha256, data)
        state.tensors.put(tenant, sha256, data, name)
    return JSONResponse({"digest": sha256, "name": name, "bytes": len(data), **header_of(data)})


@router.get(_PATH, responses={**documented(), 200: {"model": ListedTensors}})
async def list_tensors(raw_request: Request) -> JSONResponse:
    """The tenant's tensors."""
    return JSONResponse({"data": state_of(raw_request).tensors.list(tenant_of(raw_request))})


@router.delete(f"{_PATH}/{{reference}}", responses={**documented(404), 200: {"model": Deleted}})
async def delete_tensor(reference: str, raw_request: Request) -> JSONResponse:
    """Forget a tensor, by digest or name. What was made of it stays."""
    state_of(raw_request).tensors.delete(tenant_of(raw_request), reference)
    return JSONResponse({"deleted": True})


def _check(digest: str, data: bytes) -> None:
    check_tensor(digest, data, "body")
    dtype = header_of(data)["dtype"]
    if dtype not in _DTYPES:
        raise Refused(f"expected one of {', '.join(sorted(_DTYPES))}; got a tensor of {dtype}", "body")
