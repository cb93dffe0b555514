"""Tensors that tenants upload, by the sha256 of their safetensors bytes, and by names if they like. None sees another's."""

from __future__ import annotations

import asyncio
import difflib
import re
import threading
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from nnsight_vllm.server.bodies import read_body
from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.state import interventions_of, tenant_of
from nnsight_vllm.server.trace_requests import check_tensor

router = APIRouter(tags=["interventions"])

DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATH = "/v1/interventions/tensors"
_BINARY = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}


class _Shelf:
    """One tenant's."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.names: dict[str, str] = {}  # digest by name

    @property
    def bytes(self) -> int:
        return sum(map(len, self.data.values())) + sum(len(name) for name in self.names)


class TensorStore:
    """At most `max_bytes` for each tenant, names included. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._shelves: dict[str, _Shelf] = {}
        self._lock = threading.Lock()

    def put(self, tenant: str, digest: str, data: bytes, name: str | None = None) -> None:
        """Keep a checked tensor. Raises `Refused` where there is no room; a name moves to its new tensor."""
        with self._lock:
            shelf = self._shelves.setdefault(tenant, _Shelf())
            more = 0 if digest in shelf.data else len(data)
            more += len(name) if name is not None and name not in shelf.names else 0
            if shelf.bytes + more > self._max_bytes:
                raise Refused(
                    f"{shelf.bytes} bytes of tensors are stored, {more} more don't fit; the limit is {self._max_bytes}: "
                    f"delete some",
                    status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    kind="AdmissionError",
                )
            shelf.data[digest] = data
            if name is not None:
                shelf.names[name] = digest

    def get(self, tenant: str, reference: str) -> tuple[str, bytes]:
        """Digest and bytes by digest or name. Raises `Refused`."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            digest = shelf.names.get(reference, reference)
            if digest not in shelf.data:
                raise _unknown(shelf, reference)
            return digest, shelf.data[digest]

    def delete(self, tenant: str, reference: str) -> None:
        """Forget a tensor with all its names. Raises `Refused`. Requests that run keep theirs."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            digest = shelf.names.get(reference, reference)
            if digest not in shelf.data:
                raise _unknown(shelf, reference)
            del shelf.data[digest]
            shelf.names = {name: known for name, known in shelf.names.items() if known != digest}

    def list(self, tenant: str) -> list[dict[str, object]]:
        """Each with `digest`, `names`, `bytes`, `dtype` and `shape`, oldest first."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            return [
                {
                    "digest": digest,
                    "names": sorted(name for name, known in shelf.names.items() if known == digest),
                    "bytes": len(data),
                    **_header(data),
                }
                for digest, data in shelf.data.items()
            ]


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
    state, tenant = interventions_of(raw_request), tenant_of(raw_request)
    if not _DIGEST.fullmatch(sha256):
        raise Refused("expected a sha256 as 64 hexadecimal digits, in lower case", "sha256")
    if name is not None and (not _NAME.fullmatch(name) or _DIGEST.fullmatch(name)):
        raise Refused(f"a name has 1 to 64 of A-Z a-z 0-9 . _ - and is no sha256; got {name[:80]!r}", "name")
    with state.concurrent.enter(tenant):  # bounds the bytes that uploads hold while they come
        data = await read_body(raw_request, min(state.limits.constant_bytes, state.limits.stored_bytes))
        await asyncio.to_thread(_check, sha256, data)
        state.tensors.put(tenant, sha256, data, name)
    return JSONResponse({"digest": sha256, "name": name, "bytes": len(data), **_header(data)})


@router.get(_PATH, responses={**documented(), 200: {"model": ListedTensors}})
async def list_tensors(raw_request: Request) -> JSONResponse:
    """The tenant's tensors."""
    return JSONResponse({"data": interventions_of(raw_request).tensors.list(tenant_of(raw_request))})


@router.delete(f"{_PATH}/{{reference}}", responses={**documented(404), 200: {"model": Deleted}})
async def delete_tensor(reference: str, raw_request: Request) -> JSONResponse:
    """Forget a tensor, by digest or name. What was made of it stays."""
    interventions_of(raw_request).tensors.delete(tenant_of(raw_request), reference)
    return JSONResponse({"deleted": True})


def _check(digest: str, data: bytes) -> None:
    check_tensor(digest, data, "body")
    dtype = _header(data)["dtype"]
    if dtype not in DTYPES:
        raise Refused(f"expected one of {', '.join(sorted(DTYPES))}; got a tensor of {dtype}", "body")


def _header(data: bytes) -> dict[str, Any]:
    """`dtype`, as safetensors calls it, and `shape`."""
    told = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])["tensor"]
    return {"dtype": told["dtype"], "shape": told["shape"]}


def _unknown(shelf: _Shelf, reference: str) -> Refused:
    near = difflib.get_close_matches(reference[:64], shelf.names, n=3, cutoff=0.5)
    nearest = f" (nearest: {', '.join(near)})" if near else ""
    return Refused(
        f"no tensor {reference[:64]!r}{nearest}", "tensor", status=HTTPStatus.NOT_FOUND, kind="NotFoundError"
    )
