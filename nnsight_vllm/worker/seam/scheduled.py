"""What vLLM's scheduler tells of a step: requests that come with graphs, and blocks for keys and values that change hands."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from nnsight_vllm.wire.extras import decode_extras
from nnsight_vllm.worker.batch.step import Arrival


def arrivals(scheduled: Any, raw: Any) -> Iterator[Arrival]:
    """New requests that carry graphs. `raw`: vLLM's model runner."""
    for new in scheduled.scheduled_new_reqs:
        params = new.sampling_params
        extras = decode_extras(params)
        if extras is not None:
            seed = secrets.randbits(63) if params.seed is None else params.seed
            prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
            yield Arrival(new.req_id, extras.graphs, len(prompt), seed, _refusal(params, raw), extras.links)


def fresh_blocks(scheduled: Any, raw: Any) -> Iterator[tuple[str, list[int]]]:
    """KV blocks that requests get in this step; those found in the prefix cache aren't fresh."""
    for new in scheduled.scheduled_new_reqs:
        yield new.req_id, _without_hits(new.block_ids, new.num_computed_tokens, raw)
    cached = scheduled.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks is not None:
            is_resumed = request_id in cached.resumed_req_ids
            yield request_id, _without_hits(blocks, computed if is_resumed else 0, raw)


def _without_hits(blocks: Any, computed: int, raw: Any) -> list[int]:
    """The blocks of all groups behind the first `computed` tokens."""
    groups = raw.kv_cache_config.kv_cache_groups
    fresh = [ids[computed // group.kv_cache_spec.block_size :] for ids, group in zip(blocks, groups, strict=True)]
    return [block for ids in fresh for block in ids]


def _refusal(params: Any, raw: Any) -> str:
    """Why this request's sampled token can't be replaced; empty where it can."""
    if params.structured_outputs is not None:
        return "the request's structured outputs decide it"
    mode = raw.sampler.logprobs_mode
    if params.logprobs is not None and not mode.startswith("raw"):
        return f"its logprob isn't known with logprobs_mode={mode}"
    return ""
