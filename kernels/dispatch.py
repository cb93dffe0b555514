"""Edit rows: by the reference on a CPU, by Triton on a GPU, unless the caller or NNSIGHT_VLLM_KERNELS says otherwise.

Triton is imported at its first use, so the reference needs none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from nnsight_vllm.kernels import reference
from nnsight_vllm.kernels.columns import COLUMNS
from nnsight_vllm.kernels.table import DTYPES

if TYPE_CHECKING:
    from nnsight_vllm.kernels.launch import Launch

KernelBackend = Literal["reference", "triton"]
VARIABLE = "NNSIGHT_VLLM_KERNELS"


def edit(
    rows: Tensor, operation: str, slots: Tensor, columns: Mapping[str, Tensor], force: KernelBackend | None = None
) -> None:
    """One operation: `rows` [N, H] in place, row i by line `slots[i]` (int32 [N]; negative: not) of `columns`."""
    _check(rows, operation, slots, columns)
    if choose(rows.device, force) == "triton":
        launch(rows, operation, slots, columns).run()
    else:
        getattr(reference, operation)(rows, slots, **columns)


def added(slots: Tensor, columns: Mapping[str, Tensor]) -> Tensor | None:
    """What `edit` by "add" adds on a CPU to rows that all have a line: [N, H], or [1, H] where they share one.

    `rows.add_(it)` gives the same bits, so who comes back with the same slots gathers their lines once. None: use `edit`.
    """
    if choose(columns["vectors"].device) != "reference" or bool((slots < 0).any()):
        return None
    lines, owner = slots.unique_consecutive(return_inverse=True)
    whole = reference.product(lines.long(), **columns)
    return whole if len(lines) in (1, len(slots)) else whole[owner]


def choose(device: torch.device, force: KernelBackend | None = None) -> KernelBackend:
    """Who edits rows on this device: the argument, else the environment, else what suits the device."""
    name = force or os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" else "reference")
    if name not in ("reference", "triton"):
        raise ValueError(f"{VARIABLE}: expected 'reference' or 'triton'; got {name!r}")
    return cast(KernelBackend, name)


def launch(rows: Tensor, operation: str, slots: Tensor, columns: Mapping[str, Tensor]) -> Launch:
    """The kernel's launch, not run. Its shapes are taken as they are."""
    return _launchers()[operation](rows, slots, **columns)


@functools.cache
def _launchers() -> dict[str, Callable[..., Launch]]:
    """Imported here, for they import Triton."""
    from nnsight_vllm.kernels.add import add
    from nnsight_vllm.kernels.clamp import clamp
    from nnsight_vllm.kernels.low_rank import low_rank
    from nnsight_vllm.kernels.norm_matched_add import norm_matched_add
    from nnsight_vllm.kernels.project_out import project_out
    from nnsight_vllm.kernels.replace import ablate, replace
    from nnsight_vllm.kernels.sae_clamp import sae_clamp
    from nnsight_vllm.kernels.scale import scale

    functions = (ablate, add, clamp, low_rank, norm_matched_add, project_out, replace, sae_clamp, scale)
    return {function.__name__: function for function in functions}


def _check(rows: Tensor, operation: str, slots: Tensor, columns: Mapping[str, Tensor]) -> None:
    """Shapes and dtypes only: nothing is read from the device. That slots have lines is the table's promise."""
    if rows.ndim != 2 or rows.dtype not in DTYPES or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"expected rows [N, H] of a dtype out of {DTYPES}, H contiguous; "
            f"got {rows.dtype} {list(rows.shape)} with strides {list(rows.stride())}"
        )
    fits = slots.shape == rows.shape[:1] and slots.dtype == torch.int32 and slots.device == rows.device
    if not fits or not slots.is_contiguous():
        raise ValueError(
            f"expected int32 slots [{rows.shape[0]}] on {rows.device}, contiguous; "
            f"got {slots.dtype} {list(slots.shape)} on {slots.device}"
        )
    names = [column.name for column in COLUMNS[operation]]
    if sorted(columns) != sorted(names):
        raise ValueError(f"expected the columns {names} for {operation}; got {sorted(columns)}")
    for column in COLUMNS[operation]:
        _check_column(rows, operation, column.name, column.shape, columns[column.name])


def _check_column(rows: Tensor, operation: str, name: str, shape: tuple[str, ...], values: Tensor) -> None:
    fits = values.ndim == 1 + len(shape) and values.device == rows.device and values.is_contiguous()
    fits = fits and (values.dtype in DTYPES if shape else values.dtype == torch.float32)
    if not fits or any(d == "width" and n != rows.shape[1] for d, n in zip(shape, values.shape[1:], strict=True)):
        raise ValueError(
            f"{operation}.{name}: expected {['slots', *shape]} of width {rows.shape[1]} on {rows.device}, contiguous; "
            f"got {values.dtype} {list(values.shape)} on {values.device}"
        )
