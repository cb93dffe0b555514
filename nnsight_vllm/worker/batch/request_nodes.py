"""Runs the nodes of a request that runs by itself; one method a node kind.

What a method raises is the request's failure, which the executor records.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nnsight_vllm.graph.nodes import Arg, Call, Const, Export, Import, Log, Op, Read, Ref, Save, Write
from nnsight_vllm.graph.ops import RANDOM, is_inplace
from nnsight_vllm.plan.edits import ADDS
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.places import RequestPlace
from nnsight_vllm.worker.batch.requests import EngineRequest
from nnsight_vllm.worker.ops.containers import check_container, printed
from nnsight_vllm.worker.ops.guard import Guard
from nnsight_vllm.worker.ops.operations import FACTORIES, OPERATIONS, evaluate
from nnsight_vllm.worker.results.exports import Exports
from nnsight_vllm.worker.results.outbox import frozen_copy

_FILLS = {"py.append", "py.extend", "py.insert", "py.update", "py.list", "py.dict", "py.tuple"}


class ModuleCalls(Protocol):
    """Applies a module of the model to values, ad hoc."""

    def call(self, module_path: str, args: list[Any]) -> Tensor: ...


def node_methods(nodes: Any) -> dict[type, Callable[..., Any]]:
    """Who runs which kind of node, by their names: `read` a `Read`; the same for a request and for a group."""
    kinds = (Read, Write, Op, Const, Call, Save, Log, Export, Import)
    return {kind: getattr(nodes, {"import": "import_"}.get(name := kind.__name__.lower(), name)) for kind in kinds}


class RequestNodes:
    """`exports`: what requests hand to each other. `methods`: by node kind."""

    def __init__(self, calls: ModuleCalls, device: torch.device, exports: Exports, limits: Limits) -> None:
        self.calls = calls
        self.device = device
        self.limits = limits
        self.guard = Guard(limits)
        self._exports = exports
        self.methods: Mapping[type, Callable[[EngineRequest, Any], Any]] = node_methods(self)

    def read(self, request: EngineRequest, node: Read) -> Tensor:
        return request.place_at(node.site).work

    def write(self, request: EngineRequest, node: Write) -> None:
        request.place_at(node.site).assign(evaluate(node.value, request.env))

    def const(self, request: EngineRequest, node: Const) -> Tensor:
        tensor: Tensor = request.env[int(node.digest)]
        return tensor.clone() if node.id in request.program.copied else tensor

    def call(self, request: EngineRequest, node: Call) -> Tensor:
        return self.calls.call(node.module, [evaluate(arg, request.env) for arg in node.args])

    def save(self, request: EngineRequest, node: Save) -> None:
        if isinstance(node.value, Ref) and node.value.id in request.program.streams:
            request.outbox.start(node.name)
        else:
            request.outbox.save(node.name, evaluate(node.value, request.env))

    def log(self, request: EngineRequest, node: Log) -> None:
        request.outbox.log(" ".join(printed(evaluate(arg, request.env)) for arg in node.args))

    def export(self, request: EngineRequest, node: Export) -> None:
        self.keep(request, node, evaluate(node.value, request.env))

    def import_(self, request: EngineRequest, node: Import) -> Any:
        value = self.draw(request, node)
        return frozen_copy(value) if node.id in request.program.copied else value

    def keep(self, request: EngineRequest, node: Export, value: Any) -> None:
        """Keep a request's value for others of its bundle."""
        self._exports.make(request.links, request.parameters[int(node.key)], value)

    def draw(self, request: EngineRequest, node: Import) -> Any:
        """Another request's value. It is everybody's."""
        key = request.parameters[int(node.key)]
        value = self._exports.draw(request.links, key)
        request.drawn.add(key)
        return value

    def op(self, request: EngineRequest, node: Op) -> Any:
        args = [evaluate(arg, request.env) for arg in node.args]
        kwargs = {key: evaluate(value, request.env) for key, value in node.kwargs.items()}
        return self.perform(request, node, args, kwargs)

    def perform(self, request: EngineRequest, node: Op, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """One operation on values that are there."""
        stream = _stream(request, node)
        if stream is not None:
            request.outbox.append(stream, args[1])
            return None
        is_filling = _fills_container(node.name, args)
        if is_filling:
            check_container([args[1:] if args and isinstance(args[0], list | dict) else args, *kwargs.values()])
        if request.place is not None and is_filling:
            args = [_settled_arg(arg, value, request.place) for arg, value in zip(node.args, args, strict=True)]
            kwargs = {key: _settled_arg(node.kwargs[key], value, request.place) for key, value in kwargs.items()}
        if node.writes is not None:
            return self._write_in_place(request.place_at(node.writes), node.name, args, kwargs, request)
        targets = _changed(node.name, args, kwargs)
        if request.place is not None and any(isinstance(t, Tensor) and request.place.aliases(t) for t in targets):
            # The recorder couldn't tell that this is a view of the site where the program stands.
            return self._write_in_place(request.place, node.name, args, kwargs, request)
        result = self._apply(request, node.name, args, kwargs)
        for target in targets:
            request.outbox.changed(target)
        return result

    def _write_in_place(
        self, place: RequestPlace, name: str, args: list[Any], kwargs: dict[str, Any], request: EngineRequest
    ) -> Any:
        place.refuse_floats(args[2:] if name == "py.setitem" else args[1:])
        if name in ADDS and len(args) == 2 and not kwargs and place.add(args[0], args[1], ADDS[name]):
            return args[0]
        return place.change(lambda: self._apply(request, name, args, kwargs))

    def _apply(self, request: EngineRequest, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in FACTORIES and self.device.type != "cpu":
            kwargs.setdefault("device", self.device)
        self.guard.allow(name, args, kwargs)
        if name not in RANDOM:
            return OPERATIONS[name](*args, **kwargs)
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(request.draw_seed())
            return OPERATIONS[name](*args, **kwargs)


def _settled_arg(arg: Arg, value: Any, place: RequestPlace) -> Any:
    """A value as a container takes it. A list or dict that exists already keeps its identity."""
    if isinstance(arg, Ref) and isinstance(value, list | dict):
        return value
    return settled(value, place)


def settled(value: Any, place: RequestPlace) -> Any:
    """What aliases the place is copied, inside lists, tuples and dicts too: it's the value of this moment."""
    match value:
        case Tensor():
            return value.clone() if place.aliases(value) else value
        case list():
            return [settled(item, place) for item in value]
        case tuple():
            items = tuple(settled(item, place) for item in value)
            return value if all(map(operator.is_, items, value)) else items
        case dict():
            return {key: settled(item, place) for key, item in value.items()}
        case _:
            return value


def _fills_container(name: str, args: list[Any]) -> bool:
    if name in _FILLS:
        return True
    return name in {"py.setitem", "py.iadd"} and bool(args) and isinstance(args[0], list | dict)


def _changed(name: str, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Values that an operation changed in place."""
    targets = [*args, kwargs.get("input")][:1] if is_inplace(name) else []
    return [*targets, kwargs["out"]] if "out" in kwargs else targets


def _stream(request: EngineRequest, node: Op) -> str | None:
    """The name under which an append goes home at once."""
    target = node.args[0] if node.name == "py.append" else None
    return request.program.streams.get(target.id) if isinstance(target, Ref) else None
