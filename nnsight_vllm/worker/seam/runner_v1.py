"""The seam to vLLM's V1 model runner, which the CPU build uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.seam.runner import Batch, Steps, forgo_captured, wrap
from nnsight_vllm.worker.seam.seeded_chunks import chunks_draw_nothing


class RunnerV1:
    """`raw`: vllm/v1/worker/gpu_model_runner.py. Its batch is persistent: it's looked at where it's needed."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def attach(self, steps: Steps) -> None:
        def model_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if steps.has_graphs:
                steps.begin(self._batch(steps.drafts))
            return forward(*args, **kwargs)

        forgo_captured(self.raw, "_determine_batch_execution_and_padding", steps, "force_eager")
        wrap(self.raw, "_model_forward", model_forward)
        wrap(self.raw, "_sample", steps.sample)
        wrap(self.raw, "sample_tokens", self._sample_tokens)

    def _sample_tokens(self, sample_tokens: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with chunks_draw_nothing(self.raw):
            return sample_tokens(*args, **kwargs)

    def known_requests(self) -> Collection[str]:
        return self.raw.requests.keys()  # type: ignore[no-any-return]

    def emitting(self) -> list[str]:
        discarded = self.raw.discard_request_mask.np
        return [id for at, id in enumerate(self.raw.input_batch.req_ids) if not discarded[at]]

    def wants_logprobs(self) -> bool:
        metadata = self.raw.input_batch.sampling_metadata
        return metadata.max_num_logprobs is not None or bool(metadata.logprob_token_ids)

    def reported_line(self, at: int, width: int) -> int:
        return at * width

    def trial(self, num_rows: int) -> Tensor:
        from vllm.config import CUDAGraphMode

        hidden: Tensor = self.raw._dummy_run(num_rows, cudagraph_runtime_mode=CUDAGraphMode.NONE)[0]
        return hidden

    def _batch(self, drafts: Mapping[str, list[int]]) -> Batch:
        batch = self.raw.input_batch
        num = len(batch.req_ids)
        starts = self.raw.query_start_loc.np[: num + 1].astype("int64")
        positions = batch.num_computed_tokens_cpu[:num].astype("int64")
        return Batch(batch.req_ids, starts, positions, _logits_rows(batch.req_ids, drafts) if drafts else None)


def _logits_rows(ids: list[str], drafts: Mapping[str, list[int]]) -> Ints:
    """The last row that each request has among the logits: a request has one more for each draft."""
    return np.cumsum([1 + len(drafts.get(id, ())) for id in ids], dtype=np.int64) - 1
