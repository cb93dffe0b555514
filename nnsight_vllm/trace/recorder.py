"""Turns what happens to proxies into the nodes of one request's graph.

One recorder stands behind one invoke. It runs every operation on meta tensors; `places` knows the sites, `flow` the blocks,
`exchange` what other invokes have of it. After the run it holds the saved values, so that every proxy of the invoke finds its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch

from nnsight_vllm.errors import ControlFlowError, RecordError, RefusedError
from nnsight_vllm.graph.nodes import Arg, Block, Call, Graph, Log, Op, Ref, Save, Stop
from nnsight_vllm.graph.ops import OPS, changes_container, is_inplace
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.bundle import Bundle
from nnsight_vllm.trace.encode import Constants, Encoder, resolve
from nnsight_vllm.trace.flow import Flow
from nnsight_vllm.trace.places import Places, refuse_complex
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recording import Recording, RunValue, opened, values_in
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.tree import Tree


def current(what: str) -> Recorder:
    """The recorder of the invoke that is open. Raises if there is none."""
    recorder = opened()
    if recorder is None:
        raise RefusedError(f"{what} is only available inside a trace (or one of its invokes); {user_line()}")
    assert isinstance(recorder, Recorder)
    return recorder


class Recorder(Recording):
    """Records one request's program. `rows` is the number of the prompt's tokens, `max_tokens` the run's length; None: unknown.

    `cached`: names of the sites whose values are collected besides.
    """

    def __init__(
        self,
        tree: Tree,
        constants: Constants,
        rows: int | None,
        max_tokens: int | None,
        bundle: Bundle | None = None,
        num_samples: int = 1,
    ) -> None:
        self.bundle = bundle or Bundle()
        super().__init__(num_samples, self.bundle.goes_on)
        self.tree = tree
        self.exchange = self.bundle.add(self)
        self.cached: set[str] = set()
        self.places = Places(self, tree, rows, max_tokens)
        self.flow = Flow(self, self.places)
        self._encoder = Encoder(self, constants)

    def encode(self, value: object) -> Arg:
        return self._encoder.encode(value)

    def use(self, value: RunValue) -> Arg:
        if value._recorder is not self:
            self.require_open()
            value = self._borrowed(value)
        node = value._visible_node()
        self.used.add((self, node))
        return self.replaced.get(node, Ref(node))

    def localized(self, value: Any) -> Any:
        match value:
            case RunValue() if value._recorder is self:
                return value
            case RunValue():
                return value.value if value._is_done else self._borrowed(value)
            case slice():
                return slice(*map(self.localized, (value.start, value.stop, value.step)))
            case tuple() | list() if any(True for _ in values_in(value)):
                return (tuple if isinstance(value, tuple) else list)(map(self.localized, value))
            case dict():
                return {key: self.localized(item) for key, item in value.items()}
            case _:
                return value

    def op(
        self, name: str, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Proxy:
        if name not in OPS:
            raise RefusedError(f"{name} isn't an operation that a graph can hold; {user_line()}")
        used = list(values_in((args, kwargs)))
        if any(proxy._recorder is not self for proxy in used):
            args, kwargs = self.localized(args), self.localized(kwargs)
            used = list(values_in((args, kwargs)))
        encoded = [self.encode(arg) for arg in args]
        encoded_kwargs = {key: self.encode(value) for key, value in kwargs.items()}
        target = _target(name, function, args, kwargs)
        writes = self.places.written_by(target) if target is not None else None
        if target is not None:
            for arg in args[1:]:
                refuse_complex(resolve(arg, 0), target._metas[0])
        count = max([1, *(len(proxy._metas) for proxy in used)])
        metas = tuple(self._meta(name, function, args, kwargs, i) for i in range(count))
        id = self.new_id()
        if target is not None:
            self.exchange.note_change(id, target, False)
        elif changes_container(name) and args and isinstance(args[0], Proxy):
            self.exchange.note_change(id, args[0], True)
        self.add(Op(id, name, encoded, encoded_kwargs, writes))
        if target is not None and not isinstance(target._metas[0], meta.Unknown):
            return target
        may_view = name in meta.VIEWS and _is_unsure(metas) and not _copies(name, args)
        maybe = self.places.possible_roots(args[:1]) if may_view else frozenset()
        return Proxy(
            self, id, metas, self.scope, maybe
        )  # an unknown target may be a number, which `+=` leaves as it is

    def call(self, module: str, value: object) -> Proxy:
        """Record an ad hoc call of a module."""
        info = self.tree.module(module)
        if info.refuse_call:
            raise RefusedError(f"{module or 'the model'} can't be called: {info.refuse_call}; {user_line()}")
        value = self.localized(value)
        encoded = self.encode(value)
        count = len(value._metas) if isinstance(value, Proxy) else 1
        metas = tuple(
            _call_meta(module, info.call_in, info.call_out, info.call_dtype, resolve(value, i)) for i in range(count)
        )
        id = self.new_id()
        self.add(Call(id, module, [encoded]))
        return Proxy(self, id, metas, self.scope)

    def save(self, value: RunValue) -> str:
        if value._slot == "result":
            return "result"
        if value._recorder is not self:
            return self.bundle.save_late(value)
        used, name = self.use(value), self.new_slot()
        self.add(Save(self.new_id(), name, used))
        return name

    def log(self, args: tuple[object, ...]) -> None:
        """Print the arguments at home, with their values."""
        encoded = [self.encode(arg) for arg in args]
        self.add(Log(self.new_id(), encoded))

    def stop(self) -> None:
        self.add(Stop(self.new_id()))

    def graph(self) -> Graph:
        """What was recorded. Raises what a block that was left early still owes."""
        if self.pending is not None:
            raise self.pending
        if self.scope.kind != "body":
            raise ControlFlowError(f"the {self.scope.kind} block at {self.scope.line} was never closed")
        return Graph(Block(self.exchange.with_late(self.scope.nodes)))

    def _borrowed(self, value: RunValue) -> Proxy:
        self.used.add((value._recorder, value._node))
        return self.bundle.borrow(value, self, self.places)

    def _meta(
        self,
        name: str,
        function: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        variant: int,
    ) -> object:
        plain_args, plain_kwargs = resolve(args, variant), resolve(kwargs, variant)
        assert isinstance(plain_args, tuple) and isinstance(plain_kwargs, dict)
        try:
            return meta.apply(name, function, plain_args, plain_kwargs)
        except meta.MetaError as error:
            cause = error.__cause__
            hint = ""
            if isinstance(cause, IndexError) and "too many indices" in str(cause):
                hint = " (there is no batch dimension here: a site's value is [tokens, hidden])"
            bare = name.partition(".")[2]
            raise RecordError(f"{bare}: {type(cause).__name__}: {cause}{hint}; {user_line()}") from cause


def _target(
    name: str, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> Proxy | None:
    """The proxy whose value an operation changes and gives back. Raises for changes that can't be recorded."""
    if name.startswith("nn.") and _asks_in_place(function, args, kwargs):
        raise RefusedError(
            f"{name} changing its argument (inplace, max_norm) can't be recorded; assign its result; {user_line()}"
        )
    if not is_inplace(name) and kwargs.get("out") is None:
        return None
    target = kwargs["out"] if "out" in kwargs else [*args, kwargs.get("input"), kwargs.get("self")][0]
    if isinstance(target, Proxy):
        return target
    if isinstance(target, torch.Tensor):
        raise RefusedError(
            f"a tensor of yours can't be changed by a value of the run: make it one of the run's, such as "
            f"torch.zeros_like(h) or h.new_zeros(...), or bind the result to a name; {user_line()}"
        )
    raise RefusedError(f"{name} can't change {type(target).__name__}; {user_line()}")


