"""`with model.trace(...)`: record the block, run its requests, put the saved values into the user's names."""

from __future__ import annotations

from collections.abc import Generator
from importlib.util import find_spec
from itertools import islice
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from nnsight_vllm.errors import InterventionError, NNsightError, PreemptedError, RefusedError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import encode, to_json
from nnsight_vllm.graph.nodes import Graph
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.graph.text import render
from nnsight_vllm.graph.walk import constants_of
from nnsight_vllm.trace import active, garbage
from nnsight_vllm.trace.backend import Backend, Outcome, Prompt, Request
from nnsight_vllm.trace.blocks.block import Body, SkipBody, prepare
from nnsight_vllm.trace.bundle import Bundle
from nnsight_vllm.trace.cache import Cache, cached_sites, collecting_graph
from nnsight_vllm.trace.cond import CondBlock
from nnsight_vllm.trace.deliver import deliver
from nnsight_vllm.trace.dispatch import Dispatch
from nnsight_vllm.trace.edits import Edit, NamedEdits, Standing
from nnsight_vllm.trace.encode import Constants
from nnsight_vllm.trace.iterations import IterationBlock, Iterations
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorder import Recorder
from nnsight_vllm.trace.session import session_of
from nnsight_vllm.trace.source import user_frame, user_line

if TYPE_CHECKING:
    from typing import Self

    from nnsight_vllm.trace.stream import Stream

_HAS_EINOPS = find_spec("einops") is not None


class Recording:
    """A `with` block that records: runs it natively, or rewritten where its control flow needs that."""

    _body: Body | None = None
    _frame: FrameType

    def _enter_block(self) -> None:
        self._frame = user_frame()
        self._body = prepare(self._frame)
        if self._body is not None:
            self._body.skip(self._frame)

    def _leave_block(self, kind: type[BaseException] | None) -> bool:
        """Run the rewritten body if the native one was skipped. Returns whether the block ended well."""
        if self._body is not None and kind is not None and issubclass(kind, SkipBody):
            self._body.run(Dispatch())
            return True
        return kind is None


class Invoke(Recording):
    """One request of a trace: its prompt, its sampling, the edits it runs with, its graph."""

    def __init__(self, tracer: Tracer, inputs: tuple[object, ...], arguments: dict[str, object]) -> None:
        backend = tracer.backend
        self.tracer = tracer
        self.prompt: Prompt = backend.prompt(inputs)
        self.edits: tuple[Edit, ...] = tracer.standing.chosen(arguments.get("edits", ()))
        self.sampling = backend.sampling({name: value for name, value in arguments.items() if name != "edits"})
        self.recorder = Recorder(
            backend.tree,
            tracer.constants,
            self.prompt.rows,
            self.sampling.max_tokens,
            tracer.bundle,
            self.sampling.n,
        )
        tracer.recorders.append(self.recorder)
        self.graph: Graph | None = None

    def __enter__(self) -> Invoke:
        active.push(self.recorder)
        try:
            if self.recorder.state == "closed":  # entered once more: the recording goes on
                self.recorder.state = "recording"
            self._enter_block()
        except BaseException:
            active.pop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if not self._leave_block(kind):
                return False
            self.finish()
        finally:
            active.pop()
        return True

    def finish(self) -> None:
        """Close the recording and add it to the trace."""
        self.close()
        self.recorder.state = "closed"
        self.tracer.add(self)

    def close(self) -> None:
        """Take what is recorded as the request's graph. Invokes recorded later may have added to it since."""
        graph = self.recorder.graph()
        if graph != self.graph:
            check(graph, self.tracer.backend.tree.catalogue)
            self.graph = graph
            self.tracer.backend.admit(self.request(), self.tensors)

    @property
    def tensors(self) -> dict[str, bytes]:
        """All that its graphs name: those of edits, and the trace's own."""
        own = self.tracer.constants.data
        return (
            own | {digest: data for edit in self.edits for digest, data in edit.tensors.items()} if self.edits else own
        )

    def request(self) -> Request:
        assert self.graph is not None
        own = encode(self.graph) if self.graph.body.nodes else None
        constants = constants_of(self.graph.body).union(*(edit.tensors for edit in self.edits))
        edits = tuple(edit.graph for edit in self.edits)
        links = self.recorder.exchange.links(len(edits))
        return Request(self.prompt, self.sampling, own, constants, edits, self._collecting(), links)

    def _collecting(self) -> tuple[bytes, ...]:
        cached = self.recorder.cached
        sites = [site.name for site in self.tracer.backend.tree.catalogue.sites if site.name in cached]
        return (collecting_graph(tuple(sites)),) if sites else ()

    def line_of(self, failure: Failure) -> str:
        """Where the user wrote what failed, empty if that isn't known."""
        if failure.node is None:
            return ""
        if failure.program < len(self.edits):
            edit = self.edits[failure.program]
            named = "" if edit.name is None else f", in the edit {edit.name!r}"
            return f"{edit.lines.get(failure.node, edit.line)}{named}"
        is_own = self._is_own(failure)
        return str(self.recorder.lines[failure.node]) if is_own and failure.node in self.recorder.lines else ""

    def source_of(self, failure: Failure) -> str:
        """Where another invoke recorded the value that failed this one, empty if it was none."""
        is_own = failure.node is not None and self._is_own(failure)
        source = self.recorder.exchange.sources.get(failure.node) if is_own and failure.node is not None else None
        return "" if source is None else str(source)

    def _is_own(self, failure: Failure) -> bool:
        has_own = self.graph is not None and bool(self.graph.body.nodes)
        return has_own and failure.program == len(self.edits)


