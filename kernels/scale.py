"""h *= c"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, block_size, line_of, load_float, num_blocks, row_start


@triton.jit
def scale_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    coefficients: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    row = row_start(rows, row_stride)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    changed = load_float(row, at, width) * tl.load(coefficients + line)
    tl.store(row + at, changed.to(rows.dtype.element_ty), mask=at < width)


def scale(rows: Tensor, slots: Tensor, *, coefficients: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N], `coefficients` [S]."""
    count, width = rows.shape
    args = (rows, slots, coefficients, width, rows.stride(0))
    return Launch(scale_kernel, (count, num_blocks(width)), args, {"BLOCK": block_size(width)})
