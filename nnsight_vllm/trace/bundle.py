"""Values of one invoke in another: what a trace's recorders know of each other.

Where an invoke uses a value that another one recorded, the owner's graph gets an `export` of it, and the user's an `import`. The
export stands behind the owner's last node that makes or changes the value, so it is what the owner's block left. The engine
holds a request before the *iteration* that needs an import until the step that makes the value is over; whoever would wait
for itself that way is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.graph.copying import ids_of
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.nodes import Block, Cond, Export, Import, Node, Ref, Save
from nnsight_vllm.graph.walk import iteration_after
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.places import Places
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recording import Recording, RunValue
from nnsight_vllm.trace.scope import Scope
from nnsight_vllm.trace.source import SourceLine, user_line


@dataclass
class Lent:
    """A value that others use: there when the owner's `iteration` is over. `uses`: by how many requests."""

    key: str
    iteration: int
    value: RunValue
    line: SourceLine
    uses: int = 0


@dataclass(frozen=True)
class Change:
    """An operation that changes its target in place."""

    node: int
    target: RunValue
    of_container: bool

    def reaches(self, value: RunValue) -> bool:
        """Whether the value may be another one after it."""
        changed, own = _storages(self.target), _storages(value)
        if self.of_container:
            is_flat = not any(
                isinstance(item, list | dict | meta.Unknown) for known in value._metas for item in _items(known)
            )
            return not own and (value._node == self.target._node or not is_flat)
        return bool(changed & own) or not (changed and own)


@dataclass(frozen=True)
class InvokeWait:
    """Before `iteration`, an invoke waits for the end of iteration `until` of another, the `owner`."""

    iteration: int
    owner: Recording
    until: int
    line: SourceLine


