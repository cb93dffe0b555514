"""The tensors that an intervention names, wherever they come from: the body, or the tenant's store."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable

import safetensors.torch
import torch

from nnsight_vllm.graph.codec import digest
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.schema import InlineTensor
from nnsight_vllm.server.tensor_bytes import check_tensor

TensorOf = Callable[[str, str], tuple[str, bytes]]
"""(digest or name, where it stands in the body) -> (digest, safetensors bytes with one tensor named `tensor`). Raises `Refused`."""


class TensorRefs:
    """The tensors of one intervention, wherever they come from. `used`: by digest."""

    def __init__(self, given: dict[str, str], tensor_of: TensorOf) -> None:
        self.used: dict[str, bytes] = {}
        self._tensor_of = tensor_of
        self._given = {name: _base64(text, f"intervention.tensors[{name!r}]") for name, text in given.items()}
        for name, data in self._given.items():
            check_tensor(name, data, f"intervention.tensors[{name!r}]")

    def find(self, reference: str | InlineTensor, param: str) -> tuple[str, bytes]:
        if isinstance(reference, InlineTensor):
            data = _inline(reference, param)
            found = digest(data), data
        elif reference in self._given:
            found = reference, self._given[reference]
        else:
            found = self._tensor_of(reference, param)
        self.used[found[0]] = found[1]
        return found

    def refuse_unused(self) -> None:
        unused = self._given.keys() - self.used.keys()
        if unused:
            raise Refused("nothing in the intervention names it", f"intervention.tensors[{min(unused)!r}]")


def _inline(inline: InlineTensor, param: str) -> bytes:
    """As safetensors bytes, the same that a tensor of the client's would be."""
    data = _base64(inline.data, f"{param}.data")
    dtype: torch.dtype = getattr(torch, inline.dtype)
    size = math.prod(inline.shape) * dtype.itemsize
    if size != len(data):
        raise Refused(f"expected {size} bytes for {inline.dtype} {inline.shape}; got {len(data)}", f"{param}.data")
    if not data:
        raise Refused("a tensor without elements", f"{param}.shape")
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return safetensors.torch.save({"tensor": flat.reshape(inline.shape)})


def _base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"not base64: {error}", param) from None
