"""Branches, loops and iteration blocks while they are recorded: what rewritten control flow calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nnsight_vllm.errors import OutOfOrderError, RecordError, RefusedError, ScopeError
from nnsight_vllm.graph.nodes import Arg, Block, Cond, Iterations, Loop, Node
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.blocks import frames
from nnsight_vllm.trace.encode import resolve
from nnsight_vllm.trace.places import Places
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recording import Recording
from nnsight_vllm.trace.scope import CondHandle, IterationsHandle, LoopHandle, Scope, ScopeKind
from nnsight_vllm.trace.source import user_frame, user_line


class Flow:
    """The blocks of one recorder."""

    def __init__(self, recorder: Recording, places: Places) -> None:
        self.recorder = recorder
        self.places = places

    # -- cond ------------------------------------------------------------------------------------------------------------

    def begin_cond(self, test: object) -> CondHandle:
        encoded = self.recorder.encode(test)
        here = self.places.here()
        return CondHandle(self.recorder.new_id(), encoded, self.places.cursor.at, here, self._open("then"))

    def begin_else(self, handle: CondHandle) -> None:
        handle.end = self.places.cursor.at
        self.places.go_back(handle.start, handle.here)
        self._close()
        handle.orelse = self._open("else")

    def end_cond(self, handle: CondHandle, pairs: list[tuple[object, object]]) -> list[object]:
        """Close the cond. Each pair becomes one value: its first after the then branch, its second otherwise."""
        if handle.orelse is None:
            self.begin_else(handle)
        assert handle.end is not None
        self._close()
        self.places.join(handle.end, handle.start, handle.here)
        return self.add_results(handle, pairs)

    def add_results(self, handle: CondHandle, pairs: list[tuple[object, object]]) -> list[object]:
        """Give a closed cond more results; its node is (again) the last one."""
        assert handle.orelse is not None
        with self._reopened(handle.then):
            handle.then_yields += [self._then_value(handle, first) for first, _ in pairs]
        with self._reopened(handle.orelse):
            handle.else_yields += [self.recorder.encode(second) for _, second in pairs]
        outs = [self.recorder.new_id() for _ in pairs]
        handle.outs += outs
        self._emit(handle)
        return [self._merged(out, pair) for out, pair in zip(outs, pairs, strict=True)]

    def resume_else(self, handle: CondHandle) -> None:
        """`.else_()`: open the other branch of a cond that is closed already."""
        nodes = self.recorder.scope.nodes
        if handle.orelse is None or not nodes or nodes[-1].id != handle.id:
            raise RefusedError(f".else_() must follow its cond directly; {user_line()}")
        nodes.pop()
        handle.end = self.places.cursor.at
        self.places.go_back(handle.start, handle.here)
        handle.orelse.is_open, self.recorder.scope = True, handle.orelse
        self.recorder.replaced = {out: value for out, value in zip(handle.outs, handle.else_yields, strict=True)}

    def close_else(self, handle: CondHandle) -> None:
        assert handle.end is not None
        self.recorder.replaced = {}
        self._close()
        self.places.join(handle.end, handle.start, handle.here)
        self._emit(handle)

    def _then_value(self, handle: CondHandle, value: object) -> Arg:
        """In the then branch, a result of this same cond is what that branch yields for it."""
        if isinstance(value, Proxy) and value._recorder is self.recorder and value._node in handle.outs:
            return handle.then_yields[handle.outs.index(value._node)]
        return self.recorder.encode(value)

    def _emit(self, handle: CondHandle) -> None:
        assert handle.orelse is not None
        then, orelse = Block(handle.then.nodes, handle.then_yields), Block(handle.orelse.nodes, handle.else_yields)
        nodes = self.recorder.scope.nodes
        if nodes and nodes[-1].id == handle.id:
            nodes.pop()
        self.recorder.add(Cond(handle.id, handle.test, then, orelse, handle.outs))

    # -- loop ------------------------------------------------------------------------------------------------------------

    def logical_not(self, value: object) -> object:
        """`not value` of a recorded value."""
        return self.recorder.op("py.not", _logical_not, (value,), {})

    def begin_loop(self, over: object, inits: list[object]) -> tuple[LoopHandle, object, list[object]]:
        recorder = self.recorder
        over, inits = recorder.localized(over), recorder.localized(inits)
        encoded, first = recorder.encode(over), [recorder.encode(init) for init in inits]
        id, item = recorder.new_id(), recorder.new_id()
        carried = [recorder.new_id() for _ in inits]
        self.places.cursor.enter_loop()
        scope = self._open("loop")
        proxies: list[object] = [
            Proxy(recorder, node, _value_metas(init), scope, self.places.possible_roots(init))
            for node, init in zip(carried, inits, strict=True)
        ]
        handle = LoopHandle(id, encoded, item, carried, first, scope)
        return handle, Proxy(recorder, item, _item_metas(over), scope, self.places.possible_roots(over)), proxies

    def end_loop(self, handle: LoopHandle, values: list[object]) -> list[object]:
        recorder = self.recorder
        yields = [recorder.encode(value) for value in values]
        nodes = self._close()
        self.places.cursor.leave_loop()
        outs = [recorder.new_id() for _ in values]
        body = Block(nodes, yields)
        recorder.add(Loop(handle.id, handle.over, handle.item, body, handle.carried, handle.inits, outs))
        return [
            Proxy(recorder, out, _value_metas(value), recorder.scope) for out, value in zip(outs, values, strict=True)
        ]

    # -- iterations ------------------------------------------------------------------------------------------------------

    def begin_iterations(self, start: int, stop: int | None, step: int, within: str | None) -> Proxy:
        """Open a block that runs at iterations `start, start + step, ...` below `stop`. Returns the number."""
        recorder, line = self.recorder, user_line()
        if self.places.max_tokens is not None and start >= self.places.max_tokens:
            raise RecordError(f"iteration {start} never runs: max_tokens is {self.places.max_tokens}; {line}")
        if recorder.scope.kind != "body":
            raise RefusedError(f"an iteration block can't stand inside another block; {line}")
        id, index = recorder.new_id(), recorder.new_id()
        try:
            self.places.cursor.enter_iterations(id, start, stop, step)
        except OutOfOrderError as error:
            raise OutOfOrderError(f"{error}; {line}") from None
        scope, names = self._open("iterations"), dict(frames.names(user_frame()))
        self.places.block = IterationsHandle(id, index, start, stop, step, within, scope, names)
        self.places.moved()
        recorder.used = set()
        return Proxy(recorder, index, (meta.UNKNOWN,), scope)

    def end_iterations(self) -> None:
        block = self.places.block
        assert block is not None
        self._refuse_rebound(block)
        nodes = self._close()
        self.places.block = None
        self.places.moved()
        self.places.cursor.leave_iterations(block.start, block.stop, block.step)
        self.recorder.add(Iterations(block.id, block.start, block.stop, block.step, block.index, Block(nodes)))

    def abandon_iterations(self) -> None:
        """The block is left by an exception or `break`: nothing of it is kept."""
        block = self.places.block
        if block is not None:
            self.recorder.scope = block.scope.parent or self.recorder.scope
            self.places.block = None
            self.places.cursor.inside = None

    def _refuse_rebound(self, block: IterationsHandle) -> None:
        """A name that carries a value from one iteration to the next would keep its first value: refuse it."""
        for name, now in frames.names(user_frame()).items():
            old = block.names.get(name)
            if type(old) is not Proxy or (old._recorder, old._node) not in self.recorder.used:
                continue
            if type(now) is Proxy and now is not old and now._scope is block.scope:
                raise ScopeError(
                    f"{name!r} is read and bound anew in the iteration block at {block.scope.line}. The block is recorded once, "
                    f"so {name!r} would start from its first value at each iteration: make it a tensor of the run, such as "
                    f"h.new_zeros(()), and change that in place ({name} += ...), or collect values in nv.list()"
                )

    # -- scopes ----------------------------------------------------------------------------------------------------------

    def _open(self, kind: ScopeKind) -> Scope:
        self.recorder.scope = Scope(kind, self.recorder.scope, user_line())
        return self.recorder.scope

    def _close(self) -> list[Node]:
        scope = self.recorder.scope
        assert scope.parent is not None
        scope.is_open = False
        self.recorder.scope = scope.parent
        return scope.nodes

    @contextmanager
    def _reopened(self, scope: Scope) -> Iterator[None]:
        """Inside a closed branch again: constants that its results need belong there."""
        outer, self.recorder.scope, scope.is_open = self.recorder.scope, scope, True
        yield
        self.recorder.scope, scope.is_open = outer, False

    def _merged(self, out: int, pair: tuple[object, object]) -> Proxy:
        first, second = _value_metas(pair[0]), _value_metas(pair[1])
        is_same = len(first) == len(second) and all(_alike(a, b) for a, b in zip(first, second, strict=True))
        metas = first if is_same else (meta.UNKNOWN,)
        proxy = Proxy(self.recorder, out, metas, self.recorder.scope, self.places.possible_roots(pair))
        if all(isinstance(value, Proxy) and value._slot is not None for value in pair):
            proxy._slot = self.recorder.save(proxy)
        return proxy


def can_merge(value: object) -> bool:
    """Whether a name's value can be the result of a branch, or carried by a loop."""
    if isinstance(value, list | tuple):
        return all(can_merge(item) for item in value)
    return isinstance(value, Proxy | torch.Tensor | int | float | bool | str | None)


def _value_metas(value: object) -> tuple[object, ...]:
    """Metas of a value that leaves a block: alike in shape, but a place no longer."""
    if isinstance(value, Proxy):
        return tuple(meta.of_tensor(item) if isinstance(item, torch.Tensor) else item for item in value._metas)
    return (resolve(value, 0),)


def _item_metas(over: object) -> tuple[object, ...]:
    metas = over._metas if isinstance(over, Proxy) else (meta.UNKNOWN,)
    return tuple(
        meta.of_tensor(item[0]) if isinstance(item, torch.Tensor) and item.ndim and item.shape[0] else meta.UNKNOWN
        for item in metas
    )


def _alike(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and first.dtype == second.dtype
    return False


def _logical_not(value: object) -> object:
    return torch.logical_not(value) if isinstance(value, torch.Tensor) else meta.UNKNOWN
