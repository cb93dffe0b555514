"""What a graph lets the scheduler do with its prompt: share blocks of the prefix cache, by a salt made here, and compute it in chunks."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.plan.caching import Caching, Salt, caching_of
from nnsight_vllm.plan.chunking import Unchunked, chunking_of
from nnsight_vllm.plan.chunks import Chunked
from nnsight_vllm.plan.composed import composed

_NAME = "nnsight_vllm"
_MAX_KNOWN = 512
_DIGEST = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class CachePolicy:
    """What a request with some graphs may share, as `Caching` has it, and whether its prompt may come in chunks.

    `graph`: the bytes of all graphs that its rows depend on.
    """

    salt: Salt
    most: int | None
    first: int
    graph: bytes
    chunking: Unchunked | None


def policy_by(catalogue: Catalogue) -> Callable[[Sequence[bytes], Mapping[str, bytes], int], CachePolicy]:
    """A function: what a request may share, given its graphs, their constants as for `known_by`, and the prompt's length."""
    known = known_by(catalogue)

    def policy(graphs: Sequence[bytes], tensors: Mapping[str, bytes], num_rows: int) -> CachePolicy:
        each = [known(graph, tensors, num_rows) for graph in graphs]
        found = composed([one.caching for one in each])
        whole = next((one.chunking for one in each if isinstance(one.chunking, Unchunked)), None)
        graph = _joined([graphs[number] for number in found.covers])
        return CachePolicy(found.salt, found.most, found.first, graph, whole)

    return policy


@dataclass(frozen=True)
class Known:
    """What the scheduler has to know of a graph over a prompt. Graphs that differ in nothing but tensors share it."""

    caching: Caching
    chunking: Chunked | Unchunked


_ILLEGAL = Known(Caching(Salt.UNIQUE, 0), Unchunked("it isn't a legal graph"))


def known_by(catalogue: Catalogue) -> Callable[[bytes, Mapping[str, bytes], int], Known]:
    """A function: how a graph and the cache may meet, and whether its prompt may come in chunks.

    It's given the graph's constants as safetensors bytes by digest, and the prompt's length. Bytes that are no legal graph
    share nothing; the worker refuses them. Any thread may call it.
    """
    trailing = {site.name: len(site.shape) - 1 for site in catalogue.sites}
    found: OrderedDict[tuple[bytes, int], Known] = OrderedDict()
    lock = threading.Lock()

    def known(graph: bytes, tensors: Mapping[str, bytes], num_rows: int) -> Known:
        try:
            key = _without_tensors(graph, tensors), num_rows
        except Exception:  # a stranger's bytes may be wrong in any way
            return _ILLEGAL
        with lock:
            if key in found:
                found.move_to_end(key)
                return found[key]
        made = analysed(graph, tensors, num_rows)  # seconds for a graph of 100,000 nodes: others go on meanwhile
        with lock:
            found[key] = made
            if len(found) > _MAX_KNOWN:
                found.popitem(last=False)
        return made

    def analysed(graph: bytes, tensors: Mapping[str, bytes], num_rows: int) -> Known:
        facts = trailing.__getitem__, lambda digest: _rank(tensors[digest]), num_rows
        try:
            decoded = decode(graph)
            caching, chunking = caching_of(decoded, *facts), chunking_of(decoded, *facts)
        except Exception:  # a stranger's bytes may be wrong in any way
            return _ILLEGAL
        if caching.has_parts and isinstance(
            chunking, Unchunked
        ):  # its rows' numbers can't be told from their positions
            caching = replace(caching, most=0)
        return Known(caching, chunking)

    return known


def salt_of(salt: Salt, graph: bytes, prompt: Sequence[int], own: str | None, tenant: str = "") -> str | None:
    """The salt of a request's blocks. `own`: what the user asked for, which is part of it. None: plain blocks.

    Requests of different tenants share plain blocks only.
    """
    if salt is Salt.NONE:
        return own
    if salt is Salt.UNIQUE:
        return f"{_NAME}:{uuid.uuid4().hex}"
    parts: list[bytes] = [graph, (own or "").encode(), tenant.encode()]
    if salt is Salt.LENGTH:
        parts.append(len(prompt).to_bytes(8, "little"))
    elif salt is Salt.PROMPT:
        parts.append(struct.pack(f"<{len(prompt)}q", *prompt))
    found = hashlib.sha256(salt.value.encode())
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return f"{_NAME}:{found.hexdigest()}"


def _without_tensors(graph: bytes, tensors: Mapping[str, bytes]) -> bytes:
    """A graph's bytes with the number of a tensor's dimensions in its digest's place."""

    def named(match: re.Match[bytes]) -> bytes:
        data = tensors.get(match[0].decode())
        return match[0] if data is None else b"rank %d" % _rank(data)

    return _DIGEST.sub(named, graph)


def _joined(graphs: Sequence[bytes]) -> bytes:
    """Several as one: the bytes tell where each begins."""
    if len(graphs) == 1:
        return graphs[0]
    return b"".join(len(graph).to_bytes(8, "big") + graph for graph in graphs)


def _rank(data: bytes) -> int:
    """The number of dimensions of a constant: safetensors begin with the length of a JSON header."""
    length = int.from_bytes(data[:8], "little")
    (described,) = [value for name, value in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"]
    return len(described["shape"])
