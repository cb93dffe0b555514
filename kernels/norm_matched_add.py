"""w = h + c * v; h = w * (|h| / |w|)"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, block_size, line_of, load_float, row_start


@triton.jit
def norm_matched_add_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    vectors: tl.tensor,
    coefficients: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    row = row_start(rows, row_stride)
    vector = vectors + line * width
    coefficient = tl.load(coefficients + line)
    before = tl.zeros([BLOCK], tl.float32)
    after = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        old = load_float(row, at, width)
        moved = old + coefficient * load_float(vector, at, width)
        before += old * old
        after += moved * moved
    factor = tl.div_rn(tl.sqrt_rn(tl.sum(before)), tl.sqrt_rn(tl.sum(after)))
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        moved = load_float(row, at, width) + coefficient * load_float(vector, at, width)
        tl.store(row + at, (moved * factor).to(rows.dtype.element_ty), mask=at < width)


def norm_matched_add(rows: Tensor, slots: Tensor, *, vectors: Tensor, coefficients: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N], `vectors` [S, H], `coefficients` [S]."""
    count, width = rows.shape
    args = (rows, slots, vectors, coefficients, width, rows.stride(0))
    return Launch(norm_matched_add_kernel, (count,), args, {"BLOCK": block_size(width)})
