"""Every private name of vLLM that the engine side touches. Written for vLLM 0.32 and its V1 model runner.

`Seam` wraps five methods of one runner (the instance, never the class) and one of its model, and turns what they see
into the executor's calls. A step without requests that carry graphs goes straight through.

The V2 runner is refused here. CUDA graphs: a step with graphs forgoes captured graphs, since a replay runs no Python,
and keeps the compiled code; no GPU was at hand to run that.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_vllm.engine import refusal, taps
from nnsight_vllm.engine.draws import LOGITS_TAP, SAMPLES_TAP
from nnsight_vllm.engine.executor import Executor
from nnsight_vllm.engine.messages import Messages
from nnsight_vllm.engine.recycling import Recycling, clear_blocks
from nnsight_vllm.engine.requests import Arrival, Step
from nnsight_vllm.engine.undrawn import undrawn
from nnsight_vllm.errors import EngineSettingError, GraphError, PreemptedError
from nnsight_vllm.graph.links import Links, decode_links

FIELD = "nnsight_vllm"
CUT = "nnsight_vllm_cut"
MOST_CACHED = "nnsight_vllm_cached"
SALT = "nnsight_vllm_salt"
LINKS = "nnsight_vllm_links"
RELEASED = "nnsight_vllm_released"  # what our scheduler adds to its output
SUPPORTED = "0.32."
PROBE_ROWS = 5


def require_supported(vllm_config: Any) -> None:
    """Raise `EngineSettingError` on a vLLM or a runner that this file wasn't written for."""
    from vllm import __version__

    if not __version__.startswith(SUPPORTED):
        raise EngineSettingError(f"nnsight_vllm runs on vLLM {SUPPORTED}*; this is {__version__}")
    if vllm_config.use_v2_model_runner:
        raise EngineSettingError(
            "vLLM's V2 model runner doesn't take graphs yet: set VLLM_USE_V2_MODEL_RUNNER=0 in the engine's environment"
        )


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
    settings = (vllm_config.additional_config or {}).get(FIELD)
    if not isinstance(settings, dict) or "sites" not in settings:
        raise EngineSettingError(f"additional_config needs {{{FIELD!r}: {{'sites': ...}}}}; got {settings!r}")
    return settings


def salt_compile_cache(vllm_config: Any, fingerprint: str) -> None:
    """Keep compiled code apart by instrumentation: vLLM's cache key has `additional_config` but not the hooks.

    The file of the front end is another one in every start, so it mustn't be in the key.
    """
    settings = {**settings_of(vllm_config), "fingerprint": fingerprint}
    settings.pop(refusal.KEY, None)
    vllm_config.additional_config = {**vllm_config.additional_config, FIELD: settings}


def probing_forward(runner: Any) -> Tensor:
    """Run the model once over a few rows of padding, then its logits; [1, vocab]. Writes no key or value anywhere."""
    from vllm.config import CUDAGraphMode

    with torch.random.fork_rng(devices=[] if runner.device.type == "cpu" else [runner.device]):
        hidden, _ = runner._dummy_run(PROBE_ROWS, cudagraph_runtime_mode=CUDAGraphMode.NONE)
        with torch.inference_mode():
            logits: Tensor = runner.get_model().compute_logits(hidden[:1])
    return logits


def graph_of(sampling_params: Any) -> bytes | list[bytes] | None:
    """The graph that a request carries, as msgpack bytes, or several in the order in which they run at a site."""
    return _extra(sampling_params).get(FIELD)


def may_be_cut(sampling_params: Any) -> bool:
    """Whether the prompt of a request with a graph may be computed in several steps."""
    return bool(_extra(sampling_params).get(CUT))


def most_cached(sampling_params: Any) -> int | None:
    """How many tokens a request with a graph may take from the prefix cache at most; None: any number."""
    return _extra(sampling_params).get(MOST_CACHED)


def salted_from(sampling_params: Any) -> tuple[str, int] | None:
    """A salt of the prompt's blocks, and the first row of those that it's for; None: there is none but vLLM's own."""
    found = _extra(sampling_params).get(SALT)
    return None if found is None else (str(found[0]), int(found[1]))


def _extra(sampling_params: Any) -> Mapping[str, Any]:
    return getattr(sampling_params, "extra_args", None) or {}


def links_of(sampling_params: Any) -> Links | None:
    """The request's links to others of its bundle. Raises `GraphError` for bytes that are none."""
    data = _extra(sampling_params).get(LINKS)
    return None if data is None else decode_links(data)


