"""Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest even, and loses subnormal bfloat16.

`install` lets torch convert between floating types. Triton 3.9: `InterpreterBuilder.cast_impl`, `_convert_float`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

_TYPES = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
_RAW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def install() -> None:
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(builder: Any, source: Any, target_type: Any) -> Any:
        source_type, target = source.dtype.scalar, target_type.scalar
        if source_type not in _TYPES or target not in _TYPES:
            return original(builder, source, target_type)
        data = interpreter.np.ascontiguousarray(source.data).view(f"i{source.data.dtype.itemsize}")
        values = torch.from_numpy(data).view(_TYPES[source_type]).to(_TYPES[target])
        raw = values.view(_RAW[_TYPES[target]]).numpy().view(interpreter._get_np_dtype(target))
        return interpreter.TensorHandle(raw.reshape(source.data.shape), target)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
