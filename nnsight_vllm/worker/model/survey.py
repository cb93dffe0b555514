"""One small eager forward, watched: which modules fire, in which order, with which tensors, and who else uses them.

What to tap is decided from what the model does, not from its name: whether a block returns the residual stream in two
parts, whether a module's input is also a residual, whether an activation is fused. Every tensor seen is kept alive
until the survey is dropped, so object identity and storage identity hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SHAPE_ONLY = ("empty_like", "new_empty", "new_zeros", "zeros_like", "new_full", "full_like", "ones_like", "new_ones")


@dataclass
class Firing:
    """One call of one module. `start` and `end` count operators and calls of the whole forward."""

    path: str
    start: int
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    end: int = -1
    output: Any = None

    def tensors(self) -> list[tuple[int | str, Tensor]]:
        """Tensor arguments with where they stand: a position or a keyword."""
        positions: list[tuple[int | str, Any]] = list(enumerate(self.arguments))
        return [(where, v) for where, v in [*positions, *self.keywords.items()] if isinstance(v, Tensor)]


@dataclass
class Touch:
    """One operator that read or changed tensors, and the modules it ran in."""

    when: int
    tensors: tuple[Tensor, ...]
    written: frozenset[int]
    inside: tuple[str, ...]


@dataclass
class Survey:
    """Everything one forward over `num_tokens` rows showed."""

    num_tokens: int
    firings: list[Firing] = field(default_factory=list)
    by_storage: dict[int, list[tuple[Touch, int]]] = field(default_factory=dict)
    output: Any = None
    kept: list[Any] = field(default_factory=list)

    def of(self, path: str) -> list[Firing]:
        return [firing for firing in self.firings if firing.path == path]

    def is_untouched(self, tensor: Tensor, since: int, until: int) -> bool:
        """No operator changed the tensor's memory in between."""
        return not any(
            since < touch.when < until and overlaps(tensor, touch.tensors[i])
            for touch, i in self._touches_of(tensor)
            if i in touch.written
        )

    def is_used(self, tensor: Tensor, firing: Firing) -> bool:
        """Whether an operator took the tensor while the module ran."""
        return any(firing.start < touch.when < firing.end for touch, _ in self._touches_of(tensor))

    def is_exclusive(self, tensor: Tensor, since: int, path: str) -> bool:
        """From `since` on only operators inside `path` use the tensor's memory."""
        return not any(
            touch.when > since and path not in touch.inside and overlaps(tensor, touch.tensors[i])
            for touch, i in self._touches_of(tensor)
        )

    def _touches_of(self, tensor: Tensor) -> list[tuple[Touch, int]]:
        """Operators that took a tensor in the same storage, and as which of their tensors."""
        return self.by_storage.get(_storage(tensor), [])


def survey(model: nn.Module, forward: Callable[[], Any], num_tokens: int) -> Survey:
    """Watch one call of `forward`."""
    watched = Survey(num_tokens)
    clock = _Clock()
    with _hooked(model, watched, clock), _Watch(watched, clock), torch.inference_mode():
        watched.output = forward()
    return watched


def is_same(one: Tensor, other: Tensor) -> bool:
    """The same elements of the same memory, whatever shape they are looked at in."""
    same = _storage(one) == _storage(other) and one.storage_offset() == other.storage_offset()
    return same and one.numel() == other.numel() and overlaps(one, other)


def overlaps(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an element of memory in common."""
    if _storage(one) != _storage(other):
        return False
    return bool((_footprint(one) & _footprint(other)).any())


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _footprint(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    mark = torch.zeros(size, dtype=torch.bool)
    mark.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return mark


class _Clock:
    def __init__(self) -> None:
        self.now = 0
        self.inside: list[str] = []

    def tick(self) -> int:
        self.now += 1
        return self.now


class _Watch(TorchDispatchMode):
    def __init__(self, watched: Survey, clock: _Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched, self.clock = watched, clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.watched.kept.append((args, kwargs, result))
        self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        schema = func._schema
        if schema.name.split("::")[1] in _SHAPE_ONLY or _is_view(schema, (args, kwargs), result):
            return
        names = [argument.name for argument in schema.arguments]
        writes = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        given = [(name, t) for name, v in [*zip(names, args, strict=False), *kwargs.items()] for t in _flatten(v)]
        written = frozenset(i for i, (name, _) in enumerate(given) if name in writes)
        touch = Touch(self.clock.tick(), tuple(t for _, t in given), written, tuple(self.clock.inside))
        for i, tensor in enumerate(touch.tensors):
            self.watched.by_storage.setdefault(_storage(tensor), []).append((touch, i))


def _is_view(schema: Any, given: tuple[Any, ...], result: Any) -> bool:
    """Whether the operator only looked at the same memory in another way: a cast may, or may copy."""
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return False
    sources = {_storage(tensor) for tensor in _flatten(given)}
    results = [_storage(tensor) for tensor in _flatten(result)]
    return bool(results) and sources.issuperset(results)


def _flatten(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)
    elif isinstance(value, dict):
        yield from _flatten(list(value.values()))


@contextmanager
def _hooked(model: nn.Module, watched: Survey, clock: _Clock) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        before, after = _hooks(path, watched, clock)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(path: str, watched: Survey, clock: _Clock) -> tuple[Callable[..., None], Callable[..., None]]:
    open_firings: list[Firing] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        firing = Firing(path, clock.tick(), args, dict(kwargs))
        open_firings.append(firing)
        watched.firings.append(firing)
        clock.inside.append(path)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        firing = open_firings.pop()
        firing.end, firing.output = clock.tick(), output
        clock.inside.pop()

    return before, after
