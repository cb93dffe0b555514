"""All requests with graphs that the engine knows: those that run by themselves, and those that run in groups.

A group has the requests at the same point of the same program, in the order of the step's batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from nnsight_vllm.worker.batch.group import Group, Unit
from nnsight_vllm.worker.batch.requests import EngineRequest, RequestPrograms
from nnsight_vllm.worker.batch.step import Step


class Population:
    """`alone`: by key. `several`: requests with several programs; `ended`: those of them that ended in this step."""

    def __init__(self) -> None:
        self.requests: dict[str, EngineRequest] = {}
        self.alone: dict[tuple[str, int], EngineRequest] = {}
        self.groups: list[Group] = []
        self.several: set[str] = set()
        self.ended: set[RequestPrograms] = set()

    def add(self, programs: list[EngineRequest]) -> None:
        """A request came, with these programs."""
        self.requests[programs[0].id] = programs[0]
        self.alone |= {unit.key: unit for unit in programs}
        if len(programs) > 1:
            self.several.add(programs[0].id)

    def remove(self, ids: Collection[str]) -> list[EngineRequest]:
        """Requests that ended are gone."""
        self.settle()
        gone = [self.requests.pop(id) for id in ids]
        for unit in (unit for request in gone for unit in request.programs):
            self.alone.pop(unit.key, None)
        self.several.difference_update(ids)
        self.take_out(ids)
        return gone

    def take_out(self, ids: Collection[str]) -> None:
        """Have the groups go on without some requests."""
        self.groups = [part for group in self.groups if (part := _without(group, ids)) is not None]

    def group(self, groups: list[Group], requests: list[EngineRequest], step: Step) -> Group:
        """Those that are at one point as one group."""
        for request in requests:
            if self.alone.get(request.key) is request:  # or it's a chunk, whose owner waits for the next one
                del self.alone[request.key]
        groups = [*groups, Group.of(requests)] if requests else groups
        return in_order(groups[0] if len(groups) == 1 else Group.merged(groups), step)

    def still_running(self, units: Iterable[Unit]) -> list[Unit]:
        """Without the programs that ended because another one of their request did."""
        found = {id(unit): unit.remaining() for unit in units}
        self.groups = [group for group in self.groups if found.get(id(group), group) is group]
        return [part for part in found.values() if part is not None]

    def close_ended(self) -> None:
        """The step is over."""
        if self.ended:
            self.groups = [part for group in self.groups if (part := group.remaining()) is not None]
            self.ended.clear()

    def settle(self) -> None:
        for group in self.groups:
            group.settle()

    def leftovers(self) -> list[str]:
        members = [member for group in self.groups for member in group.members]
        found = [f"request {r.id} is in a group and unknown" for r in members if r.id not in self.requests]
        found += [f"a site of a group of {group.size}" for group in self.groups if group.place is not None]
        found += [f"programs of request {id}, which ended" for id in self.several.difference(self.requests)]
        found += [f"{len(self.ended)} requests that ended in a step that is over"] if self.ended else []
        found += [f"request {key[0]} runs alone and is unknown" for key in self.alone if key[0] not in self.requests]
        units = [unit for request in self.requests.values() for unit in request.programs]
        found += [f"a working copy of {u.place.name} of request {u.id}" for u in units if u.place is not None]
        return found


def in_order(group: Group, step: Step) -> Group:
    """Its members in the order of the step's batch."""
    order = np.argsort(group.locate(step), kind="stable")
    return group if bool((order[1:] > order[:-1]).all()) else group.select(order.tolist())


def _without(group: Group, gone: Collection[str]) -> Group | None:
    keep = [i for i, member in enumerate(group.members) if member.id not in gone]
    if len(keep) == group.size:
        return group
    return group.select(keep) if keep else None
