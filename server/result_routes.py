"""The route of saved tensors that are too large for an answer: whole and then gone, or by ranges of their bytes."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus

import zstandard
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.background import BackgroundTask

from nnsight_vllm.server.errors import Refused, documented
from nnsight_vllm.server.state import state_of, tenant_of

router = APIRouter(tags=["interventions"])

_MEDIA_TYPE = "application/octet-stream"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_BYTES = {"content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


@router.api_route(
    "/v1/interventions/results/{id}",
    methods=["GET", "HEAD"],
    responses={**documented(404, 416), 200: _BYTES, 206: {**_BYTES, "description": "The range that was asked for."}},
)
async def get_result(id: str, raw_request: Request) -> Response:
    """Safetensors bytes with one tensor named `tensor`. A whole answer ends its life; one of a range doesn't."""
    store, tenant = state_of(raw_request).results, tenant_of(raw_request)
    data = store.get(tenant, id)
    headers = {"Accept-Ranges": "bytes", "Vary": "Accept-Encoding", "Cache-Control": "no-store"}
    if raw_request.method == "HEAD":
        return Response(media_type=_MEDIA_TYPE, headers={**headers, "Content-Length": str(len(data))})
    if "range" in raw_request.headers:
        chosen = _chosen(raw_request.headers["range"], len(data))
        if chosen is None:
            return Response(data, media_type=_MEDIA_TYPE, headers=headers)
        range_of = {"Content-Range": f"bytes {chosen.start}-{chosen.stop - 1}/{len(data)}"}
        part = data[chosen.start : chosen.stop]
        return Response(part, HTTPStatus.PARTIAL_CONTENT, {**headers, **range_of}, _MEDIA_TYPE)
    if _takes_zstd(raw_request.headers.get("accept-encoding", "")):
        data = await asyncio.to_thread(zstandard.ZstdCompressor(level=1).compress, data)
        headers["Content-Encoding"] = "zstd"
    sent = BackgroundTask(store.drop, tenant, id)  # runs only when all of it was sent
    return Response(data, media_type=_MEDIA_TYPE, headers=headers, background=sent)


def _chosen(header: str, size: int) -> range | None:
    """The bytes of a single range; None for what isn't one, which RFC 9110 lets a server ignore. Raises `Refused` (416)."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        chosen = range(max(size - int(last), 0), size)
    elif last and int(last) < int(first):
        return None
    else:
        chosen = range(int(first), min(int(last) + 1, size) if last else size)
    if not chosen:
        raise Refused(
            f"no byte of {size} is in the range {header[:64]!r}",
            "range",
            status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            headers={"Content-Range": f"bytes */{size}"},
        )
    return chosen


def _takes_zstd(accepted: str) -> bool:
    for one in accepted.lower().split(","):
        name, _, weight = one.replace(" ", "").partition(";q=")
        if name == "zstd":
            return re.fullmatch(r"0(\.0*)?", weight) is None
    return False
