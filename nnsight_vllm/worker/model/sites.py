"""Sites: how a value of Hugging Face's model lies in the tensors of one tap, and how to put another in its place.

A site is stateless. `read` gives a fresh contiguous copy of a request's rows; `write` makes the engine hold `new`
where it differs from `old` and leaves every other element, and every other request's rows, bit for bit as they are.
`rows` are the request's rows in the step (for logits taps, its row among the rows that get logits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.taps import Tensors

Apply = Callable[[Tensor], Tensor]
"""A module as a function of its one input, [n, ...] -> [n, ...]; never changes its argument."""


_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Refresh(Protocol):
    """Recompute what the tap's own tensors derive from a changed value; `changed` are row numbers."""

    def __call__(self, tensors: Tensors, rows: slice, changed: Tensor) -> None: ...


class Site(Protocol):
    """One place where a graph can touch the model. `tap` is the tap it lives on.

    Unless it `compares`, a write takes `new` as it is and doesn't look at `old`, and a read gives what was written last.
    """

    info: SiteInfo
    tap: int

    @property
    def compares(self) -> bool: ...

    def read(self, tensors: Tensors, rows: slice) -> Tensor: ...

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None: ...

    def addend(self, tensors: Tensors, rows: slice) -> Tensor | None: ...


@dataclass(frozen=True)
class TensorSlice:
    """A request's rows of one tensor of a tap: all columns or some, with or without a leading batch of one.

    `heads` splits the columns into (heads, size of a head).
    """

    index: int
    batched: bool = False
    columns: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None

    def live(self, tensors: Tensors, rows: slice) -> Tensor:
        """The rows themselves, not a copy: [n, ...]."""
        tensor = tensors[self.index]
        part = tensor[0, rows] if self.batched else tensor[rows]
        part = part if self.columns is None else part[..., self.columns[0] : self.columns[1]]
        return part if self.heads is None else part.unflatten(-1, self.heads)

    def part(self, columns: tuple[int, int] | None) -> TensorSlice:
        """The same rows, narrowed to `columns`."""
        return replace(self, columns=columns)

    def shaped(self, heads: tuple[int, int] | None) -> TensorSlice:
        """The same columns, looked at as heads."""
        return replace(self, heads=heads)


@dataclass
class Direct:
    """The value lies in a tensor as it is. `refresh` recomputes what the same tap already derived from it."""

    info: SiteInfo
    tap: int
    slot: TensorSlice
    refresh: Refresh | None = None

    @property
    def compares(self) -> bool:
        return self.refresh is not None

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        return _copy(self.slot.live(tensors, rows))

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        self.slot.live(tensors, rows).copy_(new)  # what didn't change has the bits that were read here
        if self.refresh is not None:
            self.refresh(tensors, rows, _changed_rows(_differs(new, old)))

    def addend(self, tensors: Tensors, rows: slice) -> Tensor | None:
        return None


@dataclass
class Stream:
    """The residual stream where the engine keeps it as two tensors: `hidden + residual`.

    Writing sets the residual to the new value and the hidden part to zero, element by element and only where the
    value changed: the next norm adds the two before it rounds, so even an identity write of all rows would differ.
    """

    info: SiteInfo
    tap: int
    hidden: TensorSlice
    residual: TensorSlice

    @property
    def compares(self) -> bool:
        return True

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        return self.hidden.live(tensors, rows) + self.residual.live(tensors, rows)

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        differs = _differs(new, old)
        residual = self.residual.live(tensors, rows)
        residual.copy_(torch.where(differs, new.to(residual.dtype), residual))
        self.hidden.live(tensors, rows).masked_fill_(differs, 0)

    def addend(self, tensors: Tensors, rows: slice) -> Tensor | None:
        return self.hidden.live(tensors, rows)


@dataclass
class Argument:
    """A module's input, served after the module ran: a write recomputes the module's output from the new input.

    So nothing else that reads the same tensor (a residual, a sibling of a fused linear) sees the change. Only rows
    that changed are recomputed.
    """

    info: SiteInfo
    tap: int
    slot: TensorSlice
    output: TensorSlice
    apply: Apply
    refresh: Refresh | None = None

    @property
    def compares(self) -> bool:
        return True

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        value = _copy(self.slot.live(tensors, rows))
        return value if value.is_floating_point() else value.long()

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        changed = _changed_rows(_differs(new, old))
        if changed.numel() == 0:
            return
        live = self.output.live(tensors, rows)
        live[changed] = self.apply(new[changed]).to(live.dtype)
        if self.refresh is not None:
            self.refresh(tensors, rows, changed)

    def addend(self, tensors: Tensors, rows: slice) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Gate:
    """`product = activation(gate) * up`, which the engine computes in one go without storing the activation."""

    name: str
    gate: TensorSlice
    up: TensorSlice
    product: TensorSlice
    activation: Apply

    def activated(self, tensors: Tensors, rows: slice) -> Tensor:
        """What the activation gave, or what a graph put in its place: [n, intermediate]."""
        value = self.activation(self.gate.live(tensors, rows))
        held = taps.SCRATCH.get(self.name)
        return value if held is None else torch.where(held.mask[rows], held.values[rows], value)

    def hold(self, tensors: Tensors, rows: slice, value: Tensor, differs: Tensor) -> None:
        """Let `value` stand for the activation's output where it `differs`, while this tap fires."""
        held = taps.SCRATCH.get(self.name)
        if held is None:
            everything = self.gate.live(tensors, slice(None))
            mask = torch.zeros(everything.shape, dtype=torch.bool, device=value.device)
            held = taps.SCRATCH[self.name] = taps.HeldTensors(torch.empty_like(mask, dtype=value.dtype), mask)
        held.values[rows] = torch.where(differs, value, held.values[rows])
        held.mask[rows] |= differs

    def refresh(self, tensors: Tensors, rows: slice, changed: Tensor) -> None:
        if changed.numel():
            product = self.activated(tensors, rows) * self.up.live(tensors, rows)
            self.product.live(tensors, rows)[changed] = product[changed]


@dataclass
class Activation:
    """The output of Hugging Face's activation in a gated MLP: `activation(gate)`, without `up`."""

    info: SiteInfo
    tap: int
    gate: Gate

    @property
    def compares(self) -> bool:
        return True

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        return _copy(self.gate.activated(tensors, rows))

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        differs = _differs(new, old)
        self.gate.hold(tensors, rows, new, differs)
        product = self.gate.product.live(tensors, rows)
        up = self.gate.up.live(tensors, rows)
        product.copy_(torch.where(differs, new.to(up.dtype) * up, product))

    def addend(self, tensors: Tensors, rows: slice) -> Tensor | None:
        return None


def _copy(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def _differs(new: Tensor, old: Tensor) -> Tensor:
    """Where the bits differ. By value NaN would differ from itself, and rows of others lie between a group's."""
    kind = _BITS.get(new.dtype)
    return new != old if kind is None or old.dtype != new.dtype else new.view(kind) != old.view(kind)


def _changed_rows(differs: Tensor) -> Tensor:
    return differs.flatten(1).any(1).nonzero().flatten() if differs.ndim > 1 else differs.nonzero().flatten()
