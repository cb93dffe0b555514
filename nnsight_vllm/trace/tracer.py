"""`with model.trace(...)`: record the block, run its requests, put the saved values into the user's names."""

from __future__ import annotations

from collections.abc import Generator
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.graph.codec import to_json
from nnsight_vllm.graph.nodes import Graph
from nnsight_vllm.graph.text import render
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Backend
from nnsight_vllm.trace.bundle import Bundle
from nnsight_vllm.trace.cache import Cache, cached_sites
from nnsight_vllm.trace.cond import CondBlock
from nnsight_vllm.trace.deliver import deliver
from nnsight_vllm.trace.edits import NamedEdits, Standing
from nnsight_vllm.trace.iterations import IterationBlock, IterationIndexer
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorded_trace import Invoke, RecordedTrace, raise_all, run_all
from nnsight_vllm.trace.recorder import current
from nnsight_vllm.trace.recording import is_recording, pop
from nnsight_vllm.trace.session import session_of
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.stream import Stream

if TYPE_CHECKING:
    from typing import Self

_HAS_EINOPS = find_spec("einops") is not None


class Tracer(RecordedTrace):
    """The context of a trace. With a prompt it is one request; without, each `invoke` inside is one.

    Unless it `runs`, it is recorded and checked, and that is all.
    """

    def __init__(
        self,
        backend: Backend,
        inputs: tuple[object, ...],
        arguments: dict[str, object],
        runs: bool = True,
        standing: Standing | None = None,
    ) -> None:
        self._runs = runs
        self._session = session_of(backend) if runs else None
        known = standing or Standing(NamedEdits())
        bundle = Bundle() if self._session is None else self._session.bundle
        super().__init__(backend, Standing(known.named, known.require()), bundle)  # the edits as they are now
        self.iter = IterationIndexer()
        self._arguments = arguments
        self._only = Invoke(self, inputs, arguments) if inputs else None

    # -- the block -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if _HAS_EINOPS:
            import nnsight_vllm.trace.einops_backend  # noqa: F401  (einops finds the backend by itself)
        self.line = user_line()
        if is_recording():
            raise RefusedError(f"a trace can't be opened inside another one; {self.line}")
        self._enter_block(None if self._only is None else self._only.recorder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        is_over = False
        try:
            is_over = self._close(kind)
            return is_over
        finally:
            if not (is_over and self._session is not None) and (self._runs or kind is not None):
                self.fail_recorders()

    def _close(self, kind: type[BaseException] | None) -> bool:
        with garbage.paused():
            if not self._record(kind):
                return False
        if self._session is not None:
            self._session.traces.append(self)
        elif self._runs:
            errors = run_all(self.backend, [self])
            deliver(self.frame)
            raise_all(errors, "of the trace")
        return True

    def _record(self, kind: type[BaseException] | None) -> bool:
        """The block is over. Returns whether it ended well."""
        try:
            is_over = self._leave_block(kind)
            if is_over and self._only is not None:
                self._only.finish()
            return is_over
        finally:
            if self._only is not None:
                pop()

    # -- running it bit by bit -------------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """In async mode: start the trace, and iterate over its events."""
        raise RefusedError(f"stream() is for traces of VLLM(..., mode='async'); {self._how_it_runs()}; {user_line()}")

    def __await__(self) -> Generator[Any, None, None]:
        """In async mode: run the trace to its end."""
        raise RefusedError(f"await is for traces of VLLM(..., mode='async'); {self._how_it_runs()}; {user_line()}")

    def _how_it_runs(self) -> str:
        return "this one ran when its block ended" if self._runs else "this one was only scanned"

    # -- what the block may ask for --------------------------------------------------------------------------------------

    def invoke(self, *inputs: object, **arguments: object) -> Invoke:
        """One request of this trace; sampling arguments override the trace's."""
        if self._only is not None:
            raise RefusedError(
                f"the trace has a prompt, so it is one request: give prompts to invokes only; {user_line()}"
            )
        if is_recording():
            raise RefusedError(f"an invoke can't be opened inside another one; {user_line()}")
        return Invoke(self, inputs, {**self._arguments, **arguments})

    def all(self) -> IterationBlock:
        """A block that runs at every iteration."""
        return IterationBlock(slice(None))

    def cond(self, test: object) -> CondBlock:
        """A block that runs where `test` is true; `.else_()` of it runs otherwise."""
        return CondBlock(current("tracer.cond()"), test)

    def log(self, *args: object) -> None:
        """Print the arguments when the run is over."""
        current("tracer.log()").log(args)

    def cache(self, modules: object = None, include_inputs: bool = False) -> Cache:
        """Collect the outputs of all modules, or of these (or at these paths), in every iteration of this request.

        Behind the trace it is a mapping: `cache["model.layers.5"].output[k]` is the value of iteration k, as all edits
        of the request left it; `cache.model.layers[5]` is the same. With `include_inputs` there are `.inputs` too.
        """
        recorder = current("tracer.cache()")
        sites = cached_sites(self.backend.tree, modules, include_inputs)
        recorder.require_open()
        recorder.cached |= {site.name for site in sites}
        return Cache(recorder, sites)

    def stop(self) -> None:
        """End the request at this point of the program."""
        current("tracer.stop()").stop()

    @property
    def result(self) -> Proxy:
        """What the engine generates: `.text`, `.token_ids`, `.finish_reason`, `.outputs`. Known after the run."""
        recorder = current("tracer.result")
        proxy = Proxy(recorder, None, (object(),), None)
        proxy._slot = "result"
        return proxy

    @property
    def graph(self) -> GraphView:
        """What was recorded: of the open invoke, or of the only one."""
        if is_recording():
            return GraphView(current("tracer.graph").graph())
        graphs = [invoke.graph for invoke in self.invokes if invoke.graph is not None]
        if len(graphs) != 1:
            raise RefusedError(f"the trace has {len(graphs)} invokes: ask tracer.invokes[i].graph; {user_line()}")
        return GraphView(graphs[0])


class GraphView:
    """A recorded graph for people: prints one line a node."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph

    def __str__(self) -> str:
        return render(self.nodes)

    def to_json(self) -> str:
        """The graph as JSON."""
        return to_json(self.nodes)
