"""A request's extras, as the scheduler asks for them: decoded once, when they are first looked at."""

from __future__ import annotations

from typing import Any

from nnsight_vllm.wire.extras import RequestExtras, decode_extras


def extras_of(request: Any) -> RequestExtras | None:
    """Of a request of vLLM's scheduler, which keeps them as long as it lives; None for a plain one."""
    try:
        known: RequestExtras | None = request.nnsight_vllm_extras
    except AttributeError:
        known = request.nnsight_vllm_extras = decode_extras(request.sampling_params)
    return known


def has_graph(request: Any) -> bool:
    return extras_of(request) is not None