@dataclass
class Exchange:
    """One recording's part; `number` is its own in the bundle. `late`: nodes added behind a top-level node, by that node's id, once the block was recorded.

    `sources`: the line where the value behind an import was recorded.
    """

    number: int
    lent: dict[int, Lent] = field(default_factory=dict)
    borrowed: dict[tuple[Recording, int], Proxy] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    late: dict[int, list[Node]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    sources: dict[int, SourceLine] = field(default_factory=dict)

    def links(self, program: int = 0) -> Links | None:
        """What the engine has to know beside the graph, which is the request's `program`-th."""
        if not self.lent and not self.needs:
            return None
        makes = {lent.key: lent.uses for lent in self.lent.values()}
        return Links(makes=makes, needs=list(self.needs), program=program)

    def with_late(self, nodes: list[Node]) -> list[Node]:
        return [one for node in nodes for one in (node, *self.late.get(node.id, ()))] if self.late else list(nodes)

    def note_change(self, node: int, target: RunValue, of_container: bool) -> None:
        """An operation changes the target. Raises where others use it as it was."""
        change = Change(node, target, of_container)
        self.changes.append(change)
        for lent in self.lent.values():
            if change.reaches(lent.value):
                raise RefusedError(
                    f"another invoke uses this value as it was ({lent.line}), so it can't be changed any more: change a "
                    f".clone(); {user_line()}"
                )


class Bundle:
    """The recordings whose values may meet. With `goes_on` a program that was recorded may be added to at its end."""

    def __init__(self, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self._exchanges: dict[Recording, Exchange] = {}
        self._waits: dict[Recording, list[InvokeWait]] = {}

    def add(self, recording: Recording) -> Exchange:
        """Take one in. Returns its part."""
        return self._exchanges.setdefault(recording, Exchange(len(self._exchanges)))

    def borrow(self, value: RunValue, into: Recording, places: Places) -> Proxy:
        """What stands for another invoke's value in this one, whose places these are. Raises where it can't be had."""
        owner, exchange, node = value._recorder, self._exchanges[into], self._node_of(value)
        if (owner, node) in exchange.borrowed:
            return exchange.borrowed[owner, node]
        lent, iteration = self._lend(value, node), places.iteration_now()
        self._wait(into, InvokeWait(iteration, owner, lent.iteration, user_line()))
        id = into.new_id()
        _insert(into.body, Import(id, lent.key, iteration), into.scope)
        lent.uses += into.num_samples
        exchange.needs.append(Need(lent.key, iteration, id))
        exchange.sources[id] = owner.lines[node]
        local = Proxy(into, id, tuple(meta.fresh(known) for known in value._metas[-1:]), into.body)
        exchange.borrowed[owner, node] = local
        return local

    def save_late(self, value: RunValue) -> str:
        """Save a value of an invoke that is recorded already, as its block left it. Returns the name."""
        owner, node = value._recorder, self._node_of(value)
        exchange = self._exchanges[owner]
        after, _ = _settled(value, node, exchange)
        name = owner.new_slot()
        exchange.late.setdefault(after, []).append(Save(owner.new_id(), name, Ref(node)))
        return name

    def _node_of(self, value: RunValue) -> int:
        """The node behind a value of any of the recordings. Raises where it isn't one, or can't be used by others."""
        if value._recorder not in self._exchanges:
            raise RefusedError(
                f"a value of another trace can't be used here: save it there and use it when that trace is over, or put both "
                f"traces into one session; {user_line()}"
            )
        return value._visible_node()

    def _lend(self, value: RunValue, node: int) -> Lent:
        owner = value._recorder
        exchange = self._exchanges[owner]
        if node not in exchange.lent:
            if owner.num_samples > 1:
                raise RefusedError(
                    f"the value recorded at {owner.lines[node]} is of an invoke with n={owner.num_samples}, so it is "
                    f"{owner.num_samples} values: another invoke can't use it; {user_line()}"
                )
            after, iteration = _settled(value, node, exchange)
            lent = Lent(f"{exchange.number}.{len(exchange.lent)}", iteration, value, user_line())
            exchange.late.setdefault(after, []).append(Export(owner.new_id(), lent.key, Ref(node)))
            exchange.lent[node] = lent
        return exchange.lent[node]

    def _wait(self, into: Recording, wait: InvokeWait) -> None:
        back = self._path(wait, into, wait.iteration, set())
        if back is not None:
            raise RefusedError(
                f"this would wait for itself: iteration {wait.iteration} of this invoke needs a value of iteration {wait.until} of "
                f"the other, which needs one of iteration {back.until} of this one, at {back.line}. Values pass between "
                f"steps, so two invokes can't need each other's values of one iteration; {user_line()}"
            )
        self._waits.setdefault(into, []).append(wait)

    def _path(
        self, wait: InvokeWait, goal: Recording, least: int, seen: set[tuple[Recording, int]]
    ) -> InvokeWait | None:
        """The wait that keeps this one's owner from being there before `goal` ends an iteration from `least` on."""
        if (wait.owner, wait.until) in seen:
            return None
        seen.add((wait.owner, wait.until))
        due = [further for further in self._waits.get(wait.owner, ()) if further.iteration <= wait.until]
        for further in due:
            reached = further.owner is goal and further.until >= least
            found = further if reached else self._path(further, goal, least, seen)
            if found is not None:
                return found
        return None


def _settled(value: RunValue, node: int, exchange: Exchange) -> tuple[int, int]:
    """The top-level node of its recording behind which a value is as the block left it, and the iteration of that."""
    owner = value._recorder
    wanted = {node, *(change.node for change in exchange.changes if change.reaches(value))}
    nodes = owner.body.nodes
    last = max(i for i, one in enumerate(nodes) if not wanted.isdisjoint(ids_of(Block([one]))))
    iteration = iteration_after(nodes[: last + 1])
    if iteration is None:
        raise RefusedError(
            f"the value recorded at {owner.lines[node]} is never final, for its iteration block has no end: give the "
            f"block one (tracer.iter[:n]) to use its last value in another invoke; {user_line()}"
        )
    return nodes[last].id, iteration


def _storages(value: RunValue) -> frozenset[int]:
    """The memory of a value; none where that isn't known."""
    found = [meta.storage(known) for known in value._metas]
    return frozenset() if None in found else frozenset(one for one in found if one is not None)


def _items(value: object) -> list[object]:
    match value:
        case list() | tuple():
            return list(value)
        case dict():
            return list(value.values())
        case _:
            return [value]


def _insert(body: Scope, node: Import, open_scope: Scope) -> None:
    """Behind what the body has; a cond that is open again stands there already."""
    inside: Scope | None = open_scope
    while inside is not None and inside.parent is not body:
        inside = inside.parent
    last = body.nodes[-1] if body.nodes else None
    is_reopened = (
        isinstance(last, Cond)
        and inside is not None
        and any(inside.nodes is block.nodes for block in (last.then, last.orelse))
    )
    body.nodes.insert(len(body.nodes) - is_reopened, node)
