"""A seeded request draws nothing for a chunk of its prompt.

vLLM draws a token for each chunk all the same, and takes the draw back by the generator's offset. Generators on a CPU have
none: the engine would end for everybody, whoever sent the request, with a graph or without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def chunks_draw_nothing(runner: Any) -> Iterator[None]:
    """While this step's tokens are drawn, keep the generators of requests that get none out of vLLM's hands."""
    generators = runner.input_batch.generators
    if not generators or runner.device.type != "cpu":
        yield
        return
    chunks = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist()
    kept = {index: generators.pop(index) for index in chunks if index in generators}
    try:
        yield
    finally:
        generators.update(kept)
