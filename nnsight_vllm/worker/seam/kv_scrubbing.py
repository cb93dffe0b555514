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

    def stale(self, fresh: Iterable[tuple[str, list[int]]], with_graphs: Collection[str]) -> list[int]:
        """The blocks to clear before this step. `fresh`: what requests are given in it, blocks with valid contents left out."""
        given = list(fresh)
        stale = self._used.intersection(block for _, blocks in given for block in blocks)
        taken = {block for request_id, blocks in given if request_id in with_graphs for block in blocks}
        self._used = (self._used - stale) | taken
        return sorted(stale)


def clear_blocks(caches: Iterable[Tensor], blocks: list[int], num_blocks: int) -> None:
    """Zero these blocks in every layer's cache, [kernel blocks, ...]; a block may be several kernel blocks in a row."""
    # Layers of different kinds may share memory: the first of those.
    for cache in {cache.data_ptr(): cache for cache in reversed([*caches])}.values():
        num_kernel_blocks = cache.shape[0] // num_blocks
        first = torch.tensor(blocks, device=cache.device) * num_kernel_blocks
        for offset in range(num_kernel_blocks):
            cache.index_fill_(0, first + offset, 0)
