"""What a request carries beside vLLM's own sampling parameters: one key of `extra_args`, msgpack bytes, read by scheduler and worker."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from nnsight_vllm.graph.links import Links

KEY = "nnsight_vllm"
"""Of `extra_args`, and of vLLM's `additional_config` for the engine's settings."""

MAX_PROGRAMS = 64
"""Graphs in one request."""


class RequestExtras(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`graphs`: msgpack bytes each, in the order in which they run at a site. `links`: those to requests of its bundle.

    `is_chunkable`: the prompt may be computed in several steps. `most_cached`: so many of its tokens may come from the prefix
    cache; None: any number. `salt`: of the prompt's blocks, and the first row that it's for; None: there is none but vLLM's own.
    """

    graphs: list[bytes] = []
    links: Links | None = None
    is_chunkable: bool = False
    most_cached: int | None = None
    salt: tuple[str, int] | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RequestExtras)
_NO_GRAPH = RequestExtras([b""])


def encode_extras(extras: RequestExtras) -> dict[str, Any]:
    """As vLLM's `extra_args` hold it."""
    return {KEY: _encoder.encode(extras)}


def decode_extras(sampling_params: Any) -> RequestExtras | None:
    """None for a plain request. What isn't ours comes as a graph that is none, which the worker refuses as that request's failure."""
    data = (getattr(sampling_params, "extra_args", None) or {}).get(KEY)
    if data is None:
        return None
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, TypeError):
        return _NO_GRAPH
