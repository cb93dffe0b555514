"""One request with a graph, while the engine runs it: where its program stands and what it holds.

A request may have several programs: edits, its own, and the one that collects its values. They run side by side, each at its
own point, and share what the request is: its id, its results, its end. Where several wait for the same site they run in their
order, so a later one sees what an earlier one wrote. When one stops or fails, the request is over: those that send something
home end at once, while those that only edit go on as long as the engine computes rows for the request, so that all rows are
edited alike (the prefix cache keeps them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nnsight_vllm.errors import GraphError, InterventionError, OutOfOrderError, PreemptedError
from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.wire.extras import MAX_PROGRAMS
from nnsight_vllm.worker.batch.cursor import START, Cursor, LoopFrame
from nnsight_vllm.worker.batch.places import RequestPlace
from nnsight_vllm.worker.batch.prompt_progress import Progress
from nnsight_vllm.worker.batch.step import Arrival, Step
from nnsight_vllm.worker.batch.tables import TableLine, TableLines
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors
from nnsight_vllm.worker.ops.usage import Spent, Storages
from nnsight_vllm.worker.results.outbox import Outbox, describe


class RequestPrograms:
    """The programs of one request, in order. `ended` collects the requests that end in a step."""

    def __init__(self, ended: set[RequestPrograms]) -> None:
        self.units: list[EngineRequest] = []
        self.is_over = False
        self._ended = ended

    def end(self, has_failed: bool) -> None:
        """One of them stopped or failed."""
        if self.is_over:
            return
        self.is_over = True
        self._ended.add(self)
        for unit in self.units:
            if not unit.program.is_quiet:
                unit.finish(has_failed)

    def reopen(self) -> None:
        """What it had to say of its end is withdrawn: something else is to be said."""
        self.is_over = False


@dataclass(eq=False)
class EngineRequest(Cursor):
    """A request, or one of several programs that it has: then `request_programs` are all of them, and this is the one with `number`.

    `progress`: until its prompt is computed. `spent` is that of all its programs.

    `env`: under negative ids the request's `parameters`, which it keeps as long as it lives, as it does the `slots` of its
    edits, by node. While the request is in a group, the group has its place in the program and its values.
    """

    id: str
    prompt_length: int
    seed: int
    place: RequestPlace | None = field(default=None, kw_only=True)
    iteration: int = field(default=START, kw_only=True)
    is_failed: bool = False
    parameters: dict[int, Any] = field(default_factory=dict)
    slots: dict[int, TableLine] = field(default_factory=dict)
    num_drawn: int = 0
    num_saved: int = 0  # bytes sent home
    links: Links | None = None
    drawn: set[str] = field(default_factory=set)  # keys of other requests' values that it has
    failure: Failure | None = None
    outbox: Outbox = field(default_factory=Outbox)
    progress: Progress | None = None
    request_programs: RequestPrograms | None = None
    _lines: dict[int, TableLines] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all others."""
        return self.id, self.number

    @property
    def programs(self) -> Sequence[EngineRequest]:
        """All programs of this request."""
        return (self,) if self.request_programs is None else self.request_programs.units

    @property
    def has_failed(self) -> bool:
        return any(unit.is_failed for unit in self.programs)

    @property
    def failed_by(self) -> Failure | None:
        """Why it failed, whichever program did."""
        return next((unit.failure for unit in self.programs if unit.failure is not None), None)

    @property
    def sent_in_all(self) -> int:
        """Bytes that all its programs sent home."""
        return sum(unit.num_saved for unit in self.programs)

    def expects(self, position: int, count: int) -> bool:
        """Whether the step computes just what comes next, once the prompt is there: the one next position."""
        return count == 1 and position == self.prompt_length + self.iteration

    def place_at(self, site: str) -> RequestPlace:
        """The place at this site, if that's where the program is."""
        if self.place is None or self.place.name != site:
            raise OutOfOrderError(f"{site} can't be changed any more: the program has left it")
        return self.place

    def lines(self, node: int) -> TableLines:
        """Its line for an edit."""
        if node not in self._lines:
            self._lines[node] = TableLines.of([self.slots.get(node)])
        return self._lines[node]

    @property
    def undrawn(self) -> list[tuple[str, str]]:
        """Values of other requests, by bundle and key, that it was to have and hasn't."""
        if self.links is None:
            return []
        return [(self.links.bundle, need.key) for need in self.links.needs if need.key not in self.drawn]

    def draw_seed(self) -> int:
        """A seed for the next random operation, the same alone and in any batch."""
        self.num_drawn += 1
        seed = f"{self.seed}:{self.number}" if self.number else str(self.seed)
        data = hashlib.sha256(f"{seed}:{self.num_drawn}".encode()).digest()
        return int.from_bytes(data[:7], "little")

    def arrive(self, site: Site, tensors: Tensors, step: Step, at_logits: bool) -> None:
        self.place = RequestPlace(site.info.name, site, tensors, self.layout(step, at_logits))

    def layout(self, step: Step, at_logits: bool) -> slice:
        """Its rows in this step: all, or at the logits the one."""
        return step.rows(step.index[self.id], at_logits)

    def remaining(self) -> EngineRequest | None:
        return None if self.is_over else self

    def held(self) -> list[tuple[Spent, int]]:
        found = Storages(self.parameters.values())
        for id, value in self.env.items():
            if id >= 0:
                found.add(value)
        for frame in self.frames:
            if isinstance(frame, LoopFrame):
                found.add(frame.items)
        return [(self.spent, found.num_bytes)]

    def end(self) -> None:
        self.finish(has_failed=False)

    def stop(self, keep_token: bool) -> None:
        if self.request_programs is None or not self.request_programs.is_over:
            self.outbox.stop(keep_token)
        self._end_all(has_failed=False)

    def fail(self, error: BaseException, keep_token: bool | None = None) -> None:
        """The request's own failure: nobody else hears of it. The token drawn in this iteration is kept if it was seen."""
        keep_token = self.has_token if keep_token is None else keep_token
        retryable = isinstance(error, InterventionError) and error.retryable
        if self.request_programs is None or not self.request_programs.is_over:
            self.failure = Failure(type(error).__name__, describe(error), self.node, retryable, self.number)
            self.outbox.fail(self.failure, keep_token)
        self._end_all(has_failed=True)

    def start_over(self, outbox: Outbox) -> None:
        """What it had to send is thrown away; how it ended too."""
        for unit in self.programs:
            unit.outbox = outbox
        if self.request_programs is not None:
            self.request_programs.reopen()

    def _end_all(self, has_failed: bool) -> None:
        self.finish(has_failed)
        if self.request_programs is not None:
            self.request_programs.end(has_failed)

    def finish(self, has_failed: bool) -> None:
        """The program doesn't go on."""
        self.is_over = True
        self.is_failed = self.is_failed or has_failed
        self.place = None
        self.env = {}
        self.frames = []


