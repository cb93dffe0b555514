"""A tensor as it is sent and kept: safetensors bytes with one tensor named `tensor`, under the sha256 of all of them."""

from __future__ import annotations

from typing import Any

import msgspec
import safetensors

from nnsight_vllm.graph.codec import digest
from nnsight_vllm.server.errors import Refused


def check_tensor(name: str, data: bytes, param: str) -> None:
    """Raise `Refused` unless these are safetensors bytes with one tensor named `tensor`, under their own digest."""
    if digest(data) != name:
        raise Refused(f"the sha256 of its {len(data)} bytes is {digest(data)}", param)
    try:
        found = [one for one, _ in safetensors.deserialize(data)]  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise Refused(f"not safetensors bytes: {error}", param) from None
    if found != ["tensor"]:
        raise Refused(f"one tensor named 'tensor' is expected; got {found[:5]}", param)


def header_of(data: bytes) -> dict[str, Any]:
    """`dtype`, as safetensors calls it, and `shape`, of checked bytes."""
    header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])["tensor"]
    return {"dtype": header["dtype"], "shape": header["shape"]}
