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

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Tensors


class RequestPlace:
    """One request at one site in one iteration. `work`: the working copy, [rows, ...], contiguous.

    Within a group it is the request's rows of the group's.
    """

    def __init__(self, name: str, site: Site, tensors: Tensors, rows: slice, work: Tensor | None = None) -> None:
        self.name = name
        self.work = site.read(tensors, rows) if work is None else work
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
        old = self.work.clone() if self._site.compares else self.work
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
        if not self.work.is_floating_point():
            refuse_floats(self.name, args)

    def _addend_of(self, view: Any) -> Tensor | None:
        addend = self._site.addend(self._tensors, self._rows)
        if addend is None or not isinstance(view, Tensor) or not self.aliases(view):
            return None
        if view.dtype != self.work.dtype or addend.shape != self.work.shape or not addend.is_contiguous():
            return None
        offset = addend.storage_offset() + view.storage_offset() - self.work.storage_offset()
        return torch.as_strided(addend, view.size(), view.stride(), offset)

    def _fit(self, value: Any) -> Tensor:
        fitted = fit(self.name, value, self.work)
        return fitted.clone() if self.aliases(fitted) else fitted


def refuse_floats(site: str, args: list[Any]) -> None:
    """A site of integers takes none but integers: torch would cut them off silently."""
    for arg in args:
        if isinstance(arg, float | bool) or (isinstance(arg, Tensor) and not _is_integer(arg)):
            raise InterventionError(f"{site} holds integers; got {describe(arg)}")


def fit(site: str, value: Any, work: Tensor) -> Tensor:
    """A value in the shape of a site's, [rows, ...]. Raises `InterventionError`."""
    if not work.is_floating_point():
        refuse_floats(site, [value])
    if not isinstance(value, Tensor | int | float):
        raise InterventionError(f"{site} takes a tensor or a number; got {describe(value)}")
    tensor = torch.as_tensor(value, device=work.device)
    try:
        return tensor.expand(work.shape)
    except RuntimeError:
        raise InterventionError(
            f"a value of shape {list(tensor.shape)} doesn't fit {site} of shape {list(work.shape)}"
        ) from None


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{value!r:.80}"
