"""Sites, as a running program sees one: a *place*.

Arriving at a site makes a working copy of the request's rows; the program's views alias it as torch views do, and
what the program changes is written back to the engine's rows at once. Where the engine keeps an addend (a residual
stream's newest part), an in-place add goes there and nothing else is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.engine.sites import Site
from nnsight_vllm.engine.taps import Tensors
from nnsight_vllm.errors import InterventionError


class Place:
    """One request at one site in one iteration. `work`: the working copy, [rows, ...], contiguous."""

    def __init__(self, name: str, site: Site, tensors: Tensors, rows: slice) -> None:
        self.name = name
        self.work = site.read(tensors, rows)
        self._site = site
        self._tensors = tensors
        self._rows = rows

    def aliases(self, tensor: Tensor) -> bool:
        """Whether the tensor shares the working copy's memory."""
        return tensor.untyped_storage().data_ptr() == self.work.untyped_storage().data_ptr() and tensor.numel() > 0

    def assign(self, value: Any) -> None:
        """The whole site by value; broadcast and cast. What was read before keeps the old value."""
        old, new = self.work, self._fit(value)
        self.work = torch.empty_like(old).copy_(new)
        self._site.write(self._tensors, self._rows, old, self.work)

    def change(self, operation: Callable[[], Any]) -> Any:
        """Run an operation that changes the working copy in place, and write the change back."""
        old = self.work.clone()
        result = operation()
        self._site.write(self._tensors, self._rows, old, self.work)
        return result

    def add(self, view: Any, value: Any, sign: int) -> bool:
        """`view += sign * value` on the engine's own addend. False: there is none, or the view isn't a plain one."""
        target = self._addend_of(view)
        if target is None:
            return False
        if sign > 0:
            target.add_(value)
        else:
            target.sub_(value)
        self.work.copy_(self._site.read(self._tensors, self._rows))
        return True

    def refuse_floats(self, args: list[Any]) -> None:
        """A site of integers takes none but integers: torch would cut them off silently."""
        if self.work.is_floating_point():
            return
        for arg in args:
            if isinstance(arg, float | bool) or (isinstance(arg, Tensor) and not _is_integer(arg)):
                raise InterventionError(f"{self.name} holds integers; got {_describe(arg)}")

    def _addend_of(self, view: Any) -> Tensor | None:
        addend = self._site.addend(self._tensors, self._rows)
        if addend is None or not isinstance(view, Tensor) or not self.aliases(view):
            return None
        if view.dtype != self.work.dtype or addend.shape != self.work.shape or not addend.is_contiguous():
            return None
        offset = addend.storage_offset() + view.storage_offset() - self.work.storage_offset()
        return torch.as_strided(addend, view.size(), view.stride(), offset)

    def _fit(self, value: Any) -> Tensor:
        self.refuse_floats([value])
        if not isinstance(value, Tensor | int | float):
            raise InterventionError(f"{self.name} takes a tensor or a number; got {_describe(value)}")
        tensor = torch.as_tensor(value, device=self.work.device)
        try:
            fitted = tensor.expand(self.work.shape)
        except RuntimeError:
            raise InterventionError(
                f"a value of shape {list(tensor.shape)} doesn't fit {self.name} of shape {list(self.work.shape)}"
            ) from None
        return fitted.clone() if self.aliases(fitted) else fitted


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{value!r:.80}"
