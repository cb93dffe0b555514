"""A minute of mixed load on a server of its own; `make soak` is ten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import serve_tiny
from soak import soak

SECONDS = 60


@pytest.mark.timeout(400)
def test_a_minute_of_mixed_load_leaves_nothing_behind(tiny_checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    with serve_tiny(tiny_checkpoint("llama"), tmp_path) as server:
        print(soak(server, SECONDS, seed=0))
