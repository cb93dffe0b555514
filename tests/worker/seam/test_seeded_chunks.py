"""Seeded requests whose prompts are computed in chunks: on a CPU vLLM alone can't run them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from nnsight_vllm.worker.seam.seeded_chunks import chunks_draw_nothing

if TYPE_CHECKING:
    from conftest import Engines


def runner(device: str) -> Any:
    """Three seeded requests, of which the second and a fourth without a seed are in the midst of their prompts."""
    batch = SimpleNamespace(generators={0: "a", 1: "b", 2: "c"}, num_reqs=4)
    mask = SimpleNamespace(np=np.array([False, True, False, True, True]))
    return SimpleNamespace(input_batch=batch, discard_request_mask=mask, device=torch.device(device))


def test_only_generators_of_chunks_are_held_back_and_come_back_after_an_error() -> None:
    one = runner("cpu")
    with pytest.raises(ZeroDivisionError), chunks_draw_nothing(one):
        assert one.input_batch.generators == {0: "a", 2: "c"}
        raise ZeroDivisionError
    assert one.input_batch.generators == {0: "a", 1: "b", 2: "c"}


def test_generators_that_have_an_offset_are_vllms_own() -> None:
    one = runner("meta")
    with chunks_draw_nothing(one):
        assert one.input_batch.generators == {0: "a", 1: "b", 2: "c"}


def test_a_seeded_prompt_in_chunks_draws_what_it_draws_in_one(
    engines: Engines, tiny_checkpoint: Callable[[str], str]
) -> None:
    model = engines(tiny_checkpoint("llama"), max_model_len=128, max_num_batched_tokens=64, max_num_seqs=10)
    prompts = [[start + i for i in range(40)] for start in (7, 90)]
    drawn = {"temperature": 1.0, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    with model.trace(prompts[1], **drawn) as tracer:
        alone = tracer.result.save()
    with model.trace(**drawn) as tracer:
        with tracer.invoke(prompts[0]):
            tracer.result.save()
        with tracer.invoke(prompts[1]):  # 64 tokens a step: its last 16 come later
            shared = tracer.result.save()
    assert shared.token_ids == alone.token_ids
