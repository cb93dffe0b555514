"""The seam to vLLM's V2 model runner, its default wherever Triton is.

It sorts the batch anew in every step, takes an evicted request back as a new one, computes the logits while it samples, and
replays a full captured graph without calling the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from torch import Tensor

from nnsight_vllm.worker.seam.runner import Batch, Steps, forgo_captured, wrap


class RunnerV2:
    """`raw`: vllm/v1/worker/gpu/model_runner.py."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self._batch: Any = None  # vLLM's, of the last step with graphs

    def attach(self, steps: Steps) -> None:
        from vllm.v1.worker.gpu import model_runner

        def prepare_inputs(prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            if steps.has_graphs:
                self._batch = batch
                steps.begin(_batch(batch))
            return batch

        # A function of its module: for the whole process.
        forgo_captured(model_runner, "dispatch_cg_and_sync_dp", steps, "need_eager")
        wrap(self.raw, "prepare_inputs", prepare_inputs)
        wrap(self.raw, "sample", steps.sample)

    def known_requests(self) -> Collection[str]:
        return self.raw.req_states.req_id_to_index.keys()  # type: ignore[no-any-return]

    def emitting(self) -> list[str]:
        batch = self._batch
        is_done = batch.num_computed_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
        return [batch.req_ids[at] for at in np.flatnonzero(is_done)]

    def wants_logprobs(self) -> bool:
        return self.raw.sampler.get_logprobs_dims(self._batch.idx_mapping_np) is not None

    def reported_line(self, at: int, width: int) -> int:
        return int(self._batch.cu_num_logits_np[at])

    def trial(self, num_rows: int) -> Tensor:
        # As a profiling run, or it would replay a captured graph.
        hidden: Tensor = self.raw._dummy_run(num_rows, skip_attn=True, is_profile=True)[0]
        return hidden


def _batch(batch: Any) -> Batch:
    num = len(batch.req_ids)
    starts = batch.query_start_loc_np[: num + 1].astype("int64")
    logits = batch.cu_num_logits_np[1:].astype("int64") - 1 if batch.num_draft_tokens else None
    return Batch(batch.req_ids, starts, batch.num_computed_tokens_np.astype("int64"), logits)
