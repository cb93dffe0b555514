"""What a request with a graph may share of the prefix cache: its salt, made here from what its blocks depend on."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence

from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.graph.wire import decode
from nnsight_vllm.plan.caching import Caching, Salt, caching_of

_NAME = "nnsight_vllm"


def caching_by(catalogue: Catalogue) -> Callable[[bytes, Mapping[str, bytes]], Caching]:
    """A function: how a graph and the cache may meet, given the graph's constants as safetensors bytes by digest.

    Bytes that are no legal graph share nothing; the worker refuses them.
    """
    trailing = {site.name: len(site.shape) - 1 for site in catalogue.sites}

    def caching(graph: bytes, tensors: Mapping[str, bytes]) -> Caching:
        try:
            return caching_of(decode(graph), trailing.__getitem__, lambda digest: _rank(tensors[digest]))
        except Exception:  # a stranger's bytes may be wrong in any way
            return Caching(Salt.UNIQUE, False)

    return caching


def salt_of(salt: Salt, graph: bytes, prompt: Sequence[int], own: str | None) -> str | None:
    """The salt of a request's blocks. `own`: what the user asked for, which is part of it. None: plain blocks."""
    if salt is Salt.NONE:
        return own
    if salt is Salt.UNIQUE:
        return f"{_NAME}:{uuid.uuid4().hex}"
    parts: list[bytes] = [graph, (own or "").encode()]
    if salt is Salt.LENGTH:
        parts.append(len(prompt).to_bytes(8, "little"))
    elif salt is Salt.PROMPT:
        parts.append(struct.pack(f"<{len(prompt)}q", *prompt))
    found = hashlib.sha256(salt.value.encode())
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return f"{_NAME}:{found.hexdigest()}"


def _rank(data: bytes) -> int:
    """The number of dimensions of a constant: safetensors begin with the length of a JSON header."""
    length = int.from_bytes(data[:8], "little")
    (described,) = [value for name, value in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"]
    return len(described["shape"])
