"""What is known of a value while it is recorded: shapes, dtypes and aliasing, by running each operation on meta tensors.

A meta tensor has a shape and strides but no data, and its views share its storage, so torch itself says whether a
result is a view of a site (a *place*) or a value of its own. A value recorded where the number of rows isn't fixed
(a block over iteration 0 and later ones) has two variants, one for the prompt's rows and one for a single row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from nnsight_vllm.graph.ops import is_inplace, names


class Unknown:
    """A value whose shape depends on data."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN: Final = Unknown()

# Operations that look at data, so meta tensors can't run them.
_IN_BOTH = "nonzero masked_select unique unique_consecutive allclose bincount histc"
DATA_DEPENDENT: Final = (
    names("tensor", _IN_BOTH + " item tolist equal is_nonzero")
    | names("torch", _IN_BOTH + " tensor combinations")
    | names("py", "int float bool str")
)

# Operations whose result may share its first argument's memory, for the cases that meta tensors can't decide.
_VIEWS = """
py.getitem py.attr py.pos tensor.narrow tensor.select tensor.view tensor.view_as tensor.reshape tensor.reshape_as
tensor.T tensor.mT tensor.H tensor.mH tensor.t tensor.transpose tensor.permute tensor.squeeze tensor.unsqueeze
tensor.chunk tensor.split tensor.split_with_sizes tensor.tensor_split tensor.hsplit tensor.vsplit tensor.dsplit
tensor.unbind tensor.expand tensor.expand_as tensor.broadcast_to tensor.flatten tensor.unflatten tensor.ravel
tensor.diagonal tensor.movedim tensor.moveaxis tensor.swapaxes tensor.swapdims tensor.contiguous tensor.to
tensor.type_as tensor.float tensor.half tensor.bfloat16 tensor.double tensor.detach tensor.real tensor.unfold
torch.narrow torch.select torch.reshape torch.t torch.transpose torch.permute torch.squeeze torch.unsqueeze
torch.chunk torch.split torch.tensor_split torch.hsplit torch.vsplit torch.dsplit torch.unbind torch.flatten
torch.unflatten torch.ravel torch.diagonal torch.movedim torch.moveaxis torch.swapaxes torch.swapdims
torch.broadcast_to torch.broadcast_tensors torch.atleast_1d torch.atleast_2d torch.atleast_3d
"""
VIEWS: Final = frozenset(_VIEWS.split())


class MetaError(Exception):
    """The operation fails for shapes or types alone; `__cause__` is torch's own error."""


_WORKED: dict[tuple[object, ...], None] = {}
"""In-place operations that worked, by name and the kinds of their arguments: they give their first argument again."""
_MAX_WORKED = 4096


def apply(name: str, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """The result of one operation on meta values, or `UNKNOWN`. Raises `MetaError` if it can't succeed."""
    if name in DATA_DEPENDENT or _has_unknown(args) or _has_unknown(tuple(kwargs.values())):
        return UNKNOWN
    kinds = (name, *map(_kind, args)) if is_inplace(name) and not kwargs else None
    if kinds is not None and None not in kinds and kinds in _WORKED:
        return args[0]
    try:
        with torch.no_grad():
            result = function(*args, **kwargs)
        if kinds is not None and None not in kinds and result is args[0] and len(_WORKED) < _MAX_WORKED:
            _WORKED[kinds] = None
        return result
    except NotImplementedError:
        return UNKNOWN
    except RuntimeError as error:
        if "meta" in str(error).lower() and "expanded size" not in str(error):
            return UNKNOWN
        raise MetaError from error
    except Exception as error:
        raise MetaError from error


def _kind(value: object) -> object:
    """All of an argument that shapes and types depend on; None where that isn't simple."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return (type(value), value) if isinstance(value, bool | int | float) else None


def of_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor like `tensor`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def fresh(value: object) -> object:
    """A stand-in like this one, with memory of its own."""
    match value:
        case torch.Tensor():
            return of_tensor(value)
        case list():
            return [fresh(item) for item in value]
        case tuple():
            return value if hasattr(value, "_fields") else tuple(fresh(item) for item in value)
        case dict():
            return {key: fresh(item) for key, item in value.items()}
        case _:
            return value


def storage(value: object) -> int | None:
    """An identity that all views of one tensor share; None for anything but a tensor."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _has_unknown(values: object) -> bool:
    if isinstance(values, torch.Tensor):
        return False
    match values:
        case Unknown():
            return True
        case tuple() | list():
            return any(_has_unknown(value) for value in values)
        case dict():
            return any(_has_unknown(value) for value in values.values())
        case slice():
            return _has_unknown((values.start, values.stop, values.step))
        case _:
            return False
