"""Taps: opaque custom operators inside the compiled model through which graphs touch its tensors.

A tap gets a few tensors that it may only read and a few that it may change in place, and a number. Dynamo traces the
call into the compiled graph without looking inside; at run time the body asks `ACTIVE` whether anybody is there in
this step and returns at once when not (about 1.4 us). Nothing leaves the body as an exception: in a worker that would
end the engine for everybody. Handlers catch per request; what still escapes is kept for `take_failures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Handler = Callable[[Tensors], None]

NAMESPACE = "nnsight_vllm"
MAX_READ = 2
MAX_WRITE = 3

ACTIVE: dict[int, Handler] = {}
"""Tap number -> handler of this step. The runtime fills it before a forward and empties it after."""


@dataclass
class StandIn:
    """Values [rows, ...] that stand for what the engine never stores, where `mask` says so."""

    values: Tensor
    mask: Tensor


SCRATCH: dict[str, StandIn] = {}
"""What lives only while one tap fires, by name."""

_failures: list[Exception] = []
_suspensions = 0


def fire(tap: int, tensors: Tensors) -> None:
    """Run the handler of `tap`, if there is one. Never raises."""
    handler = ACTIVE.get(tap)
    if handler is None or _suspensions:
        return
    SCRATCH.clear()
    try:
        handler(tensors)
    except Exception as error:  # an exception in here would end the engine
        _failures.append(error)


def take_failures() -> list[Exception]:
    """Errors that handlers let escape since the last call: defects of ours, never a single request's."""
    taken = list(_failures)
    _failures.clear()
    return taken


@contextmanager
def suspended() -> Iterator[None]:
    """Ignore taps while modules are called ad hoc."""
    global _suspensions
    _suspensions += 1
    try:
        yield
    finally:
        _suspensions -= 1


def operator(num_read: int, num_write: int) -> Callable[..., None]:
    """The operator `tap_R_W(*read, *write, tap)`: R tensors to read, then W tensors that may change."""
    return _OPERATORS[num_read, num_write]


def _define(num_read: int, num_write: int) -> Callable[..., None]:
    name = f"tap_{num_read}_{num_write}"
    read = [f"Tensor r{i}" for i in range(num_read)]
    write = [f"Tensor(m{i}!) w{i}" for i in range(num_write)]
    _LIBRARY.define(f"{name}({', '.join([*read, *write, 'int tap'])}) -> ()")
    _LIBRARY.impl(name, _body, dispatch_key="CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _nothing, lib=_LIBRARY)
    overload: Callable[..., None] = getattr(torch.ops, NAMESPACE).__getattr__(name).default
    return overload


def _body(*arguments: Tensor | int) -> None:
    tap = arguments[-1]
    if tap in ACTIVE:
        fire(tap, arguments[:-1])  # type: ignore[arg-type]


def _nothing(*arguments: Tensor | int) -> None:
    return None


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPERATORS = {
    (num_read, num_write): _define(num_read, num_write)
    for num_read in range(MAX_READ + 1)
    for num_write in range(1, MAX_WRITE + 1)
}
