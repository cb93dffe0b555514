"""Sites: how a value of Hugging Face's model lies in the tensors of one tap, and how to put another in its place.

A site is stateless. `read` gives a fresh contiguous copy of a request's rows; `write` makes the engine hold `new`
where it differs from `old` and leaves every other element, and every other request's rows, bit for bit as they are.
`rows` are the request's rows in the step (for logits taps, its row among the rows that get logits).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.worker.layers.functions import Apply, Columns
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.taps import Tensors

_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


Recompute = Callable[[Tensors, slice, Tensor], None]
"""Recompute what a tap's tensors derive from a changed value: for these rows, and of them those numbers that changed."""


@dataclass
class Site(ABC):
    """One place where a graph can touch the model. `tap` is the tap it lives on."""

    info: SiteInfo
    tap: int

    @property
    def compares(self) -> bool:
        """Whether a write looks at `old`. Else it takes `new` as it is, and a read gives what was written last."""
        return True

    @abstractmethod
    def read(self, tensors: Tensors, rows: slice) -> Tensor: ...

    @abstractmethod
    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None: ...

    def addend(self, tensors: Tensors, rows: slice) -> Tensor | None:
        """The rows to which what is added shows in the value, without a write."""
        return None


@dataclass(frozen=True)
class TensorSlice:
    """A request's rows of one tensor of a tap: all columns or some, with or without a leading batch of one.

    `heads` splits the columns into (heads, size of a head).
    """

    index: int
    batched: bool = False
    columns: Columns | None = None
    heads: tuple[int, int] | None = None

    def live(self, tensors: Tensors, rows: slice) -> Tensor:
        """The rows themselves, not a copy: [n, ...]."""
        tensor = tensors[self.index]
        part = tensor[0, rows] if self.batched else tensor[rows]
        part = part if self.columns is None else part[..., self.columns[0] : self.columns[1]]
        return part if self.heads is None else part.unflatten(-1, self.heads)

    def part(self, columns: Columns | None) -> TensorSlice:
        """The same rows, narrowed to `columns`."""
        return replace(self, columns=columns)

    def shaped(self, heads: tuple[int, int] | None) -> TensorSlice:
        """The same columns, looked at as heads."""
        return replace(self, heads=heads)


@dataclass
class Direct(Site):
    """The value lies in a tensor as it is. `recompute`: what the same tap already derived from it."""

    value: TensorSlice
    recompute: Recompute | None = None

    @property
    def compares(self) -> bool:
        return self.recompute is not None

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        return _copy(self.value.live(tensors, rows))

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        self.value.live(tensors, rows).copy_(new)  # what didn't change has the bits that were read here
        if self.recompute is not None:
            self.recompute(tensors, rows, _changed_rows(_differs(new, old)))


@dataclass
class ResidualStream(Site):
    """The residual stream where the engine keeps it as two tensors: `hidden + residual`.

    Writing sets the residual to the new value and the hidden part to zero, element by element and only where the
    value changed: the next norm adds the two before it rounds, so even an identity write of all rows would differ.
    """

    hidden: TensorSlice
    residual: TensorSlice

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
class Argument(Site):
    """A module's input, served after the module ran: a write recomputes the module's output from the new input.

    So nothing else that reads the same tensor (a residual, a sibling of a fused linear) sees the change. Only rows
    that changed are recomputed.
    """

    given: TensorSlice
    output: TensorSlice
    apply: Apply
    recompute: Recompute | None = None

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        value = _copy(self.given.live(tensors, rows))
        return value if value.is_floating_point() else value.long()

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        changed = _changed_rows(_differs(new, old))
        if changed.numel() == 0:
            return
        live = self.output.live(tensors, rows)
        live[changed] = self.apply(new[changed]).to(live.dtype)
        if self.recompute is not None:
            self.recompute(tensors, rows, changed)


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
        known = taps.SCRATCH.get(self.name)
        return value if known is None else torch.where(known.mask[rows], known.values[rows], value)

    def stand_in(self, tensors: Tensors, rows: slice, value: Tensor, differs: Tensor) -> None:
        """Let `value` stand for the activation's output where it `differs`, while this tap fires."""
        known = taps.SCRATCH.get(self.name)
        if known is None:
            everything = self.gate.live(tensors, slice(None))
            mask = torch.zeros(everything.shape, dtype=torch.bool, device=value.device)
            known = taps.SCRATCH[self.name] = taps.StandIn(torch.empty_like(mask, dtype=value.dtype), mask)
        known.values[rows] = torch.where(differs, value, known.values[rows])
        known.mask[rows] |= differs

    def recompute(self, tensors: Tensors, rows: slice, changed: Tensor) -> None:
        if changed.numel():
            product = self.activated(tensors, rows) * self.up.live(tensors, rows)
            self.product.live(tensors, rows)[changed] = product[changed]


@dataclass
class Activation(Site):
    """The output of Hugging Face's activation in a gated MLP: `activation(gate)`, without `up`."""

    gate: Gate

    def read(self, tensors: Tensors, rows: slice) -> Tensor:
        return _copy(self.gate.activated(tensors, rows))

    def write(self, tensors: Tensors, rows: slice, old: Tensor, new: Tensor) -> None:
        differs = _differs(new, old)
        self.gate.stand_in(tensors, rows, new, differs)
        product = self.gate.product.live(tensors, rows)
        up = self.gate.up.live(tensors, rows)
        product.copy_(torch.where(differs, new.to(up.dtype) * up, product))


def _copy(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def _differs(new: Tensor, old: Tensor) -> Tensor:
    """Where the bits differ. By value NaN would differ from itself, and rows of others lie between a group's."""
    kind = _BITS.get(new.dtype)
    return new != old if kind is None or old.dtype != new.dtype else new.view(kind) != old.view(kind)


def _changed_rows(differs: Tensor) -> Tensor:
    return differs.flatten(1).any(1).nonzero().flatten() if differs.ndim > 1 else differs.nonzero().flatten()
