"""One request with a graph, while the engine runs it: where its program stands and what it holds."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnsight_vllm.errors import InterventionError, OutOfOrderError, PreemptedError
from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.plan.program import Program
from nnsight_vllm.wire.step_output import Ints
from nnsight_vllm.worker.batch.places import RequestPlace
from nnsight_vllm.worker.batch.prompt_progress import Progress
from nnsight_vllm.worker.batch.request_programs import RequestPrograms
from nnsight_vllm.worker.batch.tables import TableLine, TableLines
from nnsight_vllm.worker.ops.usage import Spent
from nnsight_vllm.worker.results.outbox import Outbox, describe

START = -1


class Status(enum.Enum):
    RUNNING = "running"
    ENDED = "ended"  # the program is over, or the request was stopped
    FAILED = "failed"


@dataclass(frozen=True)
class Arrival:
    """A new request as the engine hands it over. `prompt_length` in tokens; `graph` as msgpack bytes, or several in order.

    `refuse_samples`: why the sampled token can't be replaced, empty where it can. `links`: those to requests of its bundle.
    """

    request_id: str
    graph: bytes | Sequence[bytes]
    prompt_length: int
    seed: int
    refuse_samples: str = ""
    links: Links | None = None

    @property
    def graphs(self) -> list[bytes]:
        return list(self.graph) or [b""] if isinstance(self.graph, list | tuple) else [self.graph]  # type: ignore[list-item]


@dataclass(frozen=True)
class Step:
    """The rows of one step. `ids`: its requests in the order of the batch, `index` the same the other way round.

    Request i has rows `starts[i] : starts[i + 1]` of the step, the first at `positions[i]` of the request. Where each
    request has one row, that's row i; among the logits row `logits[i]`, where others have drafts to verify.
    """

    index: Mapping[str, int]
    starts: Ints
    positions: Ints
    logits: Ints | None = None

    @classmethod
    def of(cls, ids: Iterable[str], starts: Ints, positions: Ints) -> Step:
        return cls({id: i for i, id in enumerate(ids)}, starts, positions)

    def rows(self, at: int, at_logits: bool) -> slice:
        """The rows of the request at this place in the batch."""
        if not at_logits:
            return slice(int(self.starts[at]), int(self.starts[at + 1]))
        row = at if self.logits is None else int(self.logits[at])
        return slice(row, row + 1)

    def logits_rows(self, at: Ints) -> Ints:
        """The one row that each request at these places has among the logits."""
        return at if self.logits is None else self.logits[at]

    def after_logits(self) -> Step:
        """The same step from where tokens are drawn: those have a row a request, drafts or not."""
        return self if self.logits is None else replace(self, logits=None)


@dataclass(frozen=True)
class Wait:
    """What a program waits for. No site: the iteration's beginning."""

    site: str | None
    iteration: int


@dataclass
class LoopFrame:
    """The items of a loop; those from `position` on are still to come."""

    items: list[Any]
    position: int = 0


@dataclass
class IterationsFrame:
    """A block that runs at iterations `upcoming, upcoming + step, ...` below `stop`."""

    upcoming: int
    stop: int
    step: int
    current: int = START

    def advance(self) -> bool:
        """Go to the next iteration; False after the last one."""
        if self.upcoming >= self.stop:
            return False
        self.current, self.upcoming = self.upcoming, self.upcoming + self.step
        return True


Frame = LoopFrame | IterationsFrame


@dataclass(eq=False)
class EngineRequest:
    """A request, or one of several programs that it has: then `parts` are all of them, and this is the one with `number`.

    `pc`: the next instruction. `order`: how far the program is in this iteration. `progress`: until its prompt is computed.

    `spent` is that of all its programs.

    `env`: node id -> value; under negative ids the request's `parameters`, which it keeps as long as it lives, as it does the
    `slots` of its edits, by node. While the request is in a group, the group has its place in the program and its values.
    """

    id: str
    prompt_length: int
    seed: int
    program: Program = field(default_factory=lambda: Program(()))
    status: Status = Status.RUNNING
    pc: int = 0
    node: int | None = None
    env: dict[int, Any] = field(default_factory=dict)
    parameters: dict[int, Any] = field(default_factory=dict)
    slots: dict[int, TableLine] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    wait: Wait = Wait(None, 0)
    iteration: int = START
    order: int = START
    place: RequestPlace | None = None
    num_drawn: int = 0
    num_saved: int = 0  # bytes sent home
    spent: Spent = field(default_factory=Spent)
    links: Links | None = None
    drawn: set[str] = field(default_factory=set)  # keys of other requests' values that it has
    failure: Failure | None = None
    outbox: Outbox = field(default_factory=Outbox)
    progress: Progress | None = None
    number: int = 0
    parts: RequestPrograms | None = None
    _lines: dict[int, TableLines] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.status is Status.RUNNING

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all others."""
        return self.id, self.number

    @property
    def programs(self) -> Sequence[EngineRequest]:
        """All programs of this request."""
        return (self,) if self.parts is None else self.parts.units

    @property
    def has_failed(self) -> bool:
        return any(unit.status is Status.FAILED for unit in self.programs)

    @property
    def failed_by(self) -> Failure | None:
        """Why it failed, whichever program did."""
        return next((unit.failure for unit in self.programs if unit.failure is not None), None)

    @property
    def sent_in_all(self) -> int:
        """Bytes that all its programs sent home."""
        return sum(unit.num_saved for unit in self.programs)

    def absolute(self, iteration: int | None) -> int:
        """An instruction's iteration; None is that of the innermost `iterations` block."""
        if iteration is not None:
            return iteration
        for frame in reversed(self.frames):
            if isinstance(frame, IterationsFrame):
                return frame.current
        raise InterventionError("a site without an iteration outside of an iterations block")

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

    def leave_iteration(self) -> None:
        self.place = None
        self.order = START

    def end(self) -> None:
        self.finish(Status.ENDED)

    def stop(self, keep_token: bool) -> None:
        if self.parts is None or not self.parts.is_over:
            self.outbox.stop(keep_token)
        self._end_all(Status.ENDED)

    def fail(self, error: BaseException, keep_token: bool) -> None:
        """The request's own failure: nobody else hears of it."""
        retryable = isinstance(error, InterventionError) and error.retryable
        if self.parts is None or not self.parts.is_over:
            self.failure = Failure(type(error).__name__, describe(error), self.node, retryable, self.number)
            self.outbox.fail(self.failure, keep_token)
        self._end_all(Status.FAILED)

    def start_over(self, outbox: Outbox) -> None:
        """What it had to send is thrown away; how it ended too."""
        for unit in self.programs:
            unit.outbox = outbox
        if self.parts is not None:
            self.parts.reopen()

    def _end_all(self, status: Status) -> None:
        self.finish(status)
        if self.parts is not None:
            self.parts.end(status)

    def finish(self, status: Status) -> None:
        """The program doesn't go on."""
        if self.status is not Status.FAILED:
            self.status = status
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
    parts, drawn = RequestPrograms(ended) if len(graphs) > 1 else None, set[str]()
    spent = Spent()
    units = [
        EngineRequest(
            arrival.request_id,
            arrival.prompt_length,
            arrival.seed,
            outbox=outbox,
            number=number,
            parts=parts,
            links=arrival.links,
            drawn=drawn,
            spent=spent,
        )
        for number in range(len(graphs))
    ]
    if parts is not None:
        parts.units = units
    return units
