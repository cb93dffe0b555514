"""Saved tensors that are too large for an answer, kept until they are fetched once, too old, or pushed out by newer ones."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from nnsight_vllm.server.errors import Refused


@dataclass(frozen=True)
class _Result:
    data: bytes
    until: float


class ResultStore:
    """For each tenant at most `count` results with `bytes` in all, each for `seconds`. Any thread may use it."""

    def __init__(self, count: int, bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._bytes, self._seconds, self._clock = count, bytes, seconds, clock
        self._kept: dict[str, dict[str, _Result]] = {}  # by tenant and id, oldest first
        self._lock = threading.Lock()

    def add(self, tenant: str, data: bytes) -> str:
        """Keep it, in the place of the tenant's oldest where there's no room. Returns its id, which can't be guessed."""
        if len(data) > self._bytes:
            raise Refused(
                f"a result of {len(data)} bytes; the limit is {self._bytes}", "intervention", kind="AdmissionError"
            )
        id = secrets.token_urlsafe(24)
        with self._lock:
            self._expire()
            kept = self._kept.setdefault(tenant, {})
            size = sum(len(one.data) for one in kept.values())
            while kept and (len(kept) >= self._count or size + len(data) > self._bytes):
                size -= len(kept.pop(next(iter(kept))).data)
            kept[id] = _Result(data, self._clock() + self._seconds)
        return id

    def get(self, tenant: str, id: str) -> bytes:
        """Raises `Refused` with status 404, for another tenant's as for an unknown one."""
        with self._lock:
            self._expire()
            found = self._kept.get(tenant, {}).get(id)
        if found is None:
            raise Refused(
                "no such result: it was fetched already, is too old, or gave way to newer ones",
                "id",
                status=HTTPStatus.NOT_FOUND,
                kind="NotFoundError",
            )
        return found.data

    def drop(self, tenant: str, id: str) -> None:
        """Forget it, if it's there."""
        with self._lock:
            self._kept.get(tenant, {}).pop(id, None)

    def _expire(self) -> None:
        now = self._clock()
        for tenant, kept in list(self._kept.items()):
            self._kept[tenant] = {id: one for id, one in kept.items() if one.until > now}