def interrupted(request: EngineRequest, position: int, count: int) -> PreemptedError:
    """The step computes something else of a request than what comes next."""
    rows = f"positions {position} to {position + count - 1}"
    if request.iteration == START:
        return PreemptedError(f"the engine ran {rows} of a prompt of {request.prompt_length} tokens in one step")
    return PreemptedError(f"the engine evicted the request after iteration {request.iteration} and recomputes {rows}")


def requests_of(arrival: Arrival, outbox: Outbox, ended: set[RequestPrograms]) -> list[EngineRequest]:
    """One for each graph of a new request; they share what they send."""
    graphs = arrival.graphs
    programs, drawn = RequestPrograms(ended) if len(graphs) > 1 else None, set[str]()
    spent = Spent()
    units = [
        EngineRequest(
            arrival.request_id,
            arrival.prompt_length,
            arrival.seed,
            outbox=outbox,
            number=number,
            request_programs=programs,
            links=arrival.links,
            drawn=drawn,
            spent=spent,
        )
        for number in range(len(graphs))
    ]
    if programs is not None:
        programs.units = units
    return units


def check_names(units: Sequence[EngineRequest]) -> None:
    """Raise `GraphError` if two programs of a request send home under one name, or if there are too many."""
    if len(units) > MAX_PROGRAMS:
        raise GraphError(f"a request carries {len(units)} graphs; the limit is {MAX_PROGRAMS}")
    seen: set[str] = set()
    for unit in units:
        if both := seen & unit.program.saves:
            raise GraphError(f"two graphs of the request save under the name {min(both)!r}")
        seen |= unit.program.saves
