"""`VLLM`: a model served by vLLM, whose insides can be read and edited while it runs."""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nnsight_vllm.errors import EngineSettingError, RefusedError
from nnsight_vllm.frontend.settings import Sites, check_arguments, check_checkpoint, check_sites
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.trace.async_tracer import AsyncTracer
from nnsight_vllm.trace.backend import ModelBackend
from nnsight_vllm.trace.editable import Editable
from nnsight_vllm.trace.edits import Standing
from nnsight_vllm.trace.envoy import Envoy
from nnsight_vllm.trace.events import AsyncModelBackend
from nnsight_vllm.trace.session import Session
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.tracer import Tracer
from nnsight_vllm.trace.tree import Tree
from nnsight_vllm.wire.limits import check_limits

if TYPE_CHECKING:
    from typing import Self


E = TypeVar("E", bound=ModelBackend, covariant=True)


class _Start(Generic[E]):
    """Opens the engine when it is first needed, once, whichever thread asks."""

    def __init__(self, open: Callable[[], E]) -> None:
        self._open = open
        self._running: E | None = None
        self._lock = threading.Lock()

    def engine(self) -> E:
        with self._lock:
            if self._running is None:
                self._running = self._opened()
            return self._running

    def _opened(self) -> E:
        try:
            return self._open()
        except AttributeError as error:  # from a property, Python would go on to look for a module of that name
            raise RuntimeError(f"the engine didn't start: {error}") from error

    def close(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.close()


def _open(model: str, arguments: dict[str, object], sites: Sites, ours: dict[str, object]) -> ModelBackend:
    from nnsight_vllm.frontend.engine import Engine

    return Engine(model, arguments, sites, ours=ours)


def _open_async(model: str, arguments: dict[str, object], sites: Sites, ours: dict[str, object]) -> AsyncModelBackend:
    from nnsight_vllm.frontend.async_engine import AsyncEngine

    return AsyncEngine(model, arguments, sites, ours=ours)


def _check_mode(mode: str) -> None:
    if mode not in {"sync", "async"}:
        raise EngineSettingError(f"mode={mode!r}: expected 'sync' or 'async'")


class VLLM(Editable):
    """A vLLM engine with Hugging Face's module tree.

    `arguments` are any of `vllm.LLM`. With `mode="async"` the engine is vLLM's `AsyncLLM`: a trace is recorded as ever, and runs
    when it is awaited or streamed; traces of many tasks run together. The engine starts at first use, or at once with `dispatch=True`. `sites` says
    which modules are instrumented: "all", "blocks" (decoder blocks, embeddings, final norm and head), or patterns of
    module paths; logits and samples always are. With `batching=False` every request's program runs by itself, which is
    slower and gives the same results. A request that sends home more than `max_saved_bytes` of results fails, as does the
    one with which all that run together exceed `max_saved_bytes_in_all`. `limits`: what else a graph may cost, by name
    (docs/limits.md).
    """

    def __init__(
        self,
        model: str,
        *,
        mode: str = "sync",
        sites: Sites = "all",
        dispatch: bool = False,
        batching: bool = True,
        max_saved_bytes: int = 1 << 30,
        max_saved_bytes_in_all: int = 8 << 30,
        limits: Mapping[str, float] | None = None,
        **arguments: Any,
    ) -> None:
        _check_mode(mode)
        check_arguments(arguments)
        check_sites(sites)
        check_checkpoint(str(model))
        most = {"request": max_saved_bytes, "engine": max_saved_bytes_in_all, **(limits or {})}
        check_limits(most)
        ours: dict[str, object] = {"batching": batching, "limits": most}
        wanted = str(model), arguments, sites, ours
        asynchronous = _Start(partial(_open_async, *wanted)) if mode == "async" else None
        start: _Start[ModelBackend] = asynchronous or _Start(partial(_open, *wanted))
        self.__dict__.update(_path="", _async=asynchronous, _start=start)
        if dispatch:
            _ = self._engine

    @classmethod
    def connect(
        cls, url: str, *, mode: str = "sync", api_key: str | None = None, timeout: float | None = 600.0
    ) -> Self:
        """The model that `nnsight-vllm serve` runs at `url`, such as "http://localhost:8000"; no vLLM is needed here.

        Traces, sessions, edits and caches are as locally, in each mode. An answer may take `timeout` seconds (None: any time). A named edit
        becomes a model of the server's as well, `BASE:name`. Raises `ConnectionFailed`, `UnauthorizedError` for a wrong key.
        """
        from nnsight_vllm.remote.async_engine import AsyncRemoteEngine
        from nnsight_vllm.remote.engine import RemoteEngine
        from nnsight_vllm.remote.published import PublishedEdits

        _check_mode(mode)
        made = object.__new__(cls)
        asynchronous = _Start(partial(AsyncRemoteEngine, url, api_key, timeout)) if mode == "async" else None
        start: _Start[RemoteEngine] = asynchronous or _Start(partial(RemoteEngine, url, api_key, timeout))
        made.__dict__.update(_path="", _async=asynchronous, _start=start, _edits=Standing(PublishedEdits(start.engine)))
        _ = made._engine
        return made

    # -- running ---------------------------------------------------------------------------------------------------------

    def trace(self, *inputs: object, **arguments: object) -> Tracer:
        """Record interventions in a `with` block, and run them when it ends; in async mode, when the tracer is awaited.

        With a prompt the trace is one request; without, each `tracer.invoke(prompt)` is one, and the engine batches
        them. `arguments` are vLLM's sampling parameters, and `edits`: named edits to run with, in order. `scan`
        and `validate` are accepted and change nothing: every operation is tried on tensors without data while it is
        recorded.
        """
        for name in ("scan", "validate"):
            arguments.pop(name, None)
        if (engine := self._async_engine) is not None:
            return AsyncTracer(engine, inputs, arguments, self._standing)
        return Tracer(self._engine, inputs, arguments, standing=self._standing)

    def scan(self, *inputs: object, **arguments: object) -> Tracer:
        """`trace` without the run: shapes and types are known, errors are raised, nothing has a value."""
        return Tracer(self._engine, inputs, arguments, runs=False, standing=self._standing)

    def generate(self, *inputs: object, **arguments: object) -> Tracer:
        """`trace` by its other name; `max_new_tokens` is `max_tokens`."""
        return self.trace(*inputs, **arguments)

    def session(self) -> Session:
        """Traces in this `with` block run together when it ends, and may use each other's values."""
        if self.__dict__["_async"] is not None:
            raise RefusedError(
                f"a session runs when its block ends, which mode='async' can't: make its traces invokes of one trace; {user_line()}"
            )
        return Session(self._engine)

    # -- the engine ------------------------------------------------------------------------------------------------------

    @property
    def llm(self) -> Any:
        """The `vllm.LLM` underneath, for plain use beside traces. In async mode the `AsyncLLM`, which lives on `loop`."""
        return self._engine.llm

    @property
    def loop(self) -> AbstractEventLoop:
        """In async mode: the event loop of `llm`, on a thread of its own; see `asyncio.run_coroutine_threadsafe`."""
        if (engine := self._async_engine) is None:
            raise EngineSettingError("only the engine of mode='async' has an event loop")
        return engine.event_loop

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if the engine still tracks anything of requests that have ended."""
        self._engine.check_integrity()

    def stats(self) -> Stats:
        """What the engine ran so far: how much of it for many requests at once, and what prevented that."""
        return self._engine.stats()

    def close(self) -> None:
        """End the engine, or the connection to it. A later use starts a new one."""
        self._lazy.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _lazy(self) -> _Start[ModelBackend]:
        start: _Start[ModelBackend] = self.__dict__["_start"]
        return start

    @property
    def _engine(self) -> ModelBackend:
        return self._lazy.engine()

    @property
    def _async_engine(self) -> AsyncModelBackend | None:
        start: _Start[AsyncModelBackend] | None = self.__dict__["_async"]
        return None if start is None else start.engine()

    # -- the tree --------------------------------------------------------------------------------------------------------

    @property
    def _tree(self) -> Tree:
        return self._engine.tree

    def get(self, path: str) -> Envoy:
        """The module at a dotted path, such as `model.layers.5.mlp`."""
        self._tree.module(path)
        return Envoy(self._tree, path)

    def __repr__(self) -> str:
        return self._tree.render()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other
