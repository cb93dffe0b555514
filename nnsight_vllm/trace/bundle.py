"""Values of one invoke in another: what a trace's recorders know of each other.

Where an invoke uses a value that another one recorded, the owner's graph gets an `export` of it, and the user's an `import`. The
export stands behind the owner's last node that makes or changes the value, so it is what the owner's block left. The engine
holds a request before the *iteration* that needs an import until the step that makes the value is over; whoever would wait
for itself that way is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nnsight_vllm.errors import RefusedError, ScopeError
from nnsight_vllm.graph.copying import ids_of
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.nodes import Block, Cond, Export, Import, Node, Ref, Save
from nnsight_vllm.graph.walk import iteration_after
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.source import Line, user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.recorder import Recorder
    from nnsight_vllm.trace.scope import Scope


@dataclass
class Lent:
    """A value that others use: there when the owner's `iteration` is over. `uses`: by how many requests."""

    key: str
    iteration: int
    proxy: Proxy
    line: Line
    uses: int = 0


@dataclass(frozen=True)
class Change:
    """An operation that changes its target in place."""

    node: int
    target: Proxy
    of_container: bool

    def reaches(self, proxy: Proxy) -> bool:
        """Whether the value may be another one after it."""
        changed, own = _storages(self.target), _storages(proxy)
        if self.of_container:
            is_flat = not any(
                isinstance(item, list | dict | meta.Unknown) for value in proxy._metas for item in _items(value)
            )
            return not own and (proxy._node == self.target._node or not is_flat)
        return bool(changed & own) or not (changed and own)


@dataclass(frozen=True)
class Wait:
    """Before `iteration`, an invoke waits for the end of iteration `until` of recorder `owner`."""

    iteration: int
    owner: int
    until: int
    line: Line