class Tracer(Recording):
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
        self.backend = backend
        known = standing or Standing(NamedEdits())
        self.standing = Standing(known.named, known.require())  # as they are now
        self._runs = runs
        self._session = session_of(backend) if runs else None
        self.constants = Constants()
        self.bundle = Bundle() if self._session is None else self._session.bundle
        self.invokes: list[Invoke] = []
        self.recorders: list[Recorder] = []
        self.logs: list[str] = []
        self.iter = Iterations()
        self._arguments = arguments
        self._only = Invoke(self, inputs, arguments) if inputs else None

    # -- the block -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if _HAS_EINOPS:
            import nnsight_vllm.trace.einops_backend  # noqa: F401  (einops finds the backend by itself)
        self.line = user_line()
        if active.is_recording():
            raise RefusedError(f"a trace can't be opened inside another one; {self.line}")
        if self._only is not None:
            active.push(self._only.recorder)
        try:
            self._enter_block()
        except BaseException:
            self._pop()
            raise
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

    @property
    def frame(self) -> FrameType:
        """Where the block stands."""
        return self._frame

    def _close(self, kind: type[BaseException] | None) -> bool:
        try:
            with garbage.paused():
                if not self._leave_block(kind):
                    return False
                if self._only is not None:
                    self._only.finish()
        finally:
            self._pop()
        if self._session is not None:
            self._session.tracers.append(self)
        elif self._runs:
            errors = run_all(self.backend, [self])
            deliver(self._frame)
            raise_all(errors, "of the trace")
        return True

    def _pop(self) -> None:
        if self._only is not None:
            active.pop()

    def add(self, invoke: Invoke) -> None:
        """Take an invoke whose block is over; one that was entered again is there already."""
        if invoke not in self.invokes:
            self.invokes.append(invoke)

    def requests(self) -> list[Request]:
        """What is to run, now that no invoke adds to another's graph any more."""
        for invoke in self.invokes:
            invoke.close()
        return [invoke.request() for invoke in self.invokes]

    @property
    def tensors(self) -> dict[str, bytes]:
        """All that the requests' graphs name."""
        edits = {edit for invoke in self.invokes for edit in invoke.edits}
        return self.constants.data | {digest: data for edit in edits for digest, data in edit.tensors.items()}

    def settle(self, outcomes: list[Outcome], name: str = "") -> list[InterventionError]:
        """Give all proxies their values. Returns what failed; `name` says of which trace it is."""
        pairs = zip(self.invokes, outcomes, strict=True)
        return [error for invoke, outcome in pairs for error in self._settle(invoke, outcome, name)]

    def _settle(self, invoke: Invoke, outcome: Outcome, name: str) -> list[InterventionError]:
        """Give the invoke's proxies their values. Returns what failed."""
        values, samples = invoke.recorder.values, outcome.samples
        values["result"] = outcome.result
        if len(samples) == 1:
            values.update(samples[0].values)
        else:
            names = {name for sample in samples for name in sample.values}
            values.update({name: [sample.values.get(name) for sample in samples] for name in names})
        invoke.recorder.state, invoke.recorder.num_samples = "done", len(samples)
        for line in (line for sample in samples for line in sample.logs):
            self.logs.append(line)
            print(line)
        failures = [sample.failure for sample in samples if sample.failure is not None]
        return [error_of(invoke.line_of(failure), failure, invoke.source_of(failure), name) for failure in failures]

    def fail_recorders(self) -> None:
        """Those that didn't get values won't get any."""
        for recorder in self.recorders:
            if recorder.state != "done":
                recorder.state = "failed"

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
        if active.is_recording():
            raise RefusedError(f"an invoke can't be opened inside another one; {user_line()}")
        return Invoke(self, inputs, {**self._arguments, **arguments})

    def all(self) -> IterationBlock:
        """A block that runs at every iteration."""
        return IterationBlock(slice(None))

    def cond(self, test: object) -> CondBlock:
        """A block that runs where `test` is true; `.else_()` of it runs otherwise."""
        return CondBlock(active.current("tracer.cond()"), test)

    def log(self, *args: object) -> None:
        """Print the arguments when the run is over."""
        active.current("tracer.log()").log(args)

    def cache(self, modules: object = None, include_inputs: bool = False) -> Cache:
        """Collect the outputs of all modules, or of these (or at these paths), in every iteration of this request.

        Behind the trace it is a mapping: `cache["model.layers.5"].output[k]` is the value of iteration k, as all edits
        of the request left it; `cache.model.layers[5]` is the same. With `include_inputs` there are `.inputs` too.
        """
        recorder = active.current("tracer.cache()")
        sites = cached_sites(self.backend.tree, modules, include_inputs)
        recorder.require_recording()
        recorder.cached |= {site.name for site in sites}
        return Cache(recorder, sites)

    def stop(self) -> None:
        """End the request at this point of the program."""
        active.current("tracer.stop()").stop()

    @property
    def result(self) -> Proxy:
        """What the engine generates: `.text`, `.token_ids`, `.finish_reason`, `.outputs`. Known after the run."""
        recorder = active.current("tracer.result")
        proxy = Proxy(recorder, None, (object(),), None)
        proxy._slot = "result"
        return proxy

    @property
    def graph(self) -> GraphView:
        """What was recorded: of the open invoke, or of the only one."""
        if active.is_recording():
            return GraphView(active.current("tracer.graph").graph())
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


