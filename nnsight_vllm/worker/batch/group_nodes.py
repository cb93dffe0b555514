"""Runs a node of a group's program: once for all its requests where the row algebra covers it, else request by request.

Both kinds work on views of the same memory, so they may follow each other in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.nodes import (
    Arg,
    Call,
    Const,
    Dots,
    Export,
    Import,
    List,
    Log,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Tuple,
    Write,
)
from nnsight_vllm.graph.ops import MAY_CHANGE, RANDOM, is_inplace
from nnsight_vllm.plan.edits import ADDS
from nnsight_vllm.plan.rows import Kind, rule_of
from nnsight_vllm.worker.batch.changes import by_kernel, dtype_of, fitted, in_place, spread_value
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.group_members import Members
from nnsight_vllm.worker.batch.places import fit, refuse_floats
from nnsight_vllm.worker.batch.request_nodes import RequestNodes, node_methods
from nnsight_vllm.worker.lanes import algebra, indexing, pointwise
from nnsight_vllm.worker.lanes.alignment import Uncovered
from nnsight_vllm.worker.lanes.lanes import (
    Each,
    Held,
    Items,
    Lane,
    Rows,
    Several,
    Shared,
    View,
    constant_of,
    lane_of,
    resolved,
    stacked,
)
from nnsight_vllm.worker.ops.containers import printed
from nnsight_vllm.worker.ops.operations import FACTORIES
from nnsight_vllm.worker.results.outbox import Outbox, frozen_copy

_FULL = Slice()


@dataclass
class Counts:
    """Operations run in groups, a request a count: at once, and one by one, those by the operation's name too."""

    batched: int = 0
    one_by_one: int = 0
    prevented: Counter[str] = field(default_factory=Counter)


