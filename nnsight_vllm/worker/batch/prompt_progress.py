"""How far a request's prompt is computed, and what its chunks so far left for the last one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnsight_vllm.plan.chunking import Unchunked
from nnsight_vllm.plan.chunks import Chunked


@dataclass
class Progress:
    """`computed`: positions before this one are done. `chunking`: how the prompt may come in chunks, once somebody asked.

    `held`: rows of the chunks, by what they are sent as; they make `num_bytes`. `excess`: why they were too many.
    """

    graph: bytes
    computed: int = 0
    chunking: Chunked | Unchunked | None = None
    held: dict[str, list[Tensor]] = field(default_factory=dict)
    num_bytes: int = 0
    excess: str = ""

    def hold(self, key: str, rows: Tensor) -> int:
        """Keep rows of a chunk. Returns their bytes."""
        if self.excess:
            return 0
        self.held.setdefault(key, []).append(rows)
        self.num_bytes += rows.nbytes
        return rows.nbytes

    def let_go(self, excess: str = "") -> int:
        """Nothing is held any more. Returns the bytes that were."""
        self.excess = self.excess or excess
        num_bytes, self.num_bytes, self.held = self.num_bytes, 0, {}
        return num_bytes

    def joined(self, key: str, device: torch.device) -> Tensor | None:
        """All rows of the chunks under a key, in order; None: there are none. Something of no use if they were too many."""
        if self.excess:
            return torch.empty(0, device=device)
        chunks = self.held.get(key)
        if chunks is None:
            return None
        return (chunks[0] if len(chunks) == 1 else torch.cat([chunk.to(device) for chunk in chunks])).to(device)
