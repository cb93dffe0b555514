"""The engine in this process' hands: starts vLLM with our worker, sends requests with graphs, gives outcomes.

vLLM's `LLM` isn't made for several threads; a lock lets one trace run at a time.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nnsight_vllm.client.prompts import make_prompt
from nnsight_vllm.errors import AdmissionError, EngineSettingError, IntegrityError, InterventionError
from nnsight_vllm.frontend.bundling import Bundling, Tied
from nnsight_vllm.frontend.cache_salt import Shared, salt_of, sharing_by
from nnsight_vllm.frontend.collector import Collected, Collector
from nnsight_vllm.frontend.settings import Sites, engine_arguments
from nnsight_vllm.frontend.tensor_cache import DEFAULT_LIMIT, SentTensors
from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.graph.walk import sites_written
from nnsight_vllm.plan.chunking import Unchunked
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Completion, Outcome, Prompt, Request, Result
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.tree import Tree
from nnsight_vllm.wire import refusal
from nnsight_vllm.wire.extras import MAX_PROGRAMS, RequestExtras, encode_extras

_RENAMED = {"max_new_tokens": "max_tokens"}

_GUARD = (
    "vLLM starts its engine in a new process, which imports the main script again: in a script, put what uses a model "
    'under `if __name__ == "__main__":`'
)


class Engine:
    """A running vLLM engine that takes graphs."""

    def __init__(
        self,
        model: str,
        arguments: dict[str, object],
        sites: Sites,
        tensor_limit: int = DEFAULT_LIMIT,
        ours: dict[str, object] | None = None,
    ) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise EngineSettingError(
                "running a model here needs vLLM: install nnsight-vllm[cpu] or nnsight-vllm[cuda]"
            ) from error
        _refuse_import_of_main()
        with refusal.received() as file:
            self._attach(_start(self._open, model, engine_arguments(arguments, sites, file, ours)), tensor_limit)

    def _attach(self, llm: Any, tensor_limit: int) -> None:
        """Take a running vLLM, whose workers are ours."""
        self.llm: Any = llm
        self.tokenizer: Any = llm.get_tokenizer()
        self.tree = Tree(msgspec.msgpack.decode(self._call("nnsight_catalogue"), type=Catalogue))
        self._sharing = sharing_by(self.tree.catalogue)
        self.collector = self._collect(self._core.output_processor)
        self.tensors = SentTensors(self._put, self._drop, tensor_limit)
        self._lock = threading.RLock()
        self.num_restarted = 0

    # -- the backend of a trace ------------------------------------------------------------------------------------------

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        """The prompt behind the arguments of `trace` or `invoke`. Raises `AdmissionError`."""
        catalogue = self.tree.catalogue
        prompt = make_prompt(inputs, self.tokenizer, catalogue.vocab_size)
        if prompt.rows >= catalogue.max_model_len:
            raise AdmissionError(
                f"the prompt has {prompt.rows} tokens; max_model_len is {catalogue.max_model_len}, prompt and answer "
                f"together; {user_line()}"
            )
        return prompt

    def sampling(self, arguments: dict[str, object]) -> Any:
        """vLLM's sampling parameters. Raises `AdmissionError` for what vLLM doesn't know or allow."""
        from vllm import SamplingParams
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        named = {_RENAMED.get(name, name): value for name, value in arguments.items()}
        try:
            params = SamplingParams(**named)
            # Its fields aren't checked when it's made, and a bad one would end the engine's input thread for good.
            params = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
            config = self._core.vllm_config
            params.clone().verify(
                config.model_config, config.speculative_config, config.structured_outputs_config, self.tokenizer
            )
            return params
        except Exception as error:  # vLLM's own checks raise several kinds
            raise AdmissionError(f"bad sampling arguments: {error}; {user_line()}") from None

    def admit(self, request: Request, tensors: Mapping[str, bytes]) -> None:
        """Raise `AdmissionError` if a request with a graph can't be taken. `tensors`: its constants."""
        if not request.graphs:
            return
        if len(request.graphs) > MAX_PROGRAMS:
            raise AdmissionError(
                f"{len(request.graphs)} graphs in one request; the limit is {MAX_PROGRAMS}: write several edits as one; "
                f"{user_line()}"
            )
        budget = self.tree.catalogue.max_num_batched_tokens
        cut = self._sharing(request.graphs, tensors, request.prompt.rows).cut  # known from here on, if it's asked again
        if request.prompt.rows > budget and isinstance(cut, Unchunked):
            raise AdmissionError(
                f"the prompt must fit into one step, since {cut.reason}: it has {request.prompt.rows} tokens, "
                f"max_num_batched_tokens is {budget}; {user_line()}"
            )
        is_structured = request.sampling.structured_outputs is not None
        if is_structured and any("samples.output" in sites_written(decode(graph).body) for graph in request.graphs):
            raise AdmissionError(f"samples can't be edited under structured outputs; {user_line()}")

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        """Run all requests together and wait for them. Those that the engine evicted start again from their prompts."""
        digests = {digest for request in requests for digest in request.constants}
        found: dict[int, Outcome] = {}
        related = Bundling(requests)
        seeds = related.seeds()
        due, num_before = related.in_order(range(len(requests))), len(requests) + 1
        with self._lock:
            self.tensors.acquire(digests, tensors)
            try:
                while due:
                    links = related.links(due)
                    tied = [Tied(links.get(i), seeds.get(i)) for i in due]
                    outcomes = zip(due, self._run_once([requests[i] for i in due], tensors, tied), strict=True)
                    found |= {i: one for i, one in outcomes if i not in found or found[i].is_evicted}
                    evicted = [i for i in due if found[i].is_evicted]
                    # Not even one at a time has room, or they have none together with those who make their values.
                    if len(evicted) == len(due) or len(evicted) >= num_before:
                        break
                    self.num_restarted += len(evicted)
                    due, num_before = related.in_order(related.with_makers(evicted)), len(evicted)
            finally:
                self.tensors.release(digests)
        return [found[i] for i in range(len(requests))]

    def _run_once(self, requests: list[Request], tensors: dict[str, bytes], tied: list[Tied]) -> list[Outcome]:
        outputs = self._generate(requests, tensors, tied)
        asked = [request.prompt.engine["prompt_token_ids"] for request in requests]
        if [list(output.prompt_token_ids) for output in outputs] != asked:
            raise InterventionError(
                "another thread used model.llm while the trace ran, and took its results: use one at a time"
            )
        with garbage.paused():
            return [
                outcome_of(output, self.collector.take(output.request_id, len(output.outputs))) for output in outputs
            ]

    # -- the engine ------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if anything is left of requests that have ended."""
        with self._lock:
            live = [] if not self.llm.llm_engine.has_unfinished_requests() else list(self._states())
            leftovers = msgspec.msgpack.decode(self._call("nnsight_integrity", (live,)), type=list[str])
            leftovers += [
                f"front end: request {name} was never finished" for name in self._states() if name not in live
            ]
            if self.collector.pending:
                leftovers.append(f"front end: results of {self.collector.pending} requests were never taken")
            if self.tensors.in_use:
                leftovers.append(f"front end: {self.tensors.in_use} tensors are still in use")
        if leftovers:
            raise IntegrityError("; ".join(leftovers))

    def store(self) -> dict[str, int]:
        """Numbers of the worker's tensor store: `bytes` and `count` held, `received_bytes` ever sent."""
        return msgspec.msgpack.decode(self._call("nnsight_store"), type=dict[str, int])

    def stats(self) -> Stats:
        """What was run so far."""
        worked = msgspec.msgpack.decode(self._call("nnsight_stats"), type=Stats)
        return msgspec.structs.replace(worked, restarted=self.num_restarted)

    def close(self) -> None:
        """End the engine and free what it held."""
        self._core.engine_core.shutdown()

    @property
    def _core(self) -> Any:
        """What has vLLM's configuration, its output processor and the connection to its engine."""
        return self.llm.llm_engine

    def _open(self, model: str, **arguments: object) -> Any:
        from vllm import LLM

        return LLM(model, **arguments)

    def _collect(self, processor: Any) -> Collector:
        return Collector(processor)

    def _states(self) -> dict[str, Any]:
        return dict(self._core.output_processor.request_states)

    def _generate(self, requests: list[Request], tensors: dict[str, bytes], tied: list[Tied]) -> list[Any]:
        pairs = zip(requests, tied, strict=True)
        prompts, params = zip(*(self.sendable(request, tensors, own) for request, own in pairs), strict=True)
        try:
            with self.collector.collecting():
                return list(self.llm.generate(list(prompts), list(params), use_tqdm=False))
        except BaseException as error:
            self._abort_all()
            if isinstance(error, refusals()):
                raise AdmissionError(f"the engine refuses the request: {error}") from error
            raise

    def sendable(self, request: Request, tensors: dict[str, bytes], tied: Tied) -> tuple[Any, Any]:
        """The request's prompt and sampling parameters as vLLM takes them, its graphs among them."""
        shared = self._sharing(request.graphs, tensors, request.prompt.rows) if request.graphs else None
        return _prompt(request, shared), _params(request, shared, tied)

    def _abort_all(self) -> None:
        """After an interruption: nothing of this trace stays in the engine."""
        alone = [name for name, state in self._states().items() if state.parent_req is None]
        names = [*self._core.output_processor.parent_requests, *alone]  # a parent takes its samples with it
        if names:
            self.llm.llm_engine.abort_request(names, internal=True)
        self.collector.clear()

    def _put(self, data: list[bytes]) -> None:
        self._call("nnsight_put", (data,))

    def _drop(self, digests: list[str]) -> None:
        self._call("nnsight_drop", (digests,))

    def _call(self, method: str, args: tuple[object, ...] = ()) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]


