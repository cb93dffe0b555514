"""The engine in this process' hands: starts vLLM with our worker, sends requests with graphs, gives outcomes.

vLLM's `LLM` isn't made for several threads; a lock lets one trace run at a time.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from nnsight_vllm.client.admission import admitted_prompt, sampling_arguments
from nnsight_vllm.errors import AdmissionError, EngineSettingError, IntegrityError, InterventionError
from nnsight_vllm.frontend.bundling import Bundling, Tied
from nnsight_vllm.frontend.cache_salt import CachePolicy, policy_by, salt_of
from nnsight_vllm.frontend.collector import Collector
from nnsight_vllm.frontend.listener import Listener
from nnsight_vllm.frontend.retry import Attempt, RestartPolicy
from nnsight_vllm.frontend.settings import Sites, engine_arguments
from nnsight_vllm.frontend.tensor_cache import DEFAULT_LIMIT, SentTensors
from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.graph.walk import sites_written
from nnsight_vllm.plan.chunking import Unchunked
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Outcome, Prompt, Request
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.tree import Tree
from nnsight_vllm.wire import refusal
from nnsight_vllm.wire.extras import MAX_PROGRAMS, RequestExtras, encode_extras

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
        self._policy = policy_by(self.tree.catalogue)
        self.collector = Collector(self._core)
        self.tensors = SentTensors(self._put, self._drop, tensor_limit)
        self._lock = threading.RLock()
        self.restarts = RestartPolicy()

    # -- the backend of a trace ------------------------------------------------------------------------------------------

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        """The prompt behind the arguments of `trace` or `invoke`. Raises `AdmissionError`."""
        return admitted_prompt(inputs, self.tokenizer, self.tree.catalogue)

    def sampling(self, arguments: dict[str, object]) -> Any:
        """vLLM's sampling parameters. Raises `AdmissionError` for what vLLM doesn't know or allow."""
        from vllm import SamplingParams
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        try:
            params = SamplingParams(**sampling_arguments(arguments))
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
        chunking = self._policy(
            request.graphs, tensors, request.prompt.rows
        ).chunking  # known from here on, if it's asked again
        if request.prompt.rows > budget and isinstance(chunking, Unchunked):
            raise AdmissionError(
                f"the prompt must fit into one step, since {chunking.reason}: it has {request.prompt.rows} tokens, "
                f"max_num_batched_tokens is {budget}; {user_line()}"
            )
        is_structured = request.sampling.structured_outputs is not None
        if is_structured and any("samples.output" in sites_written(decode(graph).body) for graph in request.graphs):
            raise AdmissionError(f"samples can't be edited under structured outputs; {user_line()}")

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        """Run all requests together and wait for them. Those that the engine evicted start again from their prompts."""
        digests = {digest for request in requests for digest in request.constants}
        with self._lock:
            self.tensors.acquire(digests, tensors)
            try:
                found = self._run_until_all_stay(requests, tensors)
            finally:
                self.tensors.release(digests)
        return [found[i] for i in range(len(requests))]

    def _run_until_all_stay(self, requests: list[Request], tensors: dict[str, bytes]) -> dict[int, Outcome]:
        related, found = Bundling(requests), dict[int, Outcome]()
        due: dict[int, Attempt | None] = dict.fromkeys(range(len(requests)))
        while due:
            tied = related.tied(related.with_makers(due))
            with ExitStack() as running:
                attempts = {i: running.enter_context(self.restarts.attempt(before)) for i, before in due.items()}
                outcomes = dict(zip(tied, self._run_once(requests, tensors, tied), strict=True))
                found |= {i: attempt.settled(outcomes[i]) for i, attempt in attempts.items()}
            due = {i: attempt for i, attempt in attempts.items() if self.restarts.has_room(attempt)}
        return found

    def _run_once(self, requests: list[Request], tensors: dict[str, bytes], tied: dict[int, Tied]) -> list[Outcome]:
        listeners = [Listener(_raise) for _ in tied]
        sent = [self.sendable(requests[i], tensors, own) for i, own in tied.items()]
        try:
            outputs = self._generate(sent, listeners)
        finally:
            self.collector.forget(*listeners)
        asked = [requests[i].prompt.engine["prompt_token_ids"] for i in tied]
        if [list(output.prompt_token_ids) for output in outputs] != asked:
            raise InterventionError(
                "another thread used model.llm while the trace ran, and took its results: use one at a time"
            )
        with garbage.paused():
            return [listener.outcome(output)[0] for listener, output in zip(listeners, outputs, strict=True)]

    # -- the engine ------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if anything is left of requests that have ended."""
        with self._lock:
            live = [] if not self.llm.llm_engine.has_unfinished_requests() else list(self._states())
            leftovers = msgspec.msgpack.decode(self._call("nnsight_integrity", (live,)), type=list[str])
            leftovers += [
                f"front end: request {name} was never finished" for name in self._states() if name not in live
            ]
            leftovers += self._still_counted()
        if leftovers:
            raise IntegrityError("; ".join(leftovers))

    def store(self) -> dict[str, int]:
        """Numbers of the worker's tensor store: `bytes` and `count` held, `received_bytes` ever sent."""
        return msgspec.msgpack.decode(self._call("nnsight_store"), type=dict[str, int])

    def stats(self) -> Stats:
        """What was run so far."""
        worked = msgspec.msgpack.decode(self._call("nnsight_stats"), type=Stats)
        return msgspec.structs.replace(worked, restarted=self.restarts.num_restarted)

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

    def _still_counted(self) -> list[str]:
        """Leftovers of the front end, where nothing of ours runs."""
        counts = {
            "requests are still waited for": self.collector.pending,
            "tensors are still in use": self.tensors.in_use,
            "requests count as running": self.restarts.num_running,
        }
        return [f"front end: {number} {what}" for what, number in counts.items() if number]

    def _states(self) -> dict[str, Any]:
        return dict(self._core.output_processor.request_states)

    def _generate(self, sent: list[tuple[Any, Any]], listeners: list[Listener]) -> list[Any]:
        prompts, params = zip(*sent, strict=True)
        try:
            with self.collector.sending(*listeners):
                return list(self.llm.generate(list(prompts), list(params), use_tqdm=False))
        except BaseException as error:
            self._abort_all()
            if (refused := as_admission(error)) is not error:
                raise refused from error
            raise

    def sendable(self, request: Request, tensors: dict[str, bytes], tied: Tied) -> tuple[Any, Any]:
        """The request's prompt and sampling parameters as vLLM takes them, its graphs among them."""
        policy = self._policy(request.graphs, tensors, request.prompt.rows) if request.graphs else None
        return _prompt(request, policy), _params(request, policy, tied)

    def _abort_all(self) -> None:
        """After an interruption: nothing of this trace stays in the engine."""
        alone = [name for name, state in self._states().items() if state.parent_req is None]
        names = [*self._core.output_processor.parent_requests, *alone]  # a parent takes its samples with it
        if names:
            self.llm.llm_engine.abort_request(names, internal=True)

    def _put(self, data: list[bytes]) -> None:
        self._call("nnsight_put", (data,))

    def _drop(self, digests: list[str]) -> None:
        self._call("nnsight_drop", (digests,))

    def _call(self, method: str, args: tuple[object, ...] = ()) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]


