"""Cases for edits of rows, and how results are compared: what the tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnsight_vllm.kernels.columns import COLUMNS

ELEMENTWISE = ("add", "scale", "replace", "ablate")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("none", "identical", "distinct", "uniform", "skewed", "mixed")
RANK = 3
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_rows(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_columns(
    operation: str, num_slots: int, width: int, dtype: torch.dtype, seed: int = 1, rank: int = RANK
) -> dict[str, Tensor]:
    """Numbers of ordinary size; a clamp's bounds are in order and cut about half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    columns = {}
    for column in COLUMNS[operation]:
        values = torch.randn(num_slots, *column.sizes(width, rank), generator=generator)
        columns[column.name] = values.to(dtype) if column.shape else values
    if operation == "clamp":
        columns["lows"] = -columns["lows"].abs()
        columns["highs"] = columns["highs"].abs()
    return columns


def slots_like(pattern: str, num_rows: int, num_slots: int, seed: int = 2) -> Tensor:
    """Which rows share which line."""
    generator = torch.Generator().manual_seed(seed)
    match pattern:
        case "none":
            slots = torch.full((num_rows,), -1)
        case "identical":
            slots = torch.full((num_rows,), num_slots - 1)
        case "distinct":
            slots = torch.arange(num_rows) % num_slots
        case "uniform":
            slots = torch.randint(0, num_slots, (num_rows,), generator=generator)
        case "skewed":
            slots = (torch.rand(num_rows, generator=generator) ** 4 * num_slots).long()
        case "mixed":
            slots = torch.randint(-1, num_slots, (num_rows,), generator=generator)
            slots[::3] = -1
        case _:
            raise ValueError(pattern)
    return slots.int()


def unchanged(operation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Two rows, and columns of one line by which a clamp or a clamped feature leaves them: `h + 0 * d` would lose the zeros' signs."""
    columns = random_columns(operation, 1, 30, torch.float32)
    if operation == "sae_clamp":
        columns |= {"biases": -torch.ones(1), "targets": torch.zeros(1)}
    return torch.full((2, 30), -0.0), columns


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Bit for bit; any NaN equals any NaN, for its payload is no number's."""
    bits = _BITS[left.dtype]
    same = left.contiguous().view(bits) == right.contiguous().view(bits)
    return left.dtype == right.dtype and bool((same | (left.isnan() & right.isnan())).all())


def excess(actual: Tensor, expected: Tensor, sizes: Tensor) -> float:
    """The largest difference in units of the tolerance that kernels/reference.py states; up to 1 is equal. `sizes` [N]: its s."""
    if actual.numel() == 0:
        return 0.0
    finfo = torch.finfo(actual.dtype)
    left, right = actual.double(), expected.double()
    return float(((left - right).abs() / (finfo.eps * right.abs() + 1e-6 * sizes[:, None] + finfo.tiny)).max())


def sizes_of(rows: Tensor, operation: str, slots: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """The largest |h| of each row plus its largest |change|, every term of a sum taken absolutely: [N] float64."""
    used = slots.clamp(min=0).long()
    line = {name: values[used].double().abs() for name, values in columns.items()}
    h = rows.double().abs()
    if operation not in _CHANGES:
        return h.amax(-1)
    if operation != "norm_matched_add":
        return h.amax(-1) + _CHANGES[operation](h, line).amax(-1)
    moved = rows.double() + columns["coefficients"][used, None].double() * columns["vectors"][used].double()
    factor = torch.linalg.vector_norm(h, dim=-1) / torch.linalg.vector_norm(moved, dim=-1)
    size: Tensor = h.amax(-1) + _CHANGES[operation](h, line).amax(-1) * factor
    return size


def _along(line: dict[str, Tensor], amount: Tensor) -> Tensor:
    """`amount` [N] times the direction."""
    return amount[:, None] * line["directions"] / (line["directions"] ** 2).sum(-1, keepdim=True)


_CHANGES: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "project_out": lambda h, x: _along(x, x["coefficients"] * (h * x["directions"]).sum(-1)),
    "clamp": lambda h, x: _along(x, (h * x["directions"]).sum(-1) * 2 + _bound(x) * x["directions"].norm(dim=-1)),
    "norm_matched_add": lambda h, x: h + x["coefficients"][:, None] * x["vectors"],
    "low_rank": lambda h, x: torch.einsum(
        "n,nhr,nr->nh", x["coefficients"], x["ups"], torch.einsum("nrh,nh->nr", x["downs"], h)
    ),
    "sae_clamp": lambda h, x: ((x["encoders"] * h).sum(-1) + x["biases"] + x["targets"])[:, None] * x["decoders"],
}


def _bound(line: dict[str, Tensor]) -> Tensor:
    """The larger bound of a clamp, of those that are finite."""
    return torch.stack([line["lows"], line["highs"]]).nan_to_num(posinf=0).amax(0)
