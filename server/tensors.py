"""Tensors that tenants upload, by the sha256 of their safetensors bytes, and by names if they like. None sees another's."""

from __future__ import annotations

import threading
from http import HTTPStatus

from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.names import nearest
from nnsight_vllm.server.tensor_bytes import header_of


class _Shelf:
    """One tenant's."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.names: dict[str, str] = {}  # digest by name

    @property
    def bytes(self) -> int:
        return sum(map(len, self.data.values())) + sum(len(name) for name in self.names)

    def digest_of(self, reference: str, param: str) -> str:
        """Raises `Refused` with status 404."""
        digest = self.names.get(reference, reference)
        if digest not in self.data:
            message = f"no tensor {reference[:64]!r}{nearest(reference, self.names)}"
            raise Refused(message, param, status=HTTPStatus.NOT_FOUND, kind="NotFoundError")
        return digest


class TensorStore:
    """At most `max_bytes` for each tenant, names included. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._shelves: dict[str, _Shelf] = {}
        self._lock = threading.Lock()

    def put(self, tenant: str, digest: str, data: bytes, name: str | None = None) -> None:
        """Keep a checked tensor. Raises `Refused` where there is no room; a name moves to its new tensor."""
        with self._lock:
            shelf = self._shelves.setdefault(tenant, _Shelf())
            more = 0 if digest in shelf.data else len(data)
            more += len(name) if name is not None and name not in shelf.names else 0
            if shelf.bytes + more > self._max_bytes:
                raise Refused(
                    f"{shelf.bytes} bytes of tensors are stored, {more} more don't fit; the limit is {self._max_bytes}: "
                    f"delete some",
                    status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    kind="AdmissionError",
                )
            shelf.data[digest] = data
            if name is not None:
                shelf.names[name] = digest

    def get(self, tenant: str, reference: str, param: str = "tensor") -> tuple[str, bytes]:
        """Digest and bytes by digest or name. Raises `Refused`, whose place in the body is `param`."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            digest = shelf.digest_of(reference, param)
            return digest, shelf.data[digest]

    def by_digest(self, tenant: str, digest: str) -> bytes | None:
        """None where the tenant has none."""
        with self._lock:
            return self._shelves.get(tenant, _Shelf()).data.get(digest)

    def delete(self, tenant: str, reference: str) -> None:
        """Forget a tensor with all its names. Raises `Refused`. Requests that run keep theirs."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            digest = shelf.digest_of(reference, "tensor")
            del shelf.data[digest]
            shelf.names = {name: known for name, known in shelf.names.items() if known != digest}

    def list(self, tenant: str) -> list[dict[str, object]]:
        """Each with `digest`, `names`, `bytes`, `dtype` and `shape`, oldest first."""
        with self._lock:
            shelf = self._shelves.get(tenant, _Shelf())
            return [
                {
                    "digest": digest,
                    "names": sorted(name for name, known in shelf.names.items() if known == digest),
                    "bytes": len(data),
                    **header_of(data),
                }
                for digest, data in shelf.data.items()
            ]
