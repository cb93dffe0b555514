"""h += c * B (A h), with a line's own A [r, H] and B [H, r]

Each row reads its A and B: right for decoding, and for a prompt as fast as the cache brings them. Rows of one line aren't
grouped into a matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, block_size, line_of, load_float, power_of_two, row_start

MAX_TILE = 4096  # elements of A or B that a program holds at once


@triton.jit
def low_rank_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    downs: tl.tensor,
    ups: tl.tensor,
    coefficients: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    row = row_start(rows, row_stride)
    down = downs + line * rank * width
    up = ups + line * rank * width
    coefficient = tl.load(coefficients + line)
    ranks = tl.arange(0, RANKS)
    inner = tl.zeros([RANKS], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (ranks < rank)[:, None] & (at < width)[None, :]
        tile = tl.load(down + ranks[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        inner += tl.sum(tile * load_float(row, at, width)[None, :], 1)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < width)[:, None] & (ranks < rank)[None, :]
        tile = tl.load(up + at[:, None] * rank + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
        changed = load_float(row, at, width) + coefficient * tl.sum(tile * inner[None, :], 1)
        tl.store(row + at, changed.to(rows.dtype.element_ty), mask=at < width)


def low_rank(rows: Tensor, slots: Tensor, *, downs: Tensor, ups: Tensor, coefficients: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N], `downs` [S, r, H], `ups` [S, H, r], `coefficients` [S]."""
    count, width = rows.shape
    rank = downs.shape[1]
    ranks = power_of_two(rank)
    block = min(block_size(width), max(MAX_TILE // ranks, 16))
    args = (rows, slots, downs, ups, coefficients, width, rank, rows.stride(0))
    return Launch(low_rank_kernel, (count,), args, {"BLOCK": block, "RANKS": ranks})
