"""h = v, and h = 0"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, block_size, line_of, load_float, num_blocks, row_start


@triton.jit
def replace_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    vectors: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = load_float(vectors + line * width, at, width)
    tl.store(row_start(rows, row_stride) + at, value.to(rows.dtype.element_ty), mask=at < width)


@triton.jit
def ablate_kernel(
    rows: tl.tensor, slots: tl.tensor, width: tl.tensor, row_stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    if line_of(slots) < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], rows.dtype.element_ty)
    tl.store(row_start(rows, row_stride) + at, zeros, mask=at < width)


def replace(rows: Tensor, slots: Tensor, *, vectors: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N], `vectors` [S, H]."""
    count, width = rows.shape
    args = (rows, slots, vectors, width, rows.stride(0))
    return Launch(replace_kernel, (count, num_blocks(width)), args, {"BLOCK": block_size(width)})


def ablate(rows: Tensor, slots: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N]."""
    count, width = rows.shape
    args = (rows, slots, width, rows.stride(0))
    return Launch(ablate_kernel, (count, num_blocks(width)), args, {"BLOCK": block_size(width)})
