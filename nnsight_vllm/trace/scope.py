"""Blocks of nodes while they are recorded, and sites as they are known in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.graph.nodes import Arg, Node
from nnsight_vllm.graph.order import ProgramPoint
from nnsight_vllm.trace.source import SourceLine

if TYPE_CHECKING:
    import torch

ScopeKind = Literal["body", "then", "else", "loop", "iterations"]


@dataclass(eq=False)
class Scope:
    """An open or closed block. Values of a closed `iterations` block stay visible (its last trip's), others don't."""

    kind: ScopeKind
    parent: Scope | None
    line: SourceLine
    nodes: list[Node] = field(default_factory=list)
    is_open: bool = True

    def is_visible(self) -> bool:
        return self.is_open or (self.kind == "iterations" and (self.parent is None or self.parent.is_visible()))


@dataclass(eq=False)
class Root:
    """A site's value at one iteration. `node` is its `read`, in `scope`; stale once it was assigned anew."""

    values: tuple[torch.Tensor, ...]
    site: SiteInfo
    node: int | None = None
    scope: Scope | None = None
    is_stale: bool = False


@dataclass(eq=False)
class CondHandle:
    """A `cond` that is being recorded."""

    id: int
    test: Arg
    start: ProgramPoint
    here: dict[str, Root]
    then: Scope
    orelse: Scope | None = None
    end: ProgramPoint | None = None
    then_yields: list[Arg] = field(default_factory=list)
    else_yields: list[Arg] = field(default_factory=list)
    outs: list[int] = field(default_factory=list)


@dataclass(eq=False)
class LoopHandle:
    """A `loop` that is being recorded."""

    id: int
    over: Arg
    item: int
    carried: list[int]
    inits: list[Arg]
    body: Scope


@dataclass(eq=False)
class IterationsHandle:
    """An `iterations` block that is being recorded. `names` are the user's names when it was opened."""

    id: int
    index: int
    start: int
    stop: int | None
    step: int
    within: str | None
    scope: Scope
    names: dict[str, object]
