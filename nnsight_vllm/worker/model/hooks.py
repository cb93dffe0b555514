"""Install taps as forward hooks, which Dynamo traces into the compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from nnsight_vllm.worker.model import taps


@dataclass(frozen=True)
class Source:
    """Where a hook finds a tensor: an argument, a keyword, the output (whole, or one element), a kept value."""

    kind: Literal["argument", "keyword", "output", "kept"]
    key: int | str | None = None


@dataclass(frozen=True)
class Kept:
    """A tensor that a hook on another module keeps for the tap's."""

    host: str
    source: Source


@dataclass
class Tap:
    """One operator call: before or after `host` runs, what it reads, what it may write.

    `copies`: the tensors written are replaced by copies first. A "kept" source's key is an index into `kept`.
    """

    number: int
    host: str
    read: list[Source]
    write: list[Source]
    before: bool = False
    copies: bool = False
    kept: list[Kept] = field(default_factory=list)


Cell = list[Tensor]
Finder = Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]


def install(model: nn.Module, placed: list[Tap]) -> None:
    """Register the hooks of all taps. Before compilation: hooks that come later aren't seen."""
    for tap in placed:
        host = model.get_submodule(tap.host)
        if tap.before:
            host.register_forward_pre_hook(_before(tap), with_kwargs=True)
            continue
        cells = [_install_keeping(model, kept) for kept in tap.kept]
        host.register_forward_hook(_after(tap, cells), with_kwargs=True)


def _install_keeping(model: nn.Module, kept: Kept) -> Cell:
    cell: Cell = []
    model.get_submodule(kept.host).register_forward_hook(_keep(kept.source, cell), with_kwargs=True)
    return cell


def _before(tap: Tap) -> Callable[..., Any]:
    """Hook on a module's arguments. It hands on copies where others use the same tensors."""
    operator, number, copies = taps.operator(len(tap.read), len(tap.write)), tap.number, tap.copies
    positions = tuple((i, s.key) for i, s in enumerate(tap.write) if isinstance(s.key, int))
    keywords = tuple((i, s.key) for i, s in enumerate(tap.write) if isinstance(s.key, str))
    finders = tuple(_finder(source, []) for source in tap.write)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [find(args, kwargs, None) for find in finders]
        if not copies:
            operator(*values, number)
            return None
        values = [value.clone() for value in values]
        operator(*values, number)
        given = list(args)
        for i, position in positions:
            given[position] = values[i]
        named = dict(kwargs)
        for i, name in keywords:
            named[name] = values[i]
        return tuple(given), named

    return hook


def _after(tap: Tap, cells: list[Cell]) -> Callable[..., None]:
    operator, number = taps.operator(len(tap.read), len(tap.write)), tap.number
    finders = tuple(_finder(source, cells) for source in [*tap.read, *tap.write])

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        operator(*[find(args, kwargs, output) for find in finders], number)

    return hook


def _keep(source: Source, cell: Cell) -> Callable[..., None]:
    """Hand a tensor on to a later hook. Both are traced into one graph, so nothing outlives the forward."""
    find = _finder(source, [])

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cell.append(find(args, kwargs, output))

    return hook


def _finder(source: Source, cells: list[Cell]) -> Finder:
    key: Any = source.key
    if source.kind == "argument":
        return lambda args, kwargs, output: args[key]
    if source.kind == "keyword":
        return lambda args, kwargs, output: kwargs[key]
    if source.kind == "kept":
        cell = cells[key]
        return lambda args, kwargs, output: cell.pop()
    if key is None:
        return lambda args, kwargs, output: output
    return lambda args, kwargs, output: output[key]
