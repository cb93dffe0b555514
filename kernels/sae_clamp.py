"""a = relu(e·h + b); h += (target - a) * d; nothing is written where a is the target"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nnsight_vllm.kernels.launch import Launch, add_multiple, block_size, dot, line_of, row_start


@triton.jit
def sae_clamp_kernel(
    rows: tl.tensor,
    slots: tl.tensor,
    encoders: tl.tensor,
    biases: tl.tensor,
    decoders: tl.tensor,
    targets: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    line = line_of(slots)
    if line < 0:
        return
    row = row_start(rows, row_stride)
    raw = dot(encoders + line * width, row, width, BLOCK) + tl.load(biases + line)
    activation = tl.where(raw < 0.0, 0.0, raw)  # NaN stays, as in torch
    missing = tl.load(targets + line) - activation
    if missing == 0.0:
        return
    add_multiple(row, decoders + line * width, missing, width, BLOCK)


def sae_clamp(
    rows: Tensor, slots: Tensor, *, encoders: Tensor, biases: Tensor, decoders: Tensor, targets: Tensor
) -> Launch:
    """`rows` [N, H], `slots` [N], `encoders` and `decoders` [S, H], `biases` and `targets` [S]."""
    count, width = rows.shape
    args = (rows, slots, encoders, biases, decoders, targets, width, rows.stride(0))
    return Launch(sae_clamp_kernel, (count,), args, {"BLOCK": block_size(width)})
