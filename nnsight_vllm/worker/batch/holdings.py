"""What the values of requests take in memory. Constants aren't theirs: the store has those, and bounds them."""

from __future__ import annotations

from collections.abc import Iterable

from nnsight_vllm.worker.batch.group import Group, GroupLoop
from nnsight_vllm.worker.batch.requests import EngineRequest, LoopFrame
from nnsight_vllm.worker.lanes.lanes import Each, Items, Lane, Rows, Several, Shared, View
from nnsight_vllm.worker.ops.usage import Storages


def measure(units: Iterable[EngineRequest | Group]) -> int:
    """Write what each request holds into its `Spent`. Returns the bytes of all."""
    held: dict[int, tuple[EngineRequest, int]] = {}
    for unit in {id(unit): unit for unit in units}.values():
        for request, num_bytes in [_of_request(unit)] if isinstance(unit, EngineRequest) else _of_group(unit):
            known = held.get(id(request.spent), (request, 0))
            held[id(request.spent)] = request, known[1] + num_bytes
    for request, num_bytes in held.values():
        request.spent.held = num_bytes
    return sum(num_bytes for _, num_bytes in held.values())


def _of_request(request: EngineRequest) -> tuple[EngineRequest, int]:
    found = Storages(request.parameters.values())
    for id, value in request.env.items():
        if id >= 0:
            found.add(value)
    for frame in request.frames:
        if isinstance(frame, LoopFrame):
            found.add(frame.items)
    return request, found.num_bytes


def _of_group(group: Group) -> list[tuple[EngineRequest, int]]:
    """What the members have together counts for each in equal parts."""
    members = group.members
    known = [value for member in members for value in member.parameters.values()]
    common, own = Storages(known), [Storages(known) for _ in members]
    lanes = [lane for id, lane in group.env.items() if id >= 0]
    lanes += [lane for frame in group.frames if isinstance(frame, GroupLoop) for lane in frame.items]
    for lane in lanes:
        if isinstance(lane, Items):
            for storages, value in zip(own, lane.values, strict=True):
                storages.add(value)
        else:
            _add_common(common, lane)
    share = common.num_bytes // len(members)
    return [(member, share + storages.num_bytes) for member, storages in zip(members, own, strict=True)]


def _add_common(common: Storages, lane: Lane) -> None:
    match lane:
        case Each() | Rows():
            common.add(lane.tensor)
        case View() if getattr(lane.memory, "is_read", True):
            common.add(lane.memory.tensor)
        case Several():
            for part in lane.lanes:
                common.add(part.tensor)
        case Shared():
            common.add(lane.value)