class Seam:
    """One V1 model runner and the executor that its steps feed."""

    def __init__(self, runner: Any) -> None:
        self.executor: Executor | None = None
        self._runner = runner
        self._has_graphs = False  # in this step
        self._is_armed = False  # for the step's first `compute_logits`; later ones are prompt logprobs
        self._recycling = Recycling()
        self._ids: list[str] = []  # of the last step, in the order of its batch
        self._index: dict[str, int] = {}
        _wrap(runner, "execute_model", self._execute_model)
        _wrap(runner, "_determine_batch_execution_and_padding", self._choose_cuda_graph)
        _wrap(runner, "_model_forward", self._model_forward)
        _wrap(runner, "_sample", self._sample)
        _wrap(runner, "sample_tokens", self._sample_tokens)
        _wrap(runner.get_model(), "compute_logits", self._compute_logits)

    @property
    def known_requests(self) -> set[str]:
        """Requests that the runner has state of, ended ones of which it wasn't told yet included."""
        return set(self._runner.requests)

    def _execute_model(self, execute: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        executor = self._started()
        executor.drop(scheduled.finished_req_ids)
        if (released := getattr(scheduled, RELEASED, None)) is not None:
            executor.exports.release(released)
        for arrival in _arrivals(scheduled, self._runner):
            executor.admit(arrival)
        for request_id in scheduled.scheduled_cached_reqs.resumed_req_ids:
            executor.fail(request_id, PreemptedError("the engine evicted the request to free memory; send it again"))
        known = executor.requests
        stale = self._recycling.step(_fresh_blocks(scheduled, self._runner), known)
        if stale:
            clear_blocks(self._runner.kv_caches, stale, self._runner.kv_cache_config.num_blocks)
        self._has_graphs = bool(known) and any(id in known for id in scheduled.num_scheduled_tokens)
        return execute(scheduled, *args, **kwargs)

    def _choose_cuda_graph(self, choose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._has_graphs:
            kwargs["force_eager"] = True
        return choose(*args, **kwargs)

    def _model_forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._has_graphs:
            return forward(*args, **kwargs)
        executor = self._started()
        executor.begin_step(self._step())
        self._is_armed = True
        return forward(*args, **kwargs)

    def _compute_logits(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_armed:
            return compute(*args, **kwargs)
        self._is_armed = False
        executor = self._started()
        executor.enter_logits()
        logits = compute(*args, **kwargs)
        executor.at_tap(LOGITS_TAP, (logits,))
        executor.leave_logits()
        return logits

    def _sample(self, sample: Callable[..., Any], logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._has_graphs:
            return sample(logits, *args, **kwargs)
        executor = self._started()
        rows = _raw_rows(self._runner, executor, logits)  # sampling may change the logits in place
        drawn = sample(logits, *args, **kwargs)
        before = drawn.sampled_token_ids.clone()
        executor.at_tap(SAMPLES_TAP, (drawn.sampled_token_ids,))
        _report_edits(drawn, before, rows)
        return drawn

    def _sample_tokens(self, sample_tokens: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with undrawn(self._runner):
            output = sample_tokens(*args, **kwargs)
        if self._has_graphs:
            self._has_graphs = False
            executor = self._started()
            for error in taps.take_failures():
                executor.fail_step(error)
            _attach(output, executor.end_step(_emitting(self._runner)), self._index)
        return output

    def _step(self) -> Step:
        """Rows and positions of this step's requests."""
        batch, ids = self._runner.input_batch, self._runner.input_batch.req_ids
        if ids != self._ids:
            self._ids = list(ids)
            self._index = {id: i for i, id in enumerate(ids)}
        starts = self._runner.query_start_loc.np[: len(ids) + 1].astype("int64")
        return Step(self._index, starts, batch.num_computed_tokens_cpu[: len(ids)].astype("int64"))

    def _started(self) -> Executor:
        assert self.executor is not None, "a step before the worker was ready"
        return self.executor


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
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
        graph = graph_of(params)
        if graph is not None:
            seed = secrets.randbits(63) if params.seed is None else params.seed
            prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
            yield Arrival(new.req_id, graph, len(prompt), seed, _refusal(params, runner), _links(params))


def _links(params: Any) -> Links | None:
    """Bytes that are none: our scheduler doesn't let such a request run; another's mustn't bring the worker down."""
    try:
        return links_of(params)
    except GraphError:
        return None


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


def _emitting(runner: Any) -> list[str]:
    """Requests that get a token in this step: a piece of a prompt gets none."""
    discarded = runner.discard_request_mask.np
    return [id for index, id in enumerate(runner.input_batch.req_ids) if not discarded[index]]


def _raw_rows(runner: Any, executor: Executor, logits: Tensor) -> dict[int, Tensor]:
    """What logprobs are reported from, [vocab] by index, of requests whose token may be replaced."""
    batch = runner.input_batch
    if batch.sampling_metadata.max_num_logprobs is None and not batch.sampling_metadata.logprob_token_ids:
        return {}
    indices = [index for index, id in enumerate(batch.req_ids) if executor.writes_samples(id)]
    if runner.sampler.logprobs_mode == "raw_logits":
        return {index: logits[index].to(torch.float32, copy=True) for index in indices}
    return {index: logits[index].log_softmax(-1, dtype=torch.float32) for index in indices}


def _report_edits(drawn: Any, before: Tensor, rows: dict[int, Tensor]) -> None:
    """Let the reported logprob and rank be those of the ids that graphs put in place of the drawn ones."""
    reported = drawn.logprobs_tensors
    if reported is None or reported.logprob_token_ids.numel() == 0:  # none, or the whole vocabulary
        return
    for index, logprobs in rows.items():
        token = int(drawn.sampled_token_ids[index, 0])
        if token != int(before[index, 0]):
            reported.logprob_token_ids[index, 0] = token
            reported.logprobs[index, 0] = logprobs[token]
            reported.selected_token_ranks[index] = (logprobs >= logprobs[token]).sum()


def _attach(output: Any, sent: Messages, index: Mapping[str, int]) -> None:
    """Results ride home as the pooling output of the step, which generating requests don't use; our scheduler unpacks them."""
    if sent:
        result = getattr(output, "_model_runner_output", output)  # async scheduling wraps it
        result.pooler_output = sent.packed(index)
