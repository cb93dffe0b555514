"""Edits that have a kernel of their own: `edits.project_out(h, direction)`, on a site or on any tensor, in place.

    from nnsight_vllm import edits

    with model.trace(prompt):
        edits.clamp(model.model.layers[10].output[0], direction, high=4.0)

Each changes `h` [..., H] and returns it. They compute in float32 and round once, to the dtype of h. To add, scale, replace
or ablate, write `h += v`, `h *= c`, `h[:] = v` or `h[:] = 0`: those have kernels too. Formulas: `kernels/reference.py`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any


def project_out(h: Any, direction: Any, strength: Any = 1.0) -> Any:
    """`h -= strength * (h·d) / (d·d) * d`: with 1 nothing is left along the direction d, [H]."""
    return _edit("project_out", h, direction, strength)


def clamp(h: Any, direction: Any, low: Any = -math.inf, high: Any = math.inf) -> Any:
    """Move h along the direction [H], as little as needed, so that its component `h·d / |d|` is from `low` to `high`."""
    return _edit("clamp", h, direction, low, high)


def norm_matched_add(h: Any, vector: Any, strength: Any = 1.0) -> Any:
    """`h + strength * vector`, scaled back to the length of h. `vector` [H]."""
    return _edit("norm_matched_add", h, vector, strength)


def low_rank(h: Any, down: Any, up: Any, strength: Any = 1.0) -> Any:
    """`h += strength * up @ (down @ h)`. `down` [r, H], `up` [H, r]."""
    return _edit("low_rank", h, down, up, strength)


def sae_clamp(h: Any, encoder: Any, decoder: Any, value: Any, bias: Any = 0.0) -> Any:
    """Set one feature of a sparse autoencoder: `h += (value - relu(encoder·h + bias)) * decoder`. Both rows [H]."""
    return _edit("sae_clamp", h, encoder, bias, decoder, value)


def _edit(operation: str, h: Any, *values: Any) -> Any:
    from nnsight_vllm.kernels.single import check, edit_all
    from nnsight_vllm.trace.recorder import current
    from nnsight_vllm.trace.recording import is_recording

    if not is_recording():
        return edit_all(operation, h, *values)
    return current(f"edits.{operation}()").op(f"edit.{operation}_", partial(check, operation), (h, *values), {})


__all__ = ["clamp", "low_rank", "norm_matched_add", "project_out", "sae_clamp"]
