"""The two sites that are no module's: the logits before sampling, and the token drawn from them.

Both live on pseudo taps of the runner's own, one row a request: `logits.output` [1, vocab] and `samples.output` [1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.worker.model.sites import Direct, Site, TensorSlice
from nnsight_vllm.worker.model.taps import Tensors

LOGITS_TAP = -1
SAMPLES_TAP = -2


@dataclass
class Samples(Site):
    """The drawn ids: a tap's one tensor is [requests, most tokens of one]. The engine goes on from what is written.

    A request with a graph has one token, the first.
    """

    vocab_size: int

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        # A copy, whatever type and layout the runner has: V1 has int32, V2 and speculative decoding int64.
        return tensors[0][rows, 0].to(torch.int64, copy=True, memory_format=torch.contiguous_format)

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        outside = (new < 0) | (new >= self.vocab_size)
        if bool(outside.any()):
            token = int(new[outside][0])
            raise InterventionError(f"token {token} isn't in the vocabulary of {self.vocab_size} tokens")
        tensors[0][rows, 0] = new.to(tensors[0].dtype)


def sampling_sites(first_order: int, vocab_size: int, logits_dtype: str) -> list[Site]:
    """Logits and samples, firing after every module's sites."""
    logits = SiteInfo("logits.output", "logits", "output", first_order, (1, vocab_size), logits_dtype)
    samples = SiteInfo("samples.output", "samples", "output", first_order + 1, (1,), "int64")
    return [Direct(logits, LOGITS_TAP, TensorSlice(0)), Samples(samples, SAMPLES_TAP, vocab_size)]
