"""u = d / |d|; p = h·u; h += (min(max(p, low), high) - p) * u; nothing is written where p is inside"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, add_multiple, block_size, dot, line_of, row_start


@triton.jit
def clamp_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    directions: tl.tensor,
    lows: tl.tensor,
    highs: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    row = row_start(rows, row_stride)
    direction = directions + line * width
    length = tl.sqrt_rn(dot(direction, direction, width, BLOCK))
    component = tl.div_rn(dot(row, direction, width, BLOCK), length)
    low, high = tl.load(lows + line), tl.load(highs + line)
    raised = tl.where(component < low, low, component)
    bounded = tl.where(raised > high, high, raised)  # NaN stays, as in torch
    if bounded == component:
        return
    add_multiple(row, direction, tl.div_rn(bounded - component, length), width, BLOCK)


def clamp(rows: Tensor, slots: Tensor, *, directions: Tensor, lows: Tensor, highs: Tensor) -> Launch:
    """`rows` [N, H], `slots` [N], `directions` [S, H], `lows` and `highs` [S]."""
    count, width = rows.shape
    args = (rows, slots, directions, lows, highs, width, rows.stride(0))
    return Launch(clamp_kernel, (count,), args, {"BLOCK": block_size(width)})
