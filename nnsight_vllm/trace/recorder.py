"""Turns what happens to proxies into the nodes of one request's graph.

One recorder stands behind one invoke. It hands out node ids, knows which block is open, runs every operation on meta
tensors, and remembers the user's line for each node; `places` knows the sites, `flow` the blocks. After the run it
holds the saved values, so that every proxy of the invoke finds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, Literal

import torch

from nnsight_vllm.errors import ControlFlowError, RecordError, RefusedError, ScopeError
from nnsight_vllm.graph.nodes import Arg, Block, Call, Const, Graph, Log, Node, Op, Ref, Save, Stop
from nnsight_vllm.graph.ops import OPS, changes_container, is_inplace
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.active import is_recording
from nnsight_vllm.trace.bundle import Bundle, Exchange
from nnsight_vllm.trace.encode import Constants, Encoder, resolve
from nnsight_vllm.trace.flow import Flow
from nnsight_vllm.trace.places import Places, refuse_complex
from nnsight_vllm.trace.proxy import Proxy, proxies_in
from nnsight_vllm.trace.scope import Scope
from nnsight_vllm.trace.source import Line, user_line
from nnsight_vllm.trace.tree import Tree


class Recorder:
    """Records one request's program. `rows` is the number of the prompt's tokens, `max_tokens` the run's length; None: unknown.

    `cached`: names of the sites whose values are collected besides. `num_samples`: how often the program runs. `number`: its own
    in the bundle of recorders whose values may meet.
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
        self.tree = tree
        self.bundle = bundle or Bundle()
        self.number = self.bundle.add(self)
        self.num_samples = num_samples
        self.exchange = Exchange()
        self.max_tokens = max_tokens
        self.scope = self.body = Scope("body", None, user_line())
        self.lines: dict[int, Line] = {}
        self.values: dict[str, object] = {}
        self.state: Literal["recording", "closed", "done", "failed"] = "recording"
        self.unset = "this value exists when the block is over, and not if it was only scanned"
        self.why_failed = "its trace failed"
        self.pending: RecordError | None = None
        self.used: set[int] = set()
        self.replaced: dict[int, Arg] = {}
        self.cached: set[str] = set()
        self.places = Places(self, rows, max_tokens)
        self.flow = Flow(self)
        self._encoder = Encoder(self, constants)
        self._slots = 0

    # -- nodes -----------------------------------------------------------------------------------------------------------

    def new_id(self) -> int:
        """A fresh id, tied to the user's current line."""
        id = len(self.lines)
        self.lines[id] = user_line()
        return id

    def add(self, node: Node) -> None:
        """Append to the open block. Raises if the invoke is over."""
        self.require_recording()
        self.scope.nodes.append(node)

    def encode(self, value: object) -> Arg:
        """`value` as data. Raises for what can't travel."""
        return self._encoder.encode(value)

    def constant(self, digest: str) -> Ref:
        """A reference to a tensor that travels by its digest."""
        id = self.new_id()
        self.add(Const(id, digest))
        return Ref(id)

    def use(self, proxy: Proxy) -> Arg:
        """A reference to the proxy's value. Raises `ScopeError` if no path leads from it to here."""
        if proxy._recorder is not self:
            self.require_recording()
            proxy = self.bundle.borrow(proxy, self)
        if proxy._scope is None or proxy._node is None:
            raise RefusedError(f"tracer.result is known after the run, it can't be computed with; {user_line()}")
        if not proxy._scope.is_visible():
            where = "branch" if proxy._scope.kind in {"then", "else"} else "loop"
            raise ScopeError(f"this value exists only inside the {where} at {proxy._scope.line}; used at {user_line()}")
        self.used.add(proxy._node)
        return self.replaced.get(proxy._node, Ref(proxy._node))

    def has_used(self, proxy: Proxy) -> bool:
        """Whether the value, or what stands here for it, was used since `used` was emptied."""
        if proxy._recorder is not self and proxy._node is not None:
            proxy = self.exchange.borrowed.get((proxy._recorder.number, proxy._node), proxy)
        return proxy._recorder is self and proxy._node in self.used

    def localized(self, value: Any) -> Any:
        """The argument with what stands here for values of other invokes; those that are known by now are themselves."""
        match value:
            case Proxy() if value._recorder is self:
                return value
            case Proxy():
                return value.value if value._is_done else self.bundle.borrow(value, self)
            case slice():
                return slice(*map(self.localized, (value.start, value.stop, value.step)))
            case tuple() | list() if any(True for _ in proxies_in(value)):
                return (tuple if isinstance(value, tuple) else list)(map(self.localized, value))
            case dict():
                return {key: self.localized(item) for key, item in value.items()}
            case _:
                return value

    def op(
        self, name: str, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Proxy:
        """Record one operation. `function` is its local twin, run on meta tensors for shapes and aliasing."""
        if name not in OPS:
            raise RefusedError(f"{name} isn't an operation that a graph can hold; {user_line()}")
        used = list(proxies_in((args, kwargs)))
        if any(proxy._recorder is not self for proxy in used):
            args, kwargs = self.localized(args), self.localized(kwargs)
            used = list(proxies_in((args, kwargs)))
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

    def save(self, proxy: Proxy) -> str:
        """Send the proxy's value home, as it is here. Returns the name it comes home under."""
        if proxy._slot == "result":
            return "result"
        if proxy._recorder is not self:
            return self.bundle.save_late(proxy)
        value, name = self.use(proxy), self.new_slot()
        self.add(Save(self.new_id(), name, value))
        return name

    def new_slot(self) -> str:
        """A name for something that is saved."""
        self._slots += 1
        return f"s{self._slots - 1}"

    def log(self, args: tuple[object, ...]) -> None:
        """Print the arguments at home, with their values."""
        encoded = [self.encode(arg) for arg in args]
        self.add(Log(self.new_id(), encoded))

    def stop(self) -> None:
        """End the request at this point of the program."""
        self.add(Stop(self.new_id()))

    def graph(self) -> Graph:
        """What was recorded. Raises what a block that was left early still owes."""
        if self.pending is not None:
            raise self.pending
        if self.scope.kind != "body":
            raise ControlFlowError(f"the {self.scope.kind} block at {self.scope.line} was never closed")
        return Graph(Block(self.exchange.with_late(self.scope.nodes)))

    def require_recording(self) -> None:
        goes_on = self.state == "closed" and self.bundle.goes_on and not is_recording()
        if self.state != "recording" and not goes_on:
            raise RefusedError(
                f"this invoke is already recorded; nothing can be added to it, and {self.unset}; {user_line()}"
            )

    @property
    def save_names(self) -> set[str]:
        """The names that saved values come home under."""
        return {f"s{i}" for i in range(self._slots)}

    # -- private ---------------------------------------------------------------------------------------------------------

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
    return any(isinstance(item, torch.Tensor) and item.ndim > 0 for p in proxies_in(args[1:]) for item in p._metas)


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