def as_admission(error: BaseException) -> BaseException:
    """What vLLM's own admission raises, as an error of ours; other errors as they are."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    if not isinstance(error, ValueError | TypeError | VLLMClientError | GracefulHTTPError):
        return error
    refused = AdmissionError(f"the engine refuses the request: {error}")
    refused.__cause__ = error
    return refused


def _prompt(request: Request, policy: CachePolicy | None) -> Any:
    """What vLLM takes. A salt that isn't for all of the prompt's blocks goes with the sampling parameters."""
    prompt = request.prompt.engine
    salt = None if policy is None or policy.first > 0 else _salt(request, policy)
    return prompt if salt is None else {**prompt, "cache_salt": salt}


def _params(request: Request, policy: CachePolicy | None, tied: Tied) -> Any:
    params = request.sampling.clone()
    if policy is None:
        return params
    if params.seed is None:
        params.seed = tied.seed
    salt = _salt(request, policy) if policy.first > 0 else None
    extras = RequestExtras(
        list(request.graphs),
        tied.links,
        not isinstance(policy.chunking, Unchunked),
        policy.most,
        None if salt is None else (salt, policy.first),
    )
    params.extra_args = {**(params.extra_args or {}), **encode_extras(extras)}
    if policy.most == 0:
        params.skip_reading_prefix_cache = True
    return params


def _salt(request: Request, policy: CachePolicy) -> str | None:
    prompt = request.prompt.engine
    return salt_of(policy.salt, policy.graph, prompt["prompt_token_ids"], prompt.get("cache_salt"), request.tenant)


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


def _raise(error: Exception) -> None:
    raise error
