"""What a step sends home, on its way from the worker to vLLM's scheduler.

A message is the bytes of a `Delta`. Those of a group are lines of one buffer and travel as that: one tensor a group, whatever
the number of its requests. The scheduler takes them apart, since vLLM hands on results request by request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnsight_vllm.engine.lanes import Ints


@dataclass
class Messages:
    """Of one step. `single`: by request. `together`: requests by their places in the batch, and a line [bytes] for each.

    `last`: requests whose graph stopped or failed, so that this is their last message.
    """

    single: dict[str, Tensor] = field(default_factory=dict)
    last: set[str] = field(default_factory=set)
    together: list[tuple[Ints, Tensor]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.single or self.together)

    def packed(self, index: Mapping[str, int]) -> Packed:
        """For the journey; `index`: places in the batch by request."""
        places = [(index[id], message) for id, message in self.single.items()]
        return Packed(places, [(torch.from_numpy(at), lines) for at, lines in self.together], self.last)


@dataclass(frozen=True)
class Packed:
    """Messages by their places in the batch; `last` by request."""

    single: list[tuple[int, Tensor]]
    together: list[tuple[Tensor, Tensor]]
    last: set[str]

    def unpacked(self, num_requests: int) -> list[Tensor | None]:
        """A message or none for each request of the batch."""
        found: list[Tensor | None] = [None] * num_requests
        for place, message in self:
            found[place] = message
        return found

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        yield from self.single
        for places, lines in self.together:
            yield from zip(places.tolist(), lines.unbind(), strict=True)