def _asks_in_place(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    names = _parameters(function)
    asked = [name for name in ("inplace", "max_norm") if name in names]
    return any(kwargs.get(name, args[at] if (at := names.index(name)) < len(args) else None) for name in asked)


@cache
def _parameters(function: Callable[..., object]) -> list[str]:
    try:
        return list(signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature has no such parameter
        return []


def _copies(name: str, args: tuple[object, ...]) -> bool:
    """Whether an index is made of tensors with dimensions: torch then gathers, and never gives a view."""
    if name != "py.getitem":
        return False
    return any(isinstance(item, torch.Tensor) and item.ndim > 0 for p in values_in(args[1:]) for item in p._metas)


def _is_unsure(metas: tuple[object, ...]) -> bool:
    return any(isinstance(value, meta.Unknown | tuple | list) for value in metas)


def _call_meta(module: str, size_in: int | None, size_out: int | None, dtype: str, value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return meta.UNKNOWN
    shape = [*value.shape, size_out or 0]
    if size_in is not None:
        if value.ndim == 0 or value.shape[-1] != size_in:
            raise RecordError(f"{module} takes [..., {size_in}], got {list(value.shape)}; {user_line()}")
        shape = [*value.shape[:-1], size_in if size_out is None else size_out]
    own: torch.dtype = getattr(torch, dtype) if dtype else value.dtype
    return torch.empty(shape, dtype=own, device="meta")
