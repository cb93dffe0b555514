"""Arguments of recorded operations: from Python values to data, and to their stand-ins on meta tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import EllipsisType
from typing import cast

import safetensors.torch
import torch

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.graph.nodes import Arg, Dict, Dots, Dtype, List, Slice, Special, Tuple
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.recording import Recording, RunValue
from nnsight_vllm.trace.source import user_line

_INT64 = 2**63
_LARGE = 1 << 20


class Constants:
    """The tensors of one trace, content-addressed: sha256 of safetensors bytes holding one tensor named `tensor`."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self._known: dict[tuple[int, int], tuple[torch.Tensor, str]] = {}
        self._small: dict[int, tuple[torch.Tensor, torch.Tensor, str]] = {}  # by id, with the value it had

    def add(self, tensor: torch.Tensor) -> str:
        """The tensor's digest; its bytes are taken now, so later changes of the tensor don't matter."""
        key = _version(tensor)
        if key is not None and key in self._known:
            return self._known[key][1]
        small = self._small.get(id(tensor))
        if small is not None and _has_bytes_of(tensor, small[1]):
            return small[2]
        try:
            data = safetensors.torch.save({"tensor": tensor.detach().cpu().contiguous()})
        except Exception as error:
            kind = f"{str(tensor.layout).removeprefix('torch.')} {str(tensor.dtype).removeprefix('torch.')} tensor"
            raise RefusedError(f"a {kind} on {tensor.device} can't be a constant: {error}; {user_line()}") from None
        name = digest(data)
        self.data[name] = data
        if key is not None:
            self._known[key] = (tensor, name)
        elif _is_small(tensor):
            self._small[id(tensor)] = (tensor, tensor.detach().clone(), name)
        return name


def _version(tensor: torch.Tensor) -> tuple[int, int] | None:
    """What tells that a large tensor is the same as before, without reading it; None where torch can't tell."""
    if tensor.layout != torch.strided or tensor.is_inference() or tensor.device.type == "meta":
        return None
    is_torchs_own = tensor.untyped_storage().resizable()  # memory shared with numpy changes behind torch's back
    return (id(tensor), tensor._version) if is_torchs_own and tensor.nbytes >= _LARGE else None


def _is_small(tensor: torch.Tensor) -> bool:
    """Whether it's cheaper to compare the tensor with what it was than to hash it again."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.ndim > 0
    return is_plain and tensor.is_contiguous() and 0 < tensor.nbytes < _LARGE


def _has_bytes_of(tensor: torch.Tensor, known: torch.Tensor) -> bool:
    if tensor.dtype != known.dtype or tensor.shape != known.shape or not _is_small(tensor):
        return False
    return torch.equal(tensor.detach().view(torch.uint8), known.view(torch.uint8))


class Encoder:
    """Encodes the arguments of one recorder."""

    def __init__(self, recorder: Recording, constants: Constants) -> None:
        self.recorder = recorder
        self.constants = constants

    def encode(self, value: object) -> Arg:
        """`value` as data. Raises `RefusedError` for what can't travel."""
        if isinstance(value, RunValue):
            is_known = value._recorder is not self.recorder and value._is_done
            return self.encode(value.value) if is_known else self.recorder.use(value)
        if isinstance(value, torch.Tensor):
            return self.recorder.constant(self.constants.add(value))
        known = _BY_TYPE.get(type(value))
        if known is not None:
            return known(self, value)
        for kind, encode in _KINDS:
            if isinstance(value, kind):
                return encode(self, value)
        return self._foreign(value)

    def items(self, values: object) -> list[Arg]:
        return [self.encode(value) for value in cast("list[object]", values)]

    def _foreign(self, value: object) -> Arg:
        if hasattr(value, "__array__") and not callable(value):
            return self.encode(torch.as_tensor(value))
        raise RefusedError(f"a graph can't hold {type(value).__name__} {value!r:.60}; {user_line()}")


def _number(_: Encoder, value: object) -> Arg:
    number = float(cast("float", value))
    return number if math.isfinite(number) else Special(str(number))


def _integer(_: Encoder, value: object) -> Arg:
    number = int(cast("int", value))
    if not -_INT64 <= number < _INT64:
        raise RefusedError(f"the integer {number} doesn't fit 64 bits; {user_line()}")
    return number


def _slice(encoder: Encoder, value: object) -> Arg:
    part = cast("slice[object, object, object]", value)
    if _is_full(part):
        return Slice()
    return Slice(encoder.encode(part.start), encoder.encode(part.stop), encoder.encode(part.step))


def _is_full(part: slice) -> bool:
    return part.start is None and part.stop is None and part.step is None  # `==` would compare what is recorded


def _dict(encoder: Encoder, value: object) -> Arg:
    pairs = cast("dict[object, object]", value).items()
    return Dict([(encoder.encode(key), encoder.encode(item)) for key, item in pairs])


_KINDS: list[tuple[type, Callable[[Encoder, object], Arg]]] = [
    (type(None), lambda _, value: None),
    (bool, lambda _, value: bool(value)),
    (int, _integer),
    (float, _number),
    (str, lambda _, value: str(value)),
    (slice, _slice),
    (EllipsisType, lambda _, value: Dots()),
    (torch.dtype, lambda _, value: Dtype(str(value).removeprefix("torch."))),
    (tuple, lambda encoder, value: Tuple(encoder.items(value))),
    (list, lambda encoder, value: List(encoder.items(value))),
    (dict, _dict),
]
_BY_TYPE = dict(_KINDS)
_PLAIN = frozenset([type(None), bool, int, float, str, EllipsisType, torch.dtype])


def resolve(value: object, variant: int) -> object:
    """The stand-in of an argument for meta tensors: proxies by their variant, tensors by their shapes."""
    if type(value) in _PLAIN or (isinstance(value, slice) and _is_full(value)):
        return value
    match value:
        case RunValue():
            return value._metas[variant if len(value._metas) > 1 else 0]
        case torch.Tensor():
            return meta.of_tensor(value)
        case tuple():
            return tuple(resolve(item, variant) for item in value)
        case list():
            return [resolve(item, variant) for item in value]
        case dict():
            return {key: resolve(item, variant) for key, item in value.items()}
        case slice():
            return slice(*(resolve(part, variant) for part in (value.start, value.stop, value.step)))
        case _:
            return meta.of_tensor(torch.as_tensor(value)) if hasattr(value, "__array__") else value
