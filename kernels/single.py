"""One edit with one line, on all rows of a tensor: what an operation of the graph does by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from nnsight_vllm.kernels.columns import COLUMNS, Column
from nnsight_vllm.kernels.dispatch import edit
from nnsight_vllm.kernels.table import DTYPES


def edit_all(operation: str, rows: Tensor, *values: Tensor | float) -> Tensor:
    """Edit `rows` [..., H] in place and return them; `values` as the operation's columns. Raises `ValueError`, `TypeError`."""
    check(operation, rows, *values)
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    slots = torch.zeros(len(flat), dtype=torch.int32, device=rows.device)
    lines = zip(COLUMNS[operation], values, strict=True)
    columns = {column.name: _line(column, value, rows.device) for column, value in lines}
    edit(flat, operation, slots, columns)
    if flat.data_ptr() != rows.data_ptr():
        rows.copy_(flat.reshape(rows.shape))
    return rows


def check(operation: str, rows: Tensor, *values: Tensor | float) -> Tensor:
    """Raise for values that don't fit; nothing is read of them but shapes and types, so meta tensors may be asked about."""
    columns = COLUMNS[operation]
    if not isinstance(rows, Tensor) or rows.ndim == 0 or rows.dtype not in DTYPES:
        raise TypeError(f"{operation} edits a tensor [..., H] of floating point; got {_described(rows)}")
    if len(values) != len(columns):
        raise TypeError(f"{operation} takes {[column.name for column in columns]}; got {len(values)} values")
    sizes = {"width": rows.shape[-1]}
    for column, value in zip(columns, values, strict=True):
        if not column.shape:
            if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
                raise TypeError(f"{operation}: expected a number for {column.name}; got {_described(value)}")
            continue
        fits = isinstance(value, Tensor) and value.ndim == len(column.shape) and value.dtype in DTYPES
        if fits and isinstance(value, Tensor):
            fits = all(sizes.setdefault(d, n) == n for d, n in zip(column.shape, value.shape, strict=True))
        if not fits:
            expected = [sizes.get(dimension, dimension) for dimension in column.shape]
            raise ValueError(f"{operation}: expected {column.name} {expected}; got {_described(value)}")
    return rows


def _line(column: Column, value: Tensor | float, device: torch.device) -> Tensor:
    """A column of one line."""
    if column.shape and isinstance(value, Tensor):
        return value.to(device)[None].contiguous()
    return torch.tensor([float(value)], dtype=torch.float32, device=device)


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
