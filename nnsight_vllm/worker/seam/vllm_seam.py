"""Every private name of vLLM that the engine side touches. Written for vLLM 0.32.

`Seam` wraps methods of one runner and of its model (of the instances, never the classes), and turns what they see into the
executor's calls. A step without requests that carry graphs goes straight through. What differs between vLLM's two model
runners is behind `Runner`: `compat_v1.py` and `compat_v2.py`.

CUDA graphs: a step with graphs forgoes captured graphs, since a replay runs no Python, and keeps the compiled code; no GPU
was at hand to run that.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nnsight_vllm.errors import EngineSettingError, PreemptedError
from nnsight_vllm.wire import refusal
from nnsight_vllm.wire.extras import KEY, decode_extras
from nnsight_vllm.wire.step_output import RELEASED, Ints, Messages
from nnsight_vllm.worker.batch.executor import Executor
from nnsight_vllm.worker.batch.requests import Arrival, Step
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.sampling_sites import LOGITS_TAP, SAMPLES_TAP
from nnsight_vllm.worker.seam.kv_scrubbing import KVScrubber, clear_blocks

SUPPORTED = "0.32."
PROBE_ROWS = 5


def require_supported() -> None:
    """Raise `EngineSettingError` on a vLLM that this file wasn't written for."""
    from vllm import __version__

    if not __version__.startswith(SUPPORTED):
        raise EngineSettingError(f"nnsight_vllm runs on vLLM {SUPPORTED}*; this is {__version__}")


def worker_base() -> type:
    """vLLM's worker class for this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker  # type: ignore[no-any-return]
    from vllm.v1.worker.gpu_worker import Worker

    return Worker  # type: ignore[no-any-return]


def settings_of(vllm_config: Any) -> dict[str, Any]:
    """Our part of vLLM's `additional_config`."""
    settings = (vllm_config.additional_config or {}).get(KEY)
    if not isinstance(settings, dict) or "sites" not in settings:
        raise EngineSettingError(f"additional_config needs {{{KEY!r}: {{'sites': ...}}}}; got {settings!r}")
    return settings


def salt_compile_cache(vllm_config: Any, fingerprint: str) -> None:
    """Keep compiled code apart by instrumentation: vLLM's cache key has `additional_config` but not the hooks.

    The file of the front end is another one in every start, so it mustn't be in the key.
    """
    settings = {**settings_of(vllm_config), "fingerprint": fingerprint}
    settings.pop(refusal.KEY, None)
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settings}


@dataclass(frozen=True)
class Batch:
    """A step as its runner laid it out. `ids` in the order of the batch; `logits`: see `Step`."""

    ids: list[str]
    starts: Ints
    positions: Ints
    logits: Ints | None


class Runner(Protocol):
    """What differs between vLLM's model runners; `raw` is vLLM's own."""

    raw: Any

    def attach(self, seam: Seam) -> None:
        """Have the seam's `begin` called before a forward of a step with graphs, which is no captured one, and its `sample`."""

    def known_requests(self) -> Collection[str]:
        """Requests that the runner has state of."""

    def emitting(self) -> list[str]:
        """Requests that get a token in this step: a piece of a prompt gets none."""

    def wants_logprobs(self) -> bool:
        """Whether anybody in this step does."""

    def reported_line(self, at: int, width: int) -> int:
        """Where the logprob of a request's first token is; `at` its place in the batch, `width` most tokens of a request."""

    def trial(self, num_rows: int) -> Tensor:
        """The hidden states of a forward over padding, outside of captured graphs, that writes no key or value."""


def runner_of(raw: Any, vllm_config: Any) -> Runner:
    """The side of the seam that fits vLLM's model runner."""
    if vllm_config.use_v2_model_runner:
        from nnsight_vllm.worker.seam.runner_v2 import RunnerV2

        return RunnerV2(raw)
    from nnsight_vllm.worker.seam.runner_v1 import RunnerV1

    return RunnerV1(raw)


class Seam:
    """One model runner and the executor that its steps feed."""

    def __init__(self, runner: Runner) -> None:
        self.executor: Executor | None = None
        self._runner = runner
        self.has_graphs = False  # in this step
        self.drafts: Mapping[str, list[int]] = {}  # of this step, by request
        self._is_armed = False  # for the step's first `compute_logits`; later ones are prompt logprobs
        self._recycling = KVScrubber()
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
        for arrival in _arrivals(scheduled, raw):
            if arrival.request_id not in known:
                executor.admit(arrival)
        stale = self._recycling.step(_fresh_blocks(scheduled, raw), known)
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


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace an instance's method by `around(original, ...)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    if isinstance(owner, nn.Module):
        owner.__dict__[name] = wrapped
    else:
        setattr(owner, name, wrapped)


def _arrivals(scheduled: Any, runner: Any) -> Iterator[Arrival]:
    for new in scheduled.scheduled_new_reqs:
        params = new.sampling_params
        extras = decode_extras(params)
        if extras is not None:
            seed = secrets.randbits(63) if params.seed is None else params.seed
            prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
            yield Arrival(new.req_id, extras.graphs, len(prompt), seed, _refusal(params, runner), extras.links)


def _fresh_blocks(scheduled: Any, runner: Any) -> Iterator[tuple[str, list[int]]]:
    """KV blocks that requests get in this step; those found in the prefix cache aren't fresh."""
    for new in scheduled.scheduled_new_reqs:
        yield new.req_id, _without_hits(new.block_ids, new.num_computed_tokens, runner)
    cached = scheduled.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks is not None:
            is_resumed = request_id in cached.resumed_req_ids
            yield request_id, _without_hits(blocks, computed if is_resumed else 0, runner)


def _without_hits(blocks: Any, computed: int, runner: Any) -> list[int]:
    """The blocks of all groups behind the first `computed` tokens."""
    groups = runner.kv_cache_config.kv_cache_groups
    fresh = [ids[computed // group.kv_cache_spec.block_size :] for ids, group in zip(blocks, groups, strict=True)]
    return [block for ids in fresh for block in ids]


def _refusal(params: Any, runner: Any) -> str:
    """Why this request's sampled token can't be replaced; empty where it can."""
    if params.structured_outputs is not None:
        return "the request's structured outputs decide it"
    mode = runner.sampler.logprobs_mode
    if params.logprobs is not None and not mode.startswith("raw"):
        return f"its logprob isn't known with logprobs_mode={mode}"
    return ""


def _attach(output: Any, sent: Messages, index: Mapping[str, int]) -> None:
    """Results ride home as the pooling output of the step, which generating requests don't use; our scheduler unpacks them."""
    if sent:
        # Async scheduling wraps it, and V2 always does.
        result = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", output)
        result.pooler_output = sent.packed(index)
