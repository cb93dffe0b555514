"""Requests that wait for each other's values, as the scheduler knows them: who may not run yet, and who never will.

A request is *held* before an iteration whose imports aren't made. It goes on when the worker says they are, and it fails when they
never will be: their maker ended without, or waits for itself, or isn't in the bundle. So nobody waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.wire.step_output import Address, Released

PATIENCE = 30.0
"""Seconds that a bundle waits for those of its requests that haven't come."""

_CIRCLE = Failure("InterventionError", "the request that makes it waits for this one")


@dataclass
class _Member:
    """`is_at_worker`: the worker knows the request, and hears by itself that it ended. `end`: why it makes nothing more."""

    bundle: _Bundle
    links: Links
    is_at_worker: bool = False
    end: Failure | None = None


@dataclass
class _Bundle:
    """`seen` counts all requests that came. `lost`: why a key will never be there."""

    name: str
    size: int
    seen: int = 0
    last_came: float = 0.0
    members: dict[str, _Member] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    lost: dict[str, Failure] = field(default_factory=dict)

    @property
    def is_expected_no_more(self) -> bool:
        return self.seen >= self.size or time.monotonic() - self.last_came > PATIENCE

    def missing(self, links: Links, iteration: int) -> list[Need]:
        return [need for need in links.needs if need.iteration <= iteration and need.key not in self.made]


class Bundles:
    """All bundles with requests that live or are still to come."""

    def __init__(self) -> None:
        self._bundles: dict[str, _Bundle] = {}
        self._members: dict[str, _Member] = {}
        self._unmet: dict[str, _Member] = {}  # those with needs that aren't made
        self._released = Released()

    def __bool__(self) -> bool:
        return bool(self._bundles or self._released)

    # -- what happens --------------------------------------------------------------------------------------------------

    def add(self, request_id: str, links: Links) -> None:
        """A request came, with its links."""
        bundle = self._bundles.setdefault(links.bundle, _Bundle(links.bundle, links.size))
        bundle.seen, bundle.last_came = bundle.seen + 1, time.monotonic()
        member = bundle.members[request_id] = self._members[request_id] = _Member(bundle, links)
        for key in links.makes:
            bundle.makers.setdefault(key, request_id)
        if bundle.missing(links, max((need.iteration for need in links.needs), default=0)):
            self._unmet[request_id] = member

    def sent(self, request_ids: Iterable[str]) -> None:
        """These are on their way to the worker."""
        for id in request_ids:
            if id in self._members:
                self._members[id].is_at_worker = True

    def report(self, made: Iterable[Address], failed: Mapping[str, Failure], last: Iterable[str]) -> None:
        """What the worker says of a step. `last`: requests whose graphs stopped or failed."""
        for name, key in made:
            if name in self._bundles:
                self._bundles[name].made.add(key)
        stopped = Failure("InterventionError", "it stopped before")
        for id in last:
            if id in self._members:
                self._members[id].end = failed.get(id, stopped)

    def fail(self, request_id: str, failure: Failure) -> None:
        """The scheduler is about to end the request for this reason."""
        if request_id in self._members:
            self._members[request_id].end = failure

    def ended(self, request_id: str, how: str) -> None:
        """A request is gone. `how` in words, where nothing else is known of it."""
        self._unmet.pop(request_id, None)
        member = self._members.pop(request_id, None)
        if member is None:
            return
        bundle, links = member.bundle, member.links
        del bundle.members[request_id]
        end = member.end or Failure("InterventionError", how)
        for key in links.makes:
            if bundle.makers[key] == request_id and key not in bundle.made:
                bundle.lost[key] = end
        if not member.is_at_worker:
            self._released.unused += [(bundle.name, need.key) for need in links.needs]

    # -- what follows --------------------------------------------------------------------------------------------------

    def waiting(self) -> list[str]:
        """Requests that may have to be held."""
        for id, member in list(self._unmet.items()):
            if all(need.key in member.bundle.made for need in member.links.needs):
                del self._unmet[id]
        return list(self._unmet)

    def holds(self, request_id: str, iteration: int) -> bool:
        """Whether a request can't begin an iteration yet."""
        member = self._unmet.get(request_id)
        return member is not None and bool(member.bundle.missing(member.links, iteration))

    def hopeless(self, held: Mapping[str, int]) -> dict[str, Failure]:
        """Of held requests, by the iteration that they wait before, those that will never go on, and why."""
        circle = self._circle(held)
        reasons = {id: self._failure(id, iteration, id in circle) for id, iteration in held.items()}
        return {id: failure for id, failure in reasons.items() if failure is not None}

    def take_released(self) -> Released:
        """What the worker has to hear with the next step."""
        for name, bundle in list(self._bundles.items()):
            if not bundle.members and bundle.is_expected_no_more:
                del self._bundles[name]
                self._released.bundles.append(name)
        released, self._released = self._released, Released()
        return released

    def _failure(self, request_id: str, iteration: int, is_in_circle: bool) -> Failure | None:
        """Why a request will never begin an iteration; None where it may."""
        member = self._unmet.get(request_id)
        if member is None:
            return None
        for need in member.bundle.missing(member.links, iteration):
            reason = self._reason(member.bundle, need) or (_CIRCLE if is_in_circle else None)
            if reason is not None:
                return _failed(need, reason, member.links.program)
        return None

    def _reason(self, bundle: _Bundle, need: Need) -> Failure | None:
        """Why a value will never be there; None where it may."""
        if need.key in bundle.lost:
            return bundle.lost[need.key]
        if need.key in bundle.makers or not bundle.is_expected_no_more:
            return None
        return Failure("InterventionError", "no request of the bundle exports it")

    def _circle(self, held: Mapping[str, int]) -> set[str]:
        """Held requests that wait for held ones that wait for them, and so on."""
        inside = {id: set(self._makers(id, iteration)) for id, iteration in held.items() if self._makes(id)}
        is_smaller = bool(inside)
        while is_smaller:
            free = [id for id, makers in inside.items() if makers.isdisjoint(inside)]
            for id in free:
                del inside[id]
            is_smaller = bool(free)
        return set(inside)

    def _makes(self, request_id: str) -> bool:
        member = self._unmet.get(request_id)
        return member is not None and bool(member.links.makes)

    def _makers(self, request_id: str, iteration: int) -> Iterator[str]:
        member = self._unmet[request_id]
        for need in member.bundle.missing(member.links, iteration):
            if need.key in member.bundle.makers:
                yield member.bundle.makers[need.key]


def _failed(need: Need, reason: Failure, program: int) -> Failure:
    why = reason.message if reason.kind == "InterventionError" else f"{reason.kind}: {reason.message}"
    kind = "PreemptedError" if reason.retryable else "InterventionError"
    text = f"a value of another request that this one needs before its iteration {need.iteration} will never be there: {why}"
    return Failure(kind, text, need.node, reason.retryable, program)
