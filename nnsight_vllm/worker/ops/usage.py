"""What a request used up of its limits, and the values that all requests hold.

Time and loop trips are those of one step and start again with the next one. Memory is measured, not counted: whenever values
of so many bytes were made, what every request holds is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.lanes.lanes import Each, Items, Lane, Rows, Several, Shared, View

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


class Clock:
    """Charges whoever runs with the time that it takes. `step`: the number of the step that runs."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.seconds
        self.step = 0
        self._began = 0.0  # since when the time isn't counted; 0: the clock doesn't run
        self._charged = 0.0  # seconds since then that were charged by themselves

    def start(self, spent: Spent) -> float:
        """Returns when the time for this step is up, on `perf_counter`."""
        self._began, self._charged = perf_counter(), 0.0
        return self._began + self._seconds - spent.at(self.step).seconds

    def lap(self, spent: Spent, num: int) -> None:
        """Charge what `num` requests used together, in equal parts."""
        if self._began:
            now = perf_counter()
            spent.seconds += (now - self._began - self._charged) / num
            self._began, self._charged = now, 0.0

    def stop(self, spent: Spent, num: int) -> None:
        self.lap(spent, num)
        self._began = 0.0

    def charge(self, spent: Spent, seconds: float) -> float:
        """Charge one request with time of its own. Returns all of its own in this step."""
        spent.at(self.step).seconds += seconds
        self._charged += seconds
        return spent.seconds


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
                stack += self._opened(item)
            else:
                self.num_bytes += 8 + (len(item) if isinstance(item, str) else 0)

    def _opened(self, container: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
        """What is in a container, the first time that one comes to it."""
        if id(container) in self._containers:
            return ()
        self._containers.add(id(container))
        self.num_bytes += OVERHEAD
        return [*container.keys(), *container.values()] if isinstance(container, dict) else container

    def add_lane(self, lane: Lane) -> None:
        """What a group's members have together."""
        match lane:
            case Each() | Rows():
                self.add(lane.tensor)
            case View() if getattr(lane.memory, "is_read", True):
                self.add(lane.memory.tensor)
            case Several():
                for part in lane.lanes:
                    self.add(part.tensor)
            case Shared():
                self.add(lane.value)

    def _add_tensor(self, tensor: Tensor) -> None:
        self.num_bytes += OVERHEAD
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()


class Holder(Protocol):
    """Whoever has values: of one request or of several."""

    def held(self) -> Iterable[tuple[Spent, int]]:
        """Bytes, by the `Spent` of who has them."""
        ...


def measure(holders: Iterable[Holder]) -> int:
    """Write what each request holds into its `Spent`. Returns the bytes of all."""
    held: dict[int, tuple[Spent, int]] = {}
    for holder in {id(holder): holder for holder in holders}.values():
        for spent, num_bytes in holder.held():
            _, known = held.get(id(spent), (spent, 0))
            held[id(spent)] = spent, known + num_bytes
    for spent, num_bytes in held.values():
        spent.held = num_bytes
    return sum(num_bytes for _, num_bytes in held.values())


def bytes_each(lanes: Iterable[Lane], known: list[Any], num: int) -> list[int]:
    """What each of `num` members of a group holds besides `known`; what they have together counts for each in equal parts."""
    common, own = Storages(known), [Storages(known) for _ in range(num)]
    for lane in lanes:
        if not isinstance(lane, Items):
            common.add_lane(lane)
            continue
        for storages, value in zip(own, lane.values, strict=True):
            storages.add(value)
    return [common.num_bytes // num + storages.num_bytes for storages in own]


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