class GroupNodes:
    """`alone` runs what has to be run request by request."""

    def __init__(self, members: Members, alone: RequestNodes) -> None:
        self._members = members
        self._alone = alone
        self.counts = Counts()
        self.methods: dict[type, Callable[[Group, Any], Lane | None]] = node_methods(self)

    def read(self, group: Group, node: Read) -> Lane:
        assert group.place is not None
        return View(group.place.current)

    def const(self, group: Group, node: Const) -> Lane:
        lane = group.parameter(int(node.digest))
        if node.id not in group.program.copied:
            return lane
        return Items([lane.of(i).clone() for i in range(group.size)])

    def write(self, group: Group, node: Write) -> None:
        place = group.place
        assert place is not None
        work = place.current.tensor
        lane = pointwise.numbers_of(resolved(self._members.lane(group, node.value)), work.dtype)
        new = torch.empty_like(work)
        try:
            if place.is_integer() or not isinstance(lane, Rows | Each | Shared):
                raise Uncovered
            new.copy_(fitted(place.name, lane, View(place.current).read(), work))
            self._count(group, "write", True)
        except Exception:
            self._count(group, "write", False)
            new.copy_(work)
            rows = place.ragged.slice_of
            self._members.each(group, lambda i: new[rows(i)].copy_(fit(place.name, lane.of(i), work[rows(i)])))
        place.assign(new)

    def call(self, group: Group, node: Call) -> Lane:
        lanes = [self._members.lane(group, arg) for arg in node.args]
        lane = resolved(lanes[0]) if len(lanes) == 1 else None
        if isinstance(lane, Rows | Each) and lane.tensor.ndim > 1:
            try:
                result = self._alone.calls.call(node.module, [lane.tensor])
                self._count(group, "call", True)
                return Rows(result, lane.ragged) if isinstance(lane, Rows) else Each(result)
            except Exception:  # some request's value: find out whose
                self._count(group, f"call {node.module}", False)
        return Items(
            self._members.each(group, lambda i: self._alone.calls.call(node.module, [lane.of(i) for lane in lanes]))
        )

    def save(self, group: Group, node: Save) -> None:
        if isinstance(node.value, Ref) and node.value.id in group.program.streams:
            for member in group.members:
                member.outbox.start(node.name)
            return
        self._send(group, node.name, self._members.lane(group, node.value), append=False)

    def export(self, group: Group, node: Export) -> None:
        lane = self._members.lane(group, node.value)
        self._members.each(group, lambda i: self._alone.keep(group.members[i], node, lane.of(i)))

    def import_(self, group: Group, node: Import) -> Lane:
        values = self._members.each(group, lambda i: self._alone.draw(group.members[i], node))
        if node.id in group.program.copied:
            return Items([frozen_copy(value) for value in values])
        return constant_of(values)

    def log(self, group: Group, node: Log) -> None:
        lanes = [self._members.lane(group, arg) for arg in node.args]
        self._members.each(
            group, lambda i: group.members[i].outbox.log(" ".join(printed(lane.of(i)) for lane in lanes))
        )

    def _send(self, group: Group, name: str, lane: Lane, append: bool) -> None:
        lane = stacked(lane.values) or lane if isinstance(lane, Items) else lane
        is_one = not group.dead and isinstance(lane, Rows | Each | View | Several | Shared)
        if is_one and group.sheet.take(name, lane, append):
            self._count(group, "save", True)
            if excess := self._alone.limits.excess(0, 0, group.sheet.num_bytes):
                group.fail(InterventionError(excess))
            return
        self._count(group, "save", False)
        group.sheet.spill([member.outbox for member in group.members], name)
        group.sheet.by_request.add(name)
        send = Outbox.append if append else Outbox.save
        self._members.each(group, lambda i: send(group.members[i].outbox, name, lane.of(i)))

    def op(self, group: Group, node: Op) -> Lane:
        if node.name == "py.append":
            target = node.args[0]
            stream = group.program.streams.get(target.id) if isinstance(target, Ref) else None
            if stream is not None:
                self._send(group, stream, self._members.lane(group, node.args[1]), append=True)
                return Shared(None)
        try:
            if node.name in RANDOM or node.name in FACTORIES or node.name in MAY_CHANGE or "out" in node.kwargs:
                raise Uncovered
            result = self._change(group, node) if is_inplace(node.name) else self._compute(group, node)
            self._count(group, node.name, True)
            return result
        except Uncovered:
            self._count(group, node.name, False)
        except Exception as error:  # some request's value: each by itself, and those that fail say so
            self._count(group, f"{node.name}: {type(error).__name__}", False)
        return self._one_by_one(group, node)

    def _compute(self, group: Group, node: Op) -> Lane:
        """A new value, or a part of one."""
        rule = rule_of(node.name)
        if rule.kind is Kind.INDEX:
            return self._index(group, node)
        if node.name == "py.attr":
            return self._attribute(group, node)
        args = [self._members.lane(group, arg) for arg in node.args]
        kwargs = {key: self._members.lane(group, value) for key, value in node.kwargs.items()}
        operation = self._alone.guard.operation("torch.matmul" if rule.kind is Kind.MATMUL else node.name)
        if all(isinstance(lane, Shared) for lane in [*args, *kwargs.values()]):
            if rule.kind is Kind.OPAQUE or group.program.changes_values:
                raise Uncovered
            return Shared(
                operation(*[lane.of(0) for lane in args], **{key: lane.of(0) for key, lane in kwargs.items()})
            )
        if node.name in {"tensor.to", "tensor.contiguous", "tensor.detach"} and group.program.changes_values:
            raise Uncovered  # it may give the value itself
        if rule.kind is Kind.POINTWISE:
            args = _spread_shared(args, group.size)
        return algebra.compute(rule, node.name, operation, args, kwargs)

    def _index(self, group: Group, node: Op) -> Lane:
        target = self._members.lane(group, node.args[0])
        if node.args[1] == _FULL and isinstance(target, View):
            return target
        is_kept = group.program.changes_values
        if isinstance(target, Items) and not is_kept:
            target = resolved(target)
        return indexing.part(target, self._key(group, node.args[1]), is_kept)

    def _attribute(self, group: Group, node: Op) -> Lane:
        target, name = self._members.lane(group, node.args[0]), node.args[1]
        if not isinstance(target, Several):
            raise Uncovered
        names = list(getattr(target.make, "__match_args__", ()))
        if name not in names:
            raise Uncovered
        return target.lanes[names.index(str(name))]

    def _key(self, group: Group, arg: Arg) -> list[Any]:
        elements = arg.items if isinstance(arg, Tuple) else [arg]
        return [self._element(group, element) for element in elements]

    def _element(self, group: Group, arg: Arg) -> Any:
        match arg:
            case None:
                return None
            case Dots():
                return Ellipsis
            case Slice():
                ends = [
                    None if end is None else self._members.lane(group, end) for end in (arg.start, arg.stop, arg.step)
                ]
                return slice(*ends)
            case List():
                raise Uncovered
            case _:
                return self._members.lane(group, arg)

    def _change(self, group: Group, node: Op) -> Lane:
        """In place: on the site where the program stands, or on a value of the group's own."""
        is_item = node.name == "py.setitem"  # its key is looked at by itself
        args = [
            Shared(None) if is_item and i == 1 else self._members.lane(group, arg) for i, arg in enumerate(node.args)
        ]
        target = args[0]
        place = group.place
        is_site = place is not None and isinstance(target, View) and target.memory is place.current
        if node.writes is not None and (not is_site or place is None or place.name != node.writes):
            raise Uncovered
        if is_site:
            assert isinstance(target, View) and place is not None
            return self._change_site(group, node, target, args)
        if isinstance(target, View) and not isinstance(target.memory, Held):
            raise Uncovered
        if not isinstance(target, Rows | Each | View):
            raise Uncovered
        if place is not None and isinstance(target, Rows | Each) and place.aliases(target.tensor):
            raise Uncovered
        self._apply(group, node, target, args)
        storage = target.memory.tensor if isinstance(target, View) else target.tensor
        for member in group.members:
            member.outbox.changed(storage)
        return target

    def _change_site(self, group: Group, node: Op, target: View, args: list[Lane]) -> Lane:
        place = group.place
        assert place is not None
        if place.is_integer():
            given = args[2:] if node.name == "py.setitem" else args[1:]
            if any(isinstance(lane, Items) for lane in given):
                raise Uncovered
            refuse_floats(place.name, [lane.of(0) for lane in given])
        sign = ADDS.get(node.name)
        if sign is not None and len(args) == 2 and not node.kwargs and (part := place.addend()) is not None:
            view = View(Held(part, place.ragged), target.pick, target.columns, target.own)
            operation = torch.Tensor.add_ if sign > 0 else torch.Tensor.sub_
            in_place("tensor.add_" if sign > 0 else "tensor.sub_", operation, view, args[1:], {})
            place.put_addend(part)
        else:
            place.change(partial(self._apply, group, node, target, args))
        return target

    def _apply(self, group: Group, node: Op, target: Lane, args: list[Lane]) -> None:
        if by_kernel(group, node, target):
            return
        kwargs = {key: self._members.lane(group, value) for key, value in node.kwargs.items()}
        if node.name == "py.setitem":
            self._set_part(target, self._key(group, node.args[1]), args[2])
        elif rule_of(node.name).kind is Kind.POINTWISE:
            in_place(node.name, self._alone.guard.operation(node.name), target, args[1:], kwargs)
        else:
            raise Uncovered

    def _set_part(self, target: Lane, key: list[Any], value: Lane) -> None:
        rest = key[1:]
        is_scattered = bool(rest) and indexing.is_full(key[0]) and indexing.has_tensors(rest)
        if is_scattered and isinstance(target, View | Rows):
            view = target if isinstance(target, View) else View(Held(target.tensor, target.ragged))
            if view.pick is not None or view.columns:
                raise Uncovered
            tensor, ragged = view.memory.tensor, view.memory.ragged
            value = pointwise.numbers_of(value, tensor.dtype)
            at = indexing.column_index(rest, ragged)
            shape = tensor[at].shape
            tensor[at] = spread_value(value, ragged, len(shape), tensor.dtype)
            return
        if isinstance(target, View | Rows | Each):
            value = pointwise.numbers_of(value, dtype_of(target))
        part = indexing.part(target, key, True)
        in_place("tensor.copy_", torch.Tensor.copy_, part, [value], {})

    def _one_by_one(self, group: Group, node: Op) -> Lane:
        """Every request by itself, on its own part of the same memory."""
        return lane_of(self._members.each(group, lambda i: self._alone_op(group, node, i)))

    def _alone_op(self, group: Group, node: Op, i: int) -> Any:
        member, began = group.members[i], perf_counter()
        member.place = None if group.place is None else group.place.share(i)
        try:
            args = [self._members.own(group, arg, i) for arg in node.args]
            kwargs = {key: self._members.own(group, value, i) for key, value in node.kwargs.items()}
            result = self._alone.perform(member, node, args, kwargs)
        finally:
            member.place = None
        self._members.charge(group, i, perf_counter() - began)
        return result

    def _count(self, group: Group, name: str, is_batched: bool) -> None:
        if is_batched:
            self.counts.batched += group.size
        else:
            self.counts.one_by_one += group.size
            self.counts.prevented[name] += group.size


def _spread_shared(args: list[Lane], num: int) -> list[Lane]:
    """A tensor that all share beside numbers of each one's own: seen as a tensor each, without a copy."""
    if not any(isinstance(lane, Items) for lane in args) or any(isinstance(lane, Each | Rows | View) for lane in args):
        return args
    return [
        Each(lane.value.expand(num, *lane.value.shape))
        if isinstance(lane, Shared) and isinstance(lane.value, Tensor)
        else lane
        for lane in args
    ]