def outcome_of(output: Any, collected: list[Collected]) -> Outcome:
    """What became of a request; `output` is vLLM's, with all its samples."""
    completions = [_completion(sample, found) for sample, found in zip(output.outputs, collected, strict=True)]
    result = Result(
        completions, output.prompt, list(output.prompt_token_ids), output.prompt_logprobs, output.num_cached_tokens
    )
    return Outcome(result, [found.sample for found in collected])


def reason_of(reason: str | None, found: Collected) -> str | None:
    """Why a sample ended; vLLM's own `reason` says only that we ended it."""
    if found.sample.failure is not None:
        return "error"
    return "stop" if found.is_stopped else reason


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM's own admission raises."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    return ValueError, TypeError, VLLMClientError, GracefulHTTPError


def _prompt(request: Request, shared: Shared | None) -> Any:
    """What vLLM takes. A salt that isn't for all of the prompt's blocks goes with the sampling parameters."""
    prompt = request.prompt.engine
    salt = None if shared is None or shared.first > 0 else _salt(request, shared)
    return prompt if salt is None else {**prompt, "cache_salt": salt}


def _params(request: Request, shared: Shared | None, tied: Tied) -> Any:
    params = request.sampling.clone()
    if shared is None:
        return params
    if params.seed is None:
        params.seed = tied.seed
    salt = _salt(request, shared) if shared.first > 0 else None
    extras = RequestExtras(
        list(request.graphs),
        tied.links,
        not isinstance(shared.cut, Unchunked),
        shared.most,
        None if salt is None else (salt, shared.first),
    )
    params.extra_args = {**(params.extra_args or {}), **encode_extras(extras)}
    if shared.most == 0:
        params.skip_reading_prefix_cache = True
    return params


def _salt(request: Request, shared: Shared) -> str | None:
    prompt = request.prompt.engine
    return salt_of(shared.salt, shared.graph, prompt["prompt_token_ids"], prompt.get("cache_salt"), request.tenant)


def _start(make: Callable[..., Any], model: str, arguments: dict[str, object]) -> Any:
    try:
        return make(model, **arguments)
    except OSError as error:
        if Path(model).exists():
            raise
        raise EngineSettingError(f"no checkpoint {model!r}: no such path, and looked up by name: {error}") from error
    except RuntimeError as error:
        error.add_note(_GUARD)
        raise


def _refuse_import_of_main() -> None:
    """In a process that is still importing the main script, an engine can't be started."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise EngineSettingError(_GUARD)


def _completion(output: Any, found: Collected) -> Completion:
    return Completion(
        text=output.text,
        token_ids=list(output.token_ids),
        finish_reason=reason_of(output.finish_reason, found),
        stop_reason=output.stop_reason,
        logprobs=output.logprobs,
        cumulative_logprob=output.cumulative_logprob,
    )
