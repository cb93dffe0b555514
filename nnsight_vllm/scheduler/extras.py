"""A request's extras, as the scheduler asks for them: decoded once, when they are first looked at."""

from __future__ import annotations

from typing import Any

from nnsight_vllm.wire.extras import RequestExtras, decode_extras

_ATTRIBUTE = "nnsight_vllm_extras"


def extras_of(request: Any) -> RequestExtras | None:
    """Of a request of vLLM's scheduler, which keeps them as long as it lives; None for a plain one."""
    try:
        known: RequestExtras | None = getattr(request, _ATTRIBUTE)
    except AttributeError:
        known = decode_extras(request.sampling_params)
        setattr(request, _ATTRIBUTE, known)
    return known


def has_graph(request: Any) -> bool:
    return extras_of(request) is not None
