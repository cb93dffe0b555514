"""What a request used up of its limits, and the values that all requests hold.

Time and loop trips are those of one step and start again with the next one. Memory is measured, not counted: whenever values
of so many bytes were made, what every request holds is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.wire.limits import Limits

OVERHEAD = 64  # bytes that any Python value takes at least, as far as this matters


@dataclass
class Spent:
    """Of one request, or of each of a group's as members of it: in the step with number `step`. `held`: bytes when last measured."""

    step: int = -1
    seconds: float = 0.0
    trips: int = 0
    held: int = 0

    def at(self, step: int) -> Spent:
        """The same in this step."""
        if self.step != step:
            self.step, self.seconds, self.trips = step, 0.0, 0
        return self

    def trip(self, limits: Limits) -> None:
        """One more trip of a loop."""
        self.trips += 1
        if self.trips > limits.trips:
            raise InterventionError(
                f"the request's loops made {self.trips} trips in one step; the limit `trips` is {limits.trips}"
            )


def over_time(seconds: float, limits: Limits) -> InterventionError:
    return InterventionError(
        f"the request's program ran for {seconds:.3g} s in one step; the limit `seconds` is {limits.seconds:g}"
    )


def bytes_of(value: Any) -> int:
    """About the bytes of a value that an operation just made; views count as if they were copies."""
    if isinstance(value, Tensor):
        return value.nbytes + OVERHEAD
    if isinstance(value, list | tuple):
        return OVERHEAD + sum(item.nbytes + OVERHEAD if isinstance(item, Tensor) else 8 for item in value)
    return OVERHEAD + len(value) if isinstance(value, str) else OVERHEAD


class Storages:
    """Adds up the memory of values: memory that several share once, and that in `known` not at all."""

    def __init__(self, known: Iterable[Any] = ()) -> None:
        self._seen: set[int] = {value.untyped_storage().data_ptr() for value in known if isinstance(value, Tensor)}
        self._containers: set[int] = set()
        self.num_bytes = 0

    def add(self, value: Any) -> None:
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                self._add_tensor(item)
            elif isinstance(item, list | tuple | dict):
                if id(item) in self._containers:
                    continue
                self._containers.add(id(item))
                self.num_bytes += OVERHEAD
                stack += [*item.keys(), *item.values()] if isinstance(item, dict) else item
            else:
                self.num_bytes += 8 + (len(item) if isinstance(item, str) else 0)

    def _add_tensor(self, tensor: Tensor) -> None:
        self.num_bytes += OVERHEAD
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()


class Holdings:
    """Bytes of the values that requests hold. `measure` looks them up, writes each request's into its `Spent`, and says the sum."""

    def __init__(self, limits: Limits, measure: Callable[[], int]) -> None:
        self._limits = limits
        self._measure = measure
        self._made = 0
        self._pause = min(limits.held_bytes, limits.held_bytes_in_all) // 4
        self.in_all = 0

    def made(self, num_bytes: int) -> bool:
        """Count what was made. Whether it was so much that everything was measured again."""
        self._made += num_bytes
        if self._made < self._pause:
            return False
        self._made = 0
        self.in_all = self._measure()
        return True

    def excess(self, held: int) -> str:
        """What is over its limit if a request holds so many bytes, in words; empty where nothing is."""
        if held > self._limits.held_bytes:
            return f"the request holds values of {held} bytes; the limit `held_bytes` is {self._limits.held_bytes}"
        if self.in_all > self._limits.held_bytes_in_all:
            return (
                f"the requests that run hold values of {self.in_all} bytes; the limit `held_bytes_in_all` is "
                f"{self._limits.held_bytes_in_all}"
            )
        return ""
