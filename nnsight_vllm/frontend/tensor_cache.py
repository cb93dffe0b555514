"""The front end's side of the constants: which tensors the worker holds, and which may be dropped.

A tensor crosses once an engine. Tensors in use by running requests are never dropped; the others make room, least
recently used first, when the store's bound is reached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from nnsight_vllm.errors import AdmissionError

DEFAULT_LIMIT = 4 << 30


class SentTensors:
    """What the worker's store holds, mirrored. `put` and `drop` send to the worker."""

    def __init__(self, put: Callable[[list[bytes]], None], drop: Callable[[list[str]], None], limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._put = put
        self._drop = drop
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._users: dict[str, int] = {}

    def acquire(self, digests: Iterable[str], tensors: dict[str, bytes]) -> None:
        """Make sure the worker holds these, and keep them there until `release`. Raises `AdmissionError`."""
        wanted = set(digests)
        missing = [digest for digest in wanted if digest not in self._sizes]
        self._make_room(sum(len(tensors[digest]) for digest in missing), wanted)
        if missing:
            self._put([tensors[digest] for digest in missing])
        for digest in missing:
            self._sizes[digest] = len(tensors[digest])
            self.size += len(tensors[digest])
        for digest in wanted:
            self._sizes.move_to_end(digest)
            self._users[digest] = self._users.get(digest, 0) + 1

    def release(self, digests: Iterable[str]) -> None:
        """A user of these is gone."""
        for digest in set(digests):
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]

    def _make_room(self, size: int, wanted: set[str]) -> None:
        idle = [digest for digest in self._sizes if digest not in self._users and digest not in wanted]
        dropped = []
        while self.size + size > self.limit and idle:
            digest = idle.pop(0)
            self.size -= self._sizes.pop(digest)
            dropped.append(digest)
        if dropped:
            self._drop(dropped)
        if self.size + size > self.limit:
            raise AdmissionError(
                f"the tensors of this trace need {size} bytes beside {self.size} in use; the engine's store holds {self.limit}"
            )

    @property
    def in_use(self) -> int:
        """How many tensors running requests hold."""
        return len(self._users)
