"""One operation's constants for all requests: a line a slot, in buffers of fixed addresses.

A slot belongs to a content: equal contents share one, its users are counted, and it is free again with its last. Slots
are given and taken on the host at any time; the buffers change only in `fill`, once a step, before the forward. So a
step that is on the device never sees a line change under it, as long as both use one stream.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from nnsight_vllm.kernels.columns import COLUMNS, needs_rank

Line = Mapping[str, Tensor | float]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_logger = logging.getLogger(__name__)


class Table:
    """`columns`: name -> [capacity, ...]. `generation` counts how often `fill` had to move them to larger buffers."""

    def __init__(
        self,
        operation: str,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        rank: int | None = None,
        capacity: int = 8,
    ) -> None:
        """`width`: H of its sites. `dtype`: of its vectors, the user's own. `rank`: r, where the operation has one."""
        if operation not in COLUMNS:
            raise ValueError(f"expected an operation out of {sorted(COLUMNS)}; got {operation!r}")
        if dtype not in DTYPES:
            raise ValueError(f"expected a dtype out of {DTYPES} for a table; got {dtype}")
        if needs_rank(operation) != (rank is not None):
            raise ValueError(f"{operation} {'needs a rank' if rank is None else 'has no rank'}; got rank={rank}")
        if width < 1 or capacity < 1 or (rank is not None and rank < 1):
            raise ValueError(f"expected sizes from 1; got width={width}, rank={rank}, capacity={capacity}")
        self.operation = operation
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self.generation = 0
        self._shapes = {column.name: column.sizes(width, rank or 0) for column in COLUMNS[operation]}
        self._capacity = capacity
        self.columns = self._empty(capacity)
        self._slots: dict[Hashable, int] = {}
        self._keys: dict[int, Hashable] = {}
        self._users: dict[int, int] = {}
        self._free: list[int] = []
        self._pending: dict[int, dict[str, Tensor]] = {}

    @property
    def capacity(self) -> int:
        """The lines that the buffers hold."""
        return self._capacity

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._keys)

    @property
    def num_users(self) -> int:
        return sum(self._users.values())

    @property
    def is_filled(self) -> bool:
        """Whether every slot in use has its line in the buffers."""
        return not self._pending

    def holds(self, slot: int) -> bool:
        """Whether the slot is in use and its line in the buffers."""
        return slot in self._keys and slot not in self._pending

    def acquire(self, key: Hashable, line: Line) -> int:
        """The slot of this content, for one more user. `key` names the whole line: equal keys are taken for equal lines.

        A tensor of the line has the shape of its column and the table's dtype; a number may be any Python number.
        """
        slot = self._slots.get(key)
        if slot is None:
            values = self._checked(line)
            slot = heapq.heappop(self._free) if self._free else len(self._keys)
            self._slots[key], self._keys[slot], self._users[slot] = slot, key, 0
            self._pending[slot] = values
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """One user less. With the last the slot is free; its line stays in the buffers until the slot has another."""
        if slot not in self._users:
            raise ValueError(f"expected a slot in use; slot {slot} of the table for {self.operation} is free")
        self._users[slot] -= 1
        if self._users[slot] == 0:
            del self._slots[self._keys.pop(slot)], self._users[slot]
            self._pending.pop(slot, None)
            heapq.heappush(self._free, slot)

    def fill(self) -> bool:
        """Bring new lines to the device. True: the buffers moved to make room, so a captured graph must be captured again."""
        if not self._pending:
            return False
        has_moved = self._grow(max(self._pending) + 1)
        index = torch.tensor(list(self._pending), device=self.device)
        for name, buffer in self.columns.items():
            buffer.index_copy_(0, index, torch.stack([line[name] for line in self._pending.values()]).to(self.device))
        self._pending.clear()
        return has_moved

    def check_integrity(self) -> None:
        """Raise AssertionError where the books don't agree."""
        used = set(self._keys)
        assert used == set(self._users) == set(self._slots.values()) and len(used) == len(self._slots)
        assert all(count > 0 for count in self._users.values())
        assert used.isdisjoint(self._free) and len(set(self._free)) == len(self._free)
        assert used | set(self._free) == set(range(len(used) + len(self._free)))
        assert set(self._pending) <= used
        assert all(slot < self._capacity or slot in self._pending for slot in used)

    def _checked(self, line: Line) -> dict[str, Tensor]:
        """The line as tensors on one device. Errors belong to who brings the line, so none is left for `fill`."""
        if set(line) != set(self._shapes):
            raise ValueError(f"expected a line of {sorted(self._shapes)} for {self.operation}; got {sorted(line)}")
        return {name: self._checked_value(name, line[name]) for name in self._shapes}

    def _checked_value(self, name: str, value: Tensor | float) -> Tensor:
        shape = self._shapes[name]
        if not shape and isinstance(value, int | float):
            return torch.tensor(float(value), dtype=torch.float32)
        if not shape or not isinstance(value, Tensor):
            raise ValueError(
                f"{self.operation}.{name}: expected a {'tensor' if shape else 'number'}; got {value!r:.80}"
            )
        if tuple(value.shape) != shape or value.dtype != self.dtype:
            raise ValueError(
                f"{self.operation}.{name}: expected {self.dtype} {list(shape)}; got {value.dtype} {list(value.shape)}"
            )
        return value.detach().to(self.device)

    def _grow(self, needed: int) -> bool:
        if needed <= self._capacity:
            return False
        capacity = self._capacity
        while capacity < needed:
            capacity *= 2
        grown = self._empty(capacity)
        for name, buffer in self.columns.items():
            grown[name][: self._capacity] = buffer
        self.columns, self._capacity = grown, capacity
        self.generation += 1
        _logger.info("the table for %s grew to %d lines of width %d", self.operation, capacity, self.width)
        return True

    def _empty(self, capacity: int) -> dict[str, Tensor]:
        """Zeros: a line that was never filled is at least no stranger's memory."""
        return {
            name: torch.zeros(capacity, *shape, dtype=self.dtype if shape else torch.float32, device=self.device)
            for name, shape in self._shapes.items()
        }
