"""One launch of a kernel, as data: run it, or compile it ahead for a machine that isn't there. And what kernels share.

A program (in Triton's sense) works on one row, or on one block of one row, and its block depends on the width alone. So a
row's result doesn't depend on how many rows there are, nor on the others' edits. A row with a negative slot is left
at once. No launch reads anything on the host, so a CUDA graph can hold it; the launch must have run once before, to
be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
# ptxas would fuse a product and a sum, which skips a rounding.
OPTIONS: Mapping[str, int | bool] = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Launch:
    """`kernel`: a `triton.jit` function; `args`: what it takes at run time, in order; `constants`: what it is compiled for."""

    kernel: triton.KernelInterface
    grid: tuple[int, ...]
    args: tuple[Tensor | int, ...]
    constants: Mapping[str, int]

    def run(self) -> None:
        if isinstance(self.kernel, triton.JITFunction) and any(isinstance(a, Tensor) and a.is_cpu for a in self.args):
            raise RuntimeError(
                "Triton runs on a CPU in its interpreter only: set TRITON_INTERPRET=1 in the environment of a process "
                "of its own, before anything imports triton"
            )
        if all(self.grid):
            self.kernel[self.grid](*self.args, **self.constants, **OPTIONS)


def block_size(width: int) -> int:
    return min(power_of_two(width), MAX_BLOCK)


def num_blocks(width: int) -> int:
    return -(-width // block_size(width))


def power_of_two(number: int) -> int:
    """The smallest that isn't less."""
    return 1 << max(number - 1, 0).bit_length()


@triton.jit
def line_of(slots: tl.tensor) -> tl.tensor:
    """The table's line for this program's row; negative: leave the row alone. 64 bits: it is multiplied by the width."""
    return tl.load(slots + tl.program_id(0)).to(tl.int64)


@triton.jit
def row_start(rows: tl.tensor, row_stride: tl.tensor) -> tl.tensor:
    return rows + tl.program_id(0).to(tl.int64) * row_stride


@triton.jit
def load_float(start: tl.tensor, at: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Elements of a vector in float32, 0 behind its end."""
    return tl.load(start + at, mask=at < width, other=0.0).to(tl.float32)


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The dot product of two vectors in memory, in float32."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += load_float(left, at, width) * load_float(right, at, width)
    return tl.sum(total)


@triton.jit
def add_multiple(row: tl.tensor, vector: tl.tensor, amount: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    """`row += amount * vector`, in float32 and rounded once."""
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        changed = load_float(row, at, width) + amount * load_float(vector, at, width)
        tl.store(row + at, changed.to(row.dtype.element_ty), mask=at < width)
