"""Which KV blocks are cleared, and that clearing them touches no other."""

from __future__ import annotations

import torch

from nnsight_vllm.worker.seam.kv_scrubbing import KVScrubber, clear_blocks

GRAPHS = {"g", "h"}


def test_blocks_of_a_graph_are_cleared_when_another_request_gets_them() -> None:
    scrubber = KVScrubber()
    assert scrubber.stale([("g", [1, 2]), ("p", [3])], GRAPHS) == []
    assert scrubber.stale([("q", [4, 2])], GRAPHS) == [2]
    assert scrubber.stale([("r", [2, 1])], GRAPHS) == [1]
    assert scrubber.stale([("s", [1, 2, 3, 4])], GRAPHS) == []


def test_blocks_that_go_from_graph_to_graph_are_cleared_each_time() -> None:
    scrubber = KVScrubber()
    scrubber.stale([("g", [1])], GRAPHS)
    assert scrubber.stale([("h", [1])], GRAPHS) == [1]
    assert scrubber.stale([("p", [1])], GRAPHS) == [1]


def test_clearing_touches_the_given_blocks_in_every_cache() -> None:
    whole, split = torch.full((4, 2, 3), torch.nan), torch.full((8, 3), torch.nan)  # the second: two kernel blocks each
    clear_blocks([whole, whole.view(4, 6), split], [1, 3], num_blocks=4)
    assert whole.isnan().all(-1).all(-1).tolist() == [True, False, True, False]
    assert split.isnan().all(-1).tolist() == [True, True, False, False, True, True, False, False]
    assert whole[[1, 3]].eq(0).all() and split[[2, 3, 6, 7]].eq(0).all()
