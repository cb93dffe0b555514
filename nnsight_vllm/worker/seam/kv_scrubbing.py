"""KV blocks that a request with a graph has held are cleared before a request gets them again.

A graph may make infinite or undefined values, and those end up in its request's keys and values. Attention reads whole
blocks and multiplies what lies behind a request's last token by zero: harmless for stale numbers, but zero times NaN
is NaN, so the block's next owner would inherit it. Requests without graphs leave nothing to clear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor


class KVScrubber:
    """Which blocks must be cleared when they change hands."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def step(self, fresh: Iterable[tuple[str, list[int]]], with_graphs: Collection[str]) -> list[int]:
        """The blocks to clear before this step. `fresh`: what requests are given in it, blocks with valid contents left out."""
        stale: set[int] = set()
        taken: set[int] = set()
        for request_id, blocks in fresh:
            stale.update(self._used.intersection(blocks))
            if request_id in with_graphs:
                taken.update(blocks)
        self._used = (self._used - stale) | taken
        return sorted(stale)


def clear_blocks(caches: Iterable[Tensor], blocks: list[int], num_blocks: int) -> None:
    """Zero these blocks in every layer's cache, [kernel blocks, ...]; a block may be several kernel blocks in a row."""
    seen: set[int] = set()
    for cache in caches:
        if cache.data_ptr() not in seen:  # layers of different kinds may share memory
            seen.add(cache.data_ptr())
            pieces = cache.shape[0] // num_blocks
            first = torch.tensor(blocks, device=cache.device) * pieces
            for piece in range(pieces):
                cache.index_fill_(0, first + piece, 0)