@dataclass
class Exchange:
    """One recorder's part. `late`: nodes added behind a top-level node, by that node's id, once the block was recorded.

    `sources`: the line where the value behind an import was recorded.
    """

    lent: dict[int, Lent] = field(default_factory=dict)
    borrowed: dict[tuple[int, int], Proxy] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    late: dict[int, list[Node]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    sources: dict[int, Line] = field(default_factory=dict)

    def links(self, program: int = 0) -> Links | None:
        """What the engine has to know beside the graph, which is the request's `program`-th."""
        if not self.lent and not self.needs:
            return None
        makes = {lent.key: lent.uses for lent in self.lent.values()}
        return Links(makes=makes, needs=list(self.needs), program=program)

    def with_late(self, nodes: list[Node]) -> list[Node]:
        return [one for node in nodes for one in (node, *self.late.get(node.id, ()))] if self.late else list(nodes)

    def note_change(self, node: int, target: Proxy, of_container: bool) -> None:
        """An operation changes the target. Raises where others use it as it was."""
        change = Change(node, target, of_container)
        self.changes.append(change)
        for lent in self.lent.values():
            if change.reaches(lent.proxy):
                raise RefusedError(
                    f"another invoke uses this value as it was ({lent.line}), so it can't be changed any more: change a "
                    f".clone(); {user_line()}"
                )


class Bundle:
    """The recorders whose values may meet. With `goes_on` a program that was recorded may be added to at its end."""

    def __init__(self, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self.recorders: list[Recorder] = []
        self._waits: dict[int, list[Wait]] = {}

    def add(self, recorder: Recorder) -> int:
        """Returns the recorder's number."""
        self.recorders.append(recorder)
        return len(self.recorders) - 1

    def borrow(self, proxy: Proxy, into: Recorder) -> Proxy:
        """What stands for another invoke's value in this one. Raises where it can't be had."""
        owner = proxy._recorder
        self._require_value(proxy)
        assert proxy._node is not None
        known = into.exchange.borrowed.get((owner.number, proxy._node))
        if known is not None:
            return known
        lent, iteration = self._lend(proxy), into.places.iteration_now()
        self._wait(into, Wait(iteration, owner.number, lent.iteration, user_line()), lent)
        id = into.new_id()
        _insert(into.body, Import(id, lent.key, iteration), into.scope)
        lent.uses += into.num_samples
        into.exchange.needs.append(Need(lent.key, iteration, id))
        into.exchange.sources[id] = owner.lines[proxy._node]
        local = Proxy(into, id, tuple(meta.fresh(value) for value in proxy._metas[-1:]), into.body)
        into.exchange.borrowed[owner.number, proxy._node] = local
        return local

    def save_late(self, proxy: Proxy) -> str:
        """Save a value of an invoke that is recorded already, as its block left it. Returns the name."""
        owner = proxy._recorder
        self._require_value(proxy)
        after, _ = _settled(proxy)
        name = owner.new_slot()
        assert proxy._node is not None
        owner.exchange.late.setdefault(after, []).append(Save(owner.new_id(), name, Ref(proxy._node)))
        return name

    def _require_value(self, proxy: Proxy) -> None:
        if proxy._recorder.bundle is not self:
            raise RefusedError(
                f"a value of another trace can't be used here: save it there and use it when that trace is over, or put both "
                f"traces into one session; {user_line()}"
            )
        if proxy._scope is None or proxy._node is None:
            raise RefusedError(f"tracer.result is known after the run, it can't be computed with; {user_line()}")
        if not proxy._scope.is_visible():
            where = "branch" if proxy._scope.kind in {"then", "else"} else "loop"
            raise ScopeError(f"this value exists only inside the {where} at {proxy._scope.line}; used at {user_line()}")

    def _lend(self, proxy: Proxy) -> Lent:
        owner, node = proxy._recorder, proxy._node
        assert node is not None
        exchange = owner.exchange
        if node not in exchange.lent:
            if owner.num_samples > 1:
                raise RefusedError(
                    f"the value recorded at {owner.lines[node]} is of an invoke with n={owner.num_samples}, so it is "
                    f"{owner.num_samples} values: another invoke can't use it; {user_line()}"
                )
            after, iteration = _settled(proxy)
            lent = Lent(f"{owner.number}.{len(exchange.lent)}", iteration, proxy, user_line())
            exchange.late.setdefault(after, []).append(Export(owner.new_id(), lent.key, Ref(node)))
            exchange.lent[node] = lent
        return exchange.lent[node]

    def _wait(self, into: Recorder, wait: Wait, lent: Lent) -> None:
        back = self._path(wait.owner, wait.until, into.number, wait.iteration, set())
        if back is not None:
            raise RefusedError(
                f"this would wait for itself: iteration {wait.iteration} of this invoke needs a value of iteration {wait.until} of "
                f"the other, which needs one of iteration {back.until} of this one, at {back.line}. Values pass between "
                f"steps, so two invokes can't need each other's values of one iteration; {user_line()}"
            )
        self._waits.setdefault(into.number, []).append(wait)

    def _path(self, start: int, iteration: int, goal: int, least: int, seen: set[tuple[int, int]]) -> Wait | None:
        """The wait that keeps `start` from ending its iteration before `goal` ends one from `least` on."""
        if (start, iteration) in seen:
            return None
        seen.add((start, iteration))
        for wait in self._waits.get(start, ()):
            if wait.iteration <= iteration:
                if wait.owner == goal and wait.until >= least:
                    return wait
                further = self._path(wait.owner, wait.until, goal, least, seen)
                if further is not None:
                    return further
        return None


def _settled(proxy: Proxy) -> tuple[int, int]:
    """The top-level node of its recorder behind which a value is as the block left it, and the iteration of that."""
    owner = proxy._recorder
    wanted = {proxy._node, *(change.node for change in owner.exchange.changes if change.reaches(proxy))}
    nodes = owner.body.nodes
    last = max(i for i, node in enumerate(nodes) if not wanted.isdisjoint(ids_of(Block([node]))))
    iteration = iteration_after(nodes[: last + 1])
    if iteration is None:
        assert proxy._node is not None
        raise RefusedError(
            f"the value recorded at {owner.lines[proxy._node]} is never final, for its iteration block has no end: give the "
            f"block one (tracer.iter[:n]) to use its last value in another invoke; {user_line()}"
        )
    return nodes[last].id, iteration


def _storages(proxy: Proxy) -> frozenset[int]:
    """The memory of a value; none where that isn't known."""
    found = [meta.storage(value) for value in proxy._metas]
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
