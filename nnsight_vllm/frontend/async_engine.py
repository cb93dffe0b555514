"""The engine for traces that run while their callers do something else: vLLM's `AsyncLLM`, on an event loop of its own.

Callers on any thread or loop start a trace and get a future; what they call synchronously (statistics, the integrity check,
the end) waits for that loop.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Coroutine, Iterable
from typing import Any

import msgspec

from nnsight_vllm.client.loop import LoopThread, RunningLoop
from nnsight_vllm.errors import IntegrityError, InterventionError
from nnsight_vllm.frontend.engine import Engine
from nnsight_vllm.frontend.run import PREFIX, TraceRun
from nnsight_vllm.trace.backend import Outcome, Request
from nnsight_vllm.trace.events import Receive


class AsyncEngine(Engine):
    """A running vLLM engine that takes graphs from many callers at once."""

    loop: RunningLoop
    _is_closed = False

    def start(self, requests: list[Request], tensors: dict[str, bytes], receive: Receive | None = None) -> TraceRun:
        """Send the requests off."""
        if self._is_closed:
            raise InterventionError("the engine was closed before the trace ran")
        run = TraceRun(self, requests, tensors, receive)
        self.loop.post(run.begin)
        return run

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        """Run all requests together and wait for them."""
        run = self.start(requests, tensors)
        try:
            return run.outcomes.result()
        except BaseException:
            run.abort()
            raise

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if anything is left of requests that have ended; others may run meanwhile."""
        leftovers = self.loop.call(self._leftovers())
        if leftovers:
            raise IntegrityError("; ".join(leftovers))

    def close(self) -> None:
        """End the engine and free what it held. Traces that still run fail."""
        if self._is_closed:
            return
        self._is_closed = True
        self.loop.call(self._shut_down())
        assert isinstance(self.loop, LoopThread)
        self.loop.stop()

    @property
    def event_loop(self) -> asyncio.AbstractEventLoop:
        """What vLLM lives on."""
        return self.loop.loop

    # -- for runs: on the loop, but for `acquire` and `release` -------------------------------------------------------

    async def send(self, id: str, prompt: Any, params: Any, wants_steps: bool) -> Any:
        """Give vLLM a request. Returns the queue of its outputs, each with all of the request so far, or only the last."""
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.CUMULATIVE if wants_steps else RequestOutputKind.FINAL_ONLY
        return await self.llm.add_request(id, self._rendered(prompt), params)

    def abort(self, ids: Iterable[str]) -> None:
        """Have vLLM end requests, by its own ids."""
        if ids := list(ids):
            self._wind_up(self.llm.abort(ids, internal=True))

    def acquire(self, digests: set[str], tensors: dict[str, bytes]) -> None:
        """Make sure that the worker holds these tensors. It waits for the loop, so it's for other threads."""
        with self._storing:
            self.tensors.acquire(digests, tensors)

    def release(self, digests: set[str]) -> None:
        """Whoever acquired them is done."""
        with self._storing:
            self.tensors.release(digests)

    # -- private ---------------------------------------------------------------------------------------------------------

    def _wind_up(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._winding_up.add(task)
        task.add_done_callback(self._winding_up.discard)

    async def _leftovers(self) -> list[str]:
        ending = [run.task for run in self.runs if run.is_aborted and run.task is not None]
        if waited_for := [*ending, *self._winding_up]:
            await asyncio.wait(waited_for)
        processor = self._core.output_processor
        found = []
        if self._is_idle:
            found += [f"front end: request {id} was never finished" for id in self._states() if id.startswith(PREFIX)]
            found += self._still_counted()
        if not self._states() and (processor.parent_requests or processor.external_req_ids):
            found.append(f"front end: ids of requests that ended: {list(processor.external_req_ids)}")
        # Nothing may come between looking and sending: a request that is added later is sent later.
        (packed,) = await self.llm.collective_rpc("nnsight_integrity", args=(list(self._states()),))
        return found + msgspec.msgpack.decode(packed, type=list[str])

    async def _shut_down(self) -> None:
        runs = list(self.runs)
        for run in runs:
            run.give_up(InterventionError("the engine was closed while the trace ran"))
        if tasks := [run.task for run in runs if run.task is not None]:
            await asyncio.wait(tasks)
        self.llm.shutdown()

    def _rendered(self, prompt: Any) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = self.llm.renderer
        (rendered,) = renderer.render_cmpl(
            [parse_model_prompt(self.llm.model_config, prompt)], renderer.default_cmpl_tok_params
        )
        return rendered

    @property
    def _core(self) -> Any:
        return self.llm

    @property
    def _is_idle(self) -> bool:
        """Whether nothing of ours runs."""
        return not self.runs

    def _prepare(self, loop: RunningLoop) -> None:
        """Be ready for what happens on this loop."""
        self.loop = loop
        self.runs: set[TraceRun] = set()
        self._winding_up: set[asyncio.Task[None]] = set()  # work that outlives who began it
        self._storing = threading.Lock()

    def _open(self, model: str, **arguments: object) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model, **_as_llm_takes_them(arguments)))

        self._prepare(loop := LoopThread())
        try:
            llm = loop.call(start())
        except BaseException:
            loop.stop()
            raise
        atexit.register(_close, weakref.ref(self))  # else vLLM reports the end of its processes as a failure
        return llm

    def _call(self, method: str, args: tuple[object, ...] = ()) -> Any:
        return self.loop.call(self.llm.collective_rpc(method, args=args))[0]


def _close(engine: weakref.ref[AsyncEngine]) -> None:
    running = engine()
    if running is not None:
        running.close()


def _as_llm_takes_them(arguments: dict[str, object]) -> dict[str, Any]:
    """Keywords of `vllm.LLM` for `EngineArgs`, as `LLM` itself turns them over."""
    from vllm.config import CompilationConfig, KVTransferConfig, ProfilerConfig, StructuredOutputsConfig

    kinds = {
        "structured_outputs_config": StructuredOutputsConfig,
        "profiler_config": ProfilerConfig,
        "kv_transfer_config": KVTransferConfig,
    }
    found: dict[str, Any] = {"disable_log_stats": True, **arguments}
    for name, kind in kinds.items():
        if isinstance(found.get(name), dict):
            found[name] = kind(**found[name])
    if isinstance(found.get("compilation_config"), int):
        found["compilation_config"] = CompilationConfig(mode=found["compilation_config"])
    return {name: value for name, value in found.items() if value is not None}
