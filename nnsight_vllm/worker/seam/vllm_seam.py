"""The seam to vLLM 0.32: this folder has every private name of its model runners.

`Seam` wraps methods of one runner and of its model (of the instances, never the classes), and turns what they see into the
executor's calls. A step without requests that carry graphs goes straight through. What differs between vLLM's two model
runners is behind `Runner`: `runner_v1.py` and `runner_v2.py`.

CUDA graphs: a step with graphs forgoes captured graphs, since a replay runs no Python, and keeps the compiled code; no GPU
was at hand to run that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.errors import PreemptedError
from nnsight_vllm.wire.step_output import RELEASED, Ints, Messages
from nnsight_vllm.worker.batch.executor import Executor
from nnsight_vllm.worker.batch.step import Step
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.sampling_sites import LOGITS_TAP, SAMPLES_TAP
from nnsight_vllm.worker.seam.kv_scrubbing import KVScrubber, clear_blocks
from nnsight_vllm.worker.seam.runner import Batch, Runner, wrap
from nnsight_vllm.worker.seam.scheduled import arrivals, fresh_blocks

PROBE_ROWS = 5


class Seam:
    """One model runner and the executor that its steps feed."""

    def __init__(self, runner: Runner) -> None:
        self.executor: Executor | None = None
        self._runner = runner
        self.has_graphs = False  # in this step
        self.drafts: Mapping[str, list[int]] = {}  # of this step, by request
        self._is_armed = False  # for the step's first `compute_logits`; later ones are prompt logprobs
        self._scrubber = KVScrubber()
        self._ids: list[str] = []  # of the last step, in the order of its batch
        self._index: dict[str, int] = {}
        self._evicted: set[str] = set()  # and not computed again yet: a runner may have forgotten them
        self._logits_rows: Ints | None = None
        self._raw_rows: dict[int, Tensor] = {}
        wrap(runner.raw, "execute_model", self._execute_model)
        wrap(runner.raw, "sample_tokens", self._sample_tokens)
        wrap(runner.raw.get_model(), "compute_logits", self._compute_logits)
        runner.attach(self)

    @property
    def known_requests(self) -> set[str]:
        """Requests that the engine has state of, ended ones of which the runner wasn't told yet included."""
        return self._evicted.union(self._runner.known_requests())

    def probing_forward(self) -> Tensor:
        """Run the model once over a few rows of padding, then its logits; [1, vocab]. Writes no key or value anywhere."""
        raw = self._runner.raw
        with torch.random.fork_rng(devices=[] if raw.device.type == "cpu" else [raw.device]):
            hidden = self._runner.trial(PROBE_ROWS)
            with torch.inference_mode():
                logits: Tensor = raw.get_model().compute_logits(hidden[:1])
        return logits

    def begin(self, batch: Batch) -> None:
        """The forward of a step with graphs is about to run over these rows."""
        if batch.ids != self._ids:
            self._ids = list(batch.ids)
            self._index = {id: i for i, id in enumerate(batch.ids)}
        self._started().begin_step(Step(self._index, batch.starts, batch.positions, batch.logits))
        self._logits_rows = batch.logits
        self._is_armed = True

    def sample(self, sample: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the runner's sampling, before anything was made of the drawn ids; V2 returns more than those."""
        made = sample(*args, **kwargs)
        if self.has_graphs:
            drawn = made[0] if isinstance(made, tuple) else made
            before = drawn.sampled_token_ids.clone()
            self._started().at_tap(SAMPLES_TAP, (drawn.sampled_token_ids,))
            self._report_edits(drawn, before)
        return made

    def _execute_model(self, execute: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        if self.executor is None or kwargs.get("dummy_run"):  # vLLM warms up
            return execute(scheduled, *args, **kwargs)
        executor, raw = self.executor, self._runner.raw
        executor.drop(scheduled.finished_req_ids)
        if (released := getattr(scheduled, RELEASED, None)) is not None:
            executor.exports.release(released)
        known = executor.requests
        for request_id in self._recomputed(scheduled, known):
            executor.fail(request_id, PreemptedError("the engine evicted the request to free memory; send it again"))
        for arrival in arrivals(scheduled, raw):
            if arrival.request_id not in known:
                executor.admit(arrival)
        stale = self._scrubber.stale(fresh_blocks(scheduled, raw), known)
        if stale:
            clear_blocks(raw.kv_caches, stale, raw.kv_cache_config.num_blocks)
        self.drafts = scheduled.scheduled_spec_decode_tokens
        self.has_graphs = bool(known) and any(id in known for id in scheduled.num_scheduled_tokens)
        return execute(scheduled, *args, **kwargs)

    def _recomputed(self, scheduled: Any, known: Collection[str]) -> list[str]:
        """Requests with graphs that were evicted and that this step computes again. V2 is told of them as of new ones."""
        again = [new.req_id for new in scheduled.scheduled_new_reqs if new.req_id in known]
        again += scheduled.scheduled_cached_reqs.resumed_req_ids
        if scheduled.preempted_req_ids:
            self._evicted.update(scheduled.preempted_req_ids)
        if self._evicted:
            self._evicted.difference_update(again, scheduled.finished_req_ids)
        return again

    def _compute_logits(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_armed:
            return compute(*args, **kwargs)
        self._is_armed = False
        executor = self._started()
        executor.enter_logits()
        logits = compute(*args, **kwargs)
        executor.at_tap(LOGITS_TAP, (logits,))
        self._raw_rows = self._rows_to_report(logits) if self._runner.wants_logprobs() else {}
        executor.leave_logits()
        return logits

    def _sample_tokens(self, sample_tokens: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(*args, **kwargs)
        if self.has_graphs:
            self.has_graphs = False
            executor = self._started()
            for error in taps.take_failures():
                executor.fail_step(error)
            _attach(output, executor.end_step(self._runner.emitting()), self._index)
        return output

    def _rows_to_report(self, logits: Tensor) -> dict[int, Tensor]:
        """What logprobs are reported from, [vocab] by place, of requests whose token may be replaced.

        A copy: sampling may change the logits in place.
        """
        places = [at for id, at in self._index.items() if self._started().writes_samples(id)]
        rows = {at: logits[at if self._logits_rows is None else self._logits_rows[at]] for at in places}
        if self._runner.raw.sampler.logprobs_mode == "raw_logits":
            return {at: row.to(torch.float32, copy=True) for at, row in rows.items()}
        return {at: row.log_softmax(-1, dtype=torch.float32) for at, row in rows.items()}

    def _report_edits(self, drawn: Any, before: Tensor) -> None:
        """Let the reported logprob and rank be those of the ids that graphs put in place of the drawn ones."""
        rows, self._raw_rows = self._raw_rows, {}
        reported = drawn.logprobs_tensors
        if reported is None or reported.logprob_token_ids.numel() == 0:  # none, or the whole vocabulary
            return
        for at, logprobs in rows.items():
            token = int(drawn.sampled_token_ids[at, 0])
            if token != int(before[at, 0]):
                line = self._runner.reported_line(at, before.shape[1])
                reported.logprob_token_ids[line, 0] = token
                reported.logprobs[line, 0] = logprobs[token]
                reported.selected_token_ranks[line] = (logprobs >= logprobs[token]).sum()

    def _started(self) -> Executor:
        assert self.executor is not None, "a step before the worker was ready"
        return self.executor


def _attach(output: Any, sent: Messages, index: Mapping[str, int]) -> None:
    """Results ride home as the pooling output of the step, which generating requests don't use; our scheduler unpacks them."""
    if sent:
        # Async scheduling wraps it, and V2 always does.
        result = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", output)
        result.pooler_output = sent.packed(index)
