"""In-place operations that a kernel does: the frequent edits of whole rows, for a group of requests.

On a GPU one launch edits all rows of the group, row by row from the line of the request that owns it. On a CPU the same
torch operations that the row algebra uses are faster, and give the same bits; `NNSIGHT_VLLM_KERNELS=triton` overrides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnsight_vllm.engine.lanes import Each, Items, Lane, Ragged, Shared
from nnsight_vllm.engine.places import ADDS
from nnsight_vllm.kernels.dispatch import choose, edit

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_kernel(name: str, rows: Tensor, ragged: Ragged, rest: list[Lane]) -> bool:
    """Do `rows op= value` with a kernel, [all rows, width] in place. False where it isn't one of theirs."""
    if choose(rows.device) != "triton" or rows.ndim != 2 or rows.dtype not in _DTYPES or rows.stride(1) != 1:
        return False
    found = _columns(name, rest, len(ragged.counts), rows)
    if found is None:
        return False
    operation, columns = found
    edit(rows, operation, ragged.owner.to(rows.device, torch.int32), columns)
    return True


def _columns(name: str, rest: list[Lane], num: int, rows: Tensor) -> tuple[str, dict[str, Tensor]] | None:
    if name == "tensor.zero_" and not rest:
        return "ablate", {}
    if len(rest) != 1:
        return None
    vectors = _vectors(rest[0], num, rows)
    if name in ADDS and vectors is not None:
        signs = torch.full((num,), float(ADDS[name]), dtype=torch.float32, device=rows.device)
        return "add", {"vectors": vectors, "coefficients": signs}
    if name == "tensor.copy_" and vectors is not None:
        return "replace", {"vectors": vectors}
    numbers = _numbers(rest[0], num, rows)
    if name in {"py.imul", "tensor.mul_"} and numbers is not None:
        return "scale", {"coefficients": numbers}
    return None


def _vectors(lane: Lane, num: int, rows: Tensor) -> Tensor | None:
    """A vector a request: [requests, width]."""
    match lane:
        case Each(tensor=tensor):
            pass
        case Shared(value=Tensor() as value) if value.ndim == 1:
            tensor = value.expand(num, -1)
        case _:
            return None
    fits = tensor.ndim == 2 and tensor.shape[1] == rows.shape[1] and tensor.dtype in _DTYPES
    return tensor.to(rows.device).contiguous() if fits else None


def _numbers(lane: Lane, num: int, rows: Tensor) -> Tensor | None:
    values = [lane.value] * num if isinstance(lane, Shared) else lane.values if isinstance(lane, Items) else []
    if not values or not all(type(value) in (int, float) for value in values):
        return None
    return torch.tensor(values, dtype=torch.float32, device=rows.device)
