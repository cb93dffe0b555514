"""What a trace recorded: its invokes, the requests that they become, and what comes back for them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from types import TracebackType

from nnsight_vllm.errors import InterventionError, PreemptedError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Graph
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.graph.walk import constants_of
from nnsight_vllm.trace.backend import Backend, Outcome, Prompt, Request
from nnsight_vllm.trace.bundle import Bundle
from nnsight_vllm.trace.cache import collecting_graph
from nnsight_vllm.trace.edits import RecordedEdit, Standing
from nnsight_vllm.trace.encode import Constants
from nnsight_vllm.trace.recorded_block import RecordedBlock
from nnsight_vllm.trace.recorder import Recorder
from nnsight_vllm.trace.recording import pop
from nnsight_vllm.trace.source import user_line

_KINDS = {"PreemptedError": PreemptedError, "InterventionError": InterventionError}


class Invoke(RecordedBlock):
    """One request of a trace: its prompt, its sampling, the edits it runs with, its graph."""

    def __init__(self, trace: RecordedTrace, inputs: tuple[object, ...], arguments: dict[str, object]) -> None:
        backend = trace.backend
        self.trace = trace
        self.prompt: Prompt = backend.prompt(inputs)
        self.edits: tuple[RecordedEdit, ...] = trace.standing.chosen(arguments.get("edits", ()))
        self.sampling = backend.sampling({name: value for name, value in arguments.items() if name != "edits"})
        self.recorder = Recorder(
            backend.tree,
            trace.constants,
            self.prompt.rows,
            self.sampling.max_tokens,
            trace.bundle,
            self.sampling.n,
        )
        trace.recorders.append(self.recorder)
        self.graph: Graph | None = None

    def __enter__(self) -> Invoke:
        self._enter_block(self.recorder)
        if self.recorder.state == "closed":  # entered once more: the recording goes on
            self.recorder.state = "recording"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if not self._leave_block(kind):
                return False
            self.finish()
        finally:
            pop()
        return True

    def finish(self) -> None:
        """Close the recording and add it to the trace."""
        self.close()
        self.recorder.state = "closed"
        self.trace.add(self)

    def close(self) -> None:
        """Take what is recorded as the request's graph. Invokes recorded later may have added to it since."""
        graph = self.recorder.graph()
        if graph != self.graph:
            check(graph, self.trace.backend.tree.catalogue)
            self.graph = graph
            self.trace.backend.admit(self.request(), self.tensors)

    @property
    def tensors(self) -> dict[str, bytes]:
        """All that its graphs name: those of edits, and the trace's own."""
        return _with_tensors(self.trace.constants.data, self.edits)

    def request(self) -> Request:
        assert self.graph is not None
        own = encode(self.graph) if self.graph.body.nodes else None
        constants = constants_of(self.graph.body).union(*(edit.tensors for edit in self.edits))
        edits = tuple(edit.graph for edit in self.edits)
        links = self.recorder.exchange.links(len(edits))
        return Request(self.prompt, self.sampling, own, constants, edits, self._collecting(), links)

    def _collecting(self) -> tuple[bytes, ...]:
        cached = self.recorder.cached
        sites = [site.name for site in self.trace.backend.tree.catalogue.sites if site.name in cached]
        return (collecting_graph(tuple(sites)),) if sites else ()

    def error_of(self, failure: Failure, name: str = "") -> InterventionError:
        """A failure as the error that its user sees, with the line; `name` says of which trace it is."""
        what = failure.message if failure.kind in _KINDS else f"{failure.kind}: {failure.message}"
        source, line = self.recorder.exchange.sources.get(self._own_node(failure)), self._line_of(failure)
        came = f", of a value recorded at {source}" if source else ""
        error = _KINDS.get(failure.kind, InterventionError)(f"{name}{what}{came}; {line}" if line else f"{name}{what}")
        error.retryable = failure.retryable
        return error

    def _line_of(self, failure: Failure) -> str:
        """Where the user wrote what failed, empty if that isn't known."""
        if failure.node is not None and failure.program < len(self.edits):
            edit = self.edits[failure.program]
            named = "" if edit.name is None else f", in the edit {edit.name!r}"
            return f"{edit.lines.get(failure.node, edit.line)}{named}"
        return str(self.recorder.lines.get(self._own_node(failure), ""))

    def _own_node(self, failure: Failure) -> int:
        """The node of its own graph that failed, or none that there is."""
        has_own = self.graph is not None and bool(self.graph.body.nodes)
        return failure.node if failure.node is not None and has_own and failure.program == len(self.edits) else -1


class RecordedTrace(RecordedBlock):
    """The invokes of one trace and the tensors that their graphs name. `standing`: the edits that they run with."""

    def __init__(self, backend: Backend, standing: Standing, bundle: Bundle) -> None:
        self.backend = backend
        self.standing = standing
        self.bundle = bundle
        self.line = user_line()
        self.constants = Constants()
        self.invokes: list[Invoke] = []
        self.recorders: list[Recorder] = []
        self.logs: list[str] = []

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
        return _with_tensors(self.constants.data, {edit for invoke in self.invokes for edit in invoke.edits})

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
        return [invoke.error_of(failure, name) for failure in failures]

    def fail_recorders(self) -> None:
        """Those that didn't get values won't get any."""
        for recorder in self.recorders:
            if recorder.state != "done":
                recorder.state = "failed"


def _with_tensors(own: dict[str, bytes], edits: Iterable[RecordedEdit]) -> dict[str, bytes]:
    more = {digest: data for edit in edits for digest, data in edit.tensors.items()}
    return own | more if more else own


def run_all(backend: Backend, traces: list[RecordedTrace], names: bool = False) -> list[InterventionError]:
    """Run the traces' requests together and give their proxies their values. Returns what failed, with `names` by its trace."""
    requests = [trace.requests() for trace in traces]
    tensors = {digest: data for trace in traces for digest, data in trace.tensors.items()}
    together = [request for one in requests for request in one]
    outcomes = iter(backend.run(together, tensors) if together else [])
    errors = []
    for i, (trace, own) in enumerate(zip(traces, requests, strict=True), 1):
        name = f"trace {i} of the session ({trace.line}): " if names else ""
        errors += trace.settle(list(islice(outcomes, len(own))), name)
    return errors


def raise_all(errors: list[InterventionError], of_what: str) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup(f"{len(errors)} requests {of_what} failed", errors)
