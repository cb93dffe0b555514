"""What a step sends home, on its way from the worker to vLLM's scheduler.

A message is the bytes of a `Delta`, or of a list of them where several programs of a request have something to say. Those of
a group are lines of one buffer and travel as that: one tensor a group, whatever the number of its requests. The scheduler
takes them apart, since vLLM hands on results request by request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnsight_vllm.graph.codec import encode_delta
from nnsight_vllm.graph.results import Delta, Failure

Ints = NDArray[np.int64]
RELEASED = "nnsight_vllm_released"  # what our scheduler adds to its output
Address = tuple[str, str]
"""A bundle and a key."""


@dataclass
class Released:
    """From the scheduler: uses that nobody will have, one entry each, and bundles that are over."""

    unused: list[Address] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.unused or self.bundles)


def message_of(delta: Delta) -> Tensor:
    return torch.frombuffer(bytearray(encode_delta(delta)), dtype=torch.uint8)


_LIST = 0xDC  # msgpack's first byte of a list whose length is in the two bytes after it


@dataclass
class Messages:
    """Of one step. `single`: by request. `together`: requests by their places in the batch, and a line [bytes] for each.

    `last`: requests whose graph stopped or failed, so that this is their last message. Of requests with links to others:
    `made`, values that are there from now on, and why some `failed`. `early`: last messages of requests that failed before their
    prompt was all there, which have no output in this step.
    """

    single: dict[str, Tensor] = field(default_factory=dict)
    last: set[str] = field(default_factory=set)
    together: list[tuple[Ints, Tensor]] = field(default_factory=list)
    made: list[Address] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)
    early: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.single or self.together or self.made or self.early)

    def add(self, id: str, message: Tensor) -> None:
        """One more message of a request."""
        self.single[id] = joined(self.single.get(id), message)

    @property
    def num_bytes(self) -> int:
        """Of all messages."""
        single = sum(message.nbytes for message in self.single.values())
        return single + sum(lines.nbytes for _, lines in self.together)

    def packed(self, index: Mapping[str, int]) -> Packed:
        """For the journey; `index`: places in the batch by request."""
        places = [(index[id], message) for id, message in self.single.items()]
        return Packed(
            places,
            [(torch.from_numpy(at), lines) for at, lines in self.together],
            self.last,
            self.made,
            self.failed,
            self.early,
        )


@dataclass(frozen=True)
class Packed:
    """Messages by their places in the batch; the rest by request."""

    single: list[tuple[int, Tensor]]
    together: list[tuple[Tensor, Tensor]]
    last: set[str]
    made: list[Address]
    failed: dict[str, Failure]
    early: dict[str, Tensor]

    def unpacked(self, num_requests: int) -> list[Tensor | None]:
        """A message or none for each request of the batch."""
        found: list[Tensor | None] = [None] * num_requests
        for place, message in self:
            found[place] = joined(found[place], message)
        return found

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        yield from self.single
        for places, lines in self.together:
            yield from zip(places.tolist(), lines.unbind(), strict=True)


def joined(first: Tensor | None, second: Tensor) -> Tensor:
    """Two messages as one: msgpack's list of what is in them. A `Delta` itself is a map there."""
    if first is None:
        return second
    is_list = int(first[0]) == _LIST
    count, rest = (int(first[1]) << 8 | int(first[2]), first[3:]) if is_list else (1, first)
    head = torch.tensor([_LIST, (count + 1) >> 8, (count + 1) & 0xFF], dtype=torch.uint8)
    return torch.cat([head, rest, second])
