"""h -= c * (h·d) / (d·d) * d"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, add_multiple, block_size, dot, line_of, row_start


@triton.jit
def project_out_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    directions: tl.tensor,
    coefficients: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    row = row_start(rows, row_stride)
    direction = directions + line * width
    share = tl.div_rn(dot(row, direction, width, BLOCK), dot(direction, direction, width, BLOCK))
    amount = tl.load(coefficients + line) * share
    add_multiple(row, direction, -amount, width, BLOCK)


def project_out(rows: Tensor, slots: Tensor, *, directions: Tensor, coefficients: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N], `directions` [S, H], `coefficients` [S]."""
    count, width = rows.shape
    args = (rows, slots, directions, coefficients, width, rows.stride(0))
    return Launch(project_out_kernel, (count,), args, {"BLOCK": block_size(width)})
