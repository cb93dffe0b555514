"""What graphs send home as JSON: tensors by their bytes, in base64 or, above a size, behind a link that is followed once.

tensor   {"dtype": "float32", "shape": [3, 576], "data": "<base64>"} or {"dtype", "shape", "href"}
list, tuple   a JSON list        dict   an object, or {"items": [[key, value], ...]} where keys aren't all text
dtype   {"dtype": "float32"}     a number that JSON hasn't   {"float": "nan" | "inf" | "-inf"}
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch

from nnsight_vllm.frontend.collected import Fresh
from nnsight_vllm.server.full import SaveForm

Keep = Callable[[bytes], str]
"""Keeps safetensors bytes with one tensor named `tensor`; returns the link under which they are fetched."""


@dataclass(frozen=True)
class ResultFormat:
    """How a request's saved values are told: each by its `SaveForm`, a tensor above `inline_bytes` behind a link."""

    saves: Mapping[str, SaveForm]
    inline_bytes: int
    keep: Keep


@dataclass
class ChoiceResults:
    """What one choice's graphs have sent home, until a chunk of the answer, or all of it, takes it.

    `values` are all of them so far, `new` what streams and hasn't been told.
    """

    format: ResultFormat
    values: dict[str, object] = field(default_factory=dict)
    new: dict[str, object] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    is_stopped: bool = False
    is_over: bool = False

    def add(self, fresh: Fresh) -> None:
        for name, value in fresh.values.items():
            into = self.new if self.format.saves[name].stream else self.values
            known = into.get(name)
            if isinstance(value, list) and isinstance(known, list) and name not in fresh.replaced:
                known.extend(value)
            else:
                into[name] = value
        self.logs += fresh.logs

    def take(self) -> dict[str, object] | None:
        """As JSON what wasn't told yet: at the end all the rest. None where there is nothing."""
        values, self.new = self.new, {}
        if self.is_over:
            values, self.values = {**self.values, **values}, {}
        logs, self.logs = self.logs, []
        if not (values or logs or self.is_over):
            return None
        saved = {name: self._json(name, value) for name, value in values.items()}
        return {"saved": saved, "logs": logs, "stopped": self.is_stopped}

    def _json(self, name: str, value: object) -> object:
        return to_json(stacked(value) if self.format.saves[name].over_iterations else value, self.format)


def stacked(value: object) -> object:
    """A list of tensors of one shape and dtype as one tensor; anything else as it is."""
    if not isinstance(value, list) or not value or not all(isinstance(item, torch.Tensor) for item in value):
        return value
    first = value[0]
    is_even = all(item.shape == first.shape and item.dtype == first.dtype for item in value)
    return torch.stack(value) if is_even else value


def to_json(value: object, format: ResultFormat) -> object:
    """A saved value, as the head of this file tells."""
    match value:
        case torch.Tensor():
            return _tensor(value, format)
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case list() | tuple():
            return [to_json(item, format) for item in value]
        case Mapping():
            return _mapping(value, format)
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case _:  # the engine sends nothing else
            raise TypeError(f"a saved value of type {type(value).__name__}")


def _mapping(value: Mapping[Any, object], format: ResultFormat) -> dict[str, object]:
    if all(isinstance(key, str) for key in value):
        return {key: to_json(item, format) for key, item in value.items()}
    return {"items": [[to_json(key, format), to_json(item, format)] for key, item in value.items()]}


def _tensor(tensor: torch.Tensor, format: ResultFormat) -> dict[str, object]:
    head: dict[str, object] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.nbytes > format.inline_bytes:
        return {**head, "href": format.keep(safetensors.torch.save({"tensor": tensor.contiguous()}))}
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {**head, "data": base64.b64encode(data).decode()}