def run_all(backend: Backend, tracers: list[Tracer], names: bool = False) -> list[InterventionError]:
    """Run the traces' requests together and give their proxies their values. Returns what failed, with `names` by its trace."""
    requests = [tracer.requests() for tracer in tracers]
    tensors = {digest: data for tracer in tracers for digest, data in tracer.tensors.items()}
    together = [request for one in requests for request in one]
    outcomes = iter(backend.run(together, tensors) if together else [])
    errors = []
    for i, (tracer, own) in enumerate(zip(tracers, requests, strict=True), 1):
        name = f"trace {i} of the session ({tracer.line}): " if names else ""
        errors += tracer.settle(list(islice(outcomes, len(own))), name)
    return errors


def raise_all(errors: list[InterventionError], of_what: str) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"{len(errors)} requests {of_what} failed", errors)


def error_of(line: str, failure: Failure, source: str = "", name: str = "") -> InterventionError:
    """A failure as the error that its user sees, with the line."""
    kind: type[NNsightError] = PreemptedError if failure.kind == "PreemptedError" else InterventionError
    what = (
        failure.message
        if failure.kind in {"PreemptedError", "InterventionError"}
        else f"{failure.kind}: {failure.message}"
    )
    came = f", of a value recorded at {source}" if source else ""
    error: Any = kind(f"{name}{what}{came}; {line}" if line else f"{name}{what}")
    error.retryable = failure.retryable
    return error  # type: ignore[no-any-return]
