"""Graphs as bytes: msgpack for the engine, JSON for HTTP and for people.

Decoding checks types, tags and unknown fields; it never runs or imports anything that the bytes name.
"""

from __future__ import annotations

import hashlib

import msgspec

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.nodes import VERSION, Graph
from nnsight_vllm.graph.results import Delta, Saved

_graph_encoder = msgspec.msgpack.Encoder()
_graph_decoder = msgspec.msgpack.Decoder(Graph)
_json_decoder = msgspec.json.Decoder(Graph)
_delta_decoder = msgspec.msgpack.Decoder(Delta | list[Delta])
_saved_decoder = msgspec.msgpack.Decoder(list[Saved])


def encode(graph: Graph) -> bytes:
    """The graph as msgpack."""
    return _graph_encoder.encode(graph)


def decode(data: bytes) -> Graph:
    """The graph in these msgpack bytes. Raises `GraphError` with the path of what doesn't fit."""
    return _decode(_graph_decoder, data)


def to_json(graph: Graph) -> str:
    """The graph as JSON text."""
    return msgspec.json.encode(graph).decode()


def from_json(text: str | bytes) -> Graph:
    """The graph in this JSON text. Raises `GraphError` with the path of what doesn't fit."""
    return _decode(_json_decoder, text)


def digest(data: bytes) -> str:
    """The content address of tensors and programs: sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def encode_delta(delta: Delta) -> bytes:
    """One step's results as msgpack."""
    return _graph_encoder.encode(delta)


def decode_deltas(data: bytes | memoryview) -> list[Delta]:
    """One step's results from msgpack: one delta, or several where a request has several programs."""
    found = _delta_decoder.decode(data)
    return found if isinstance(found, list) else [found]


def encode_saved(saved: list[Saved]) -> msgspec.Raw:
    """The first part of a sheet."""
    return msgspec.Raw(_graph_encoder.encode(saved))


def decode_saved(data: msgspec.Raw) -> list[Saved]:
    """What a sheet holds."""
    return _saved_decoder.decode(data)


def _decode(decoder: msgspec.msgpack.Decoder[Graph] | msgspec.json.Decoder[Graph], data: str | bytes) -> Graph:
    try:
        graph = decoder.decode(data)  # type: ignore[arg-type]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise GraphError(f"not an intervention graph: {error}") from None
    if graph.version != VERSION:
        raise GraphError(f"graph version {graph.version}; this engine reads version {VERSION}")
    return graph
