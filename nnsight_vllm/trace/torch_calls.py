"""Calls of torch's functions and of tensors' methods, as operations of the table."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.trace.recording import Recording, RunValue
from nnsight_vllm.trace.source import user_line


class Method:
    """A bound method of a recorded value; calling it records the operation."""

    def __init__(self, value: RunValue, op: str, name: str) -> None:
        self.value, self.op, self.name = value, op, name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        args, kwargs = _without_device(args, kwargs)
        if self.op == "tensor.to" and not args and not any(kwargs.values()):
            return self.value
        return self.value._here.op(self.op, _method(self.name), (self.value, *args), kwargs)


def torch_op(recorder: Recording, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a call of a torch function."""
    name = op_name(func)
    if name is None:
        label = getattr(func, "__name__", repr(func))
        raise RefusedError(f"torch function {label} isn't among the operations of a graph; {user_line()}")
    args, kwargs = _without_device(args, kwargs)
    if name.startswith("tensor.") and "input" in kwargs:  # a method has no such keyword
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"), *args)
    return recorder.op(name, func, tuple(args), dict(kwargs))


def op_name(func: Callable[..., Any]) -> str | None:
    """The table's name of a torch function; None if it isn't in the table."""
    return _names().get(func)


@cache
def _names() -> dict[Any, str]:
    operators = _functions(
        "py", torch.Tensor, "__{}__"
    )  # torch also reaches operators of plain tensors: `tensor + proxy`
    inplace = {one: op for one, op in _functions("tensor", torch).items() if op.endswith("_")}  # `torch.clamp_(x)`
    found = operators | inplace | _functions("tensor", torch.Tensor) | _functions("special", torch.special)
    return found | _functions("linalg", torch.linalg) | _functions("nn", functional) | _functions("torch", torch)


def _functions(head: str, space: object, form: str = "{}") -> dict[Any, str]:
    """The functions of a space of torch that are operations of the table."""
    ops = [op for op in sorted(OPS) if op.startswith(f"{head}.")]
    found = {op: getattr(space, form.format(op.partition(".")[2]), None) for op in ops}
    return {function: op for op, function in found.items() if callable(function)}


def _method(name: str) -> Callable[..., object]:
    def run(tensor: Any, /, *args: Any, **kwargs: Any) -> object:
        return getattr(tensor, name)(*args, **kwargs)

    return run


def _without_device(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments without devices: the engine keeps every value on the model's own."""
    plain = tuple(arg for arg in args if not isinstance(arg, torch.device) and not _is_device_name(arg))
    return plain, {key: value for key, value in kwargs.items() if key not in {"device", "non_blocking", "pin_memory"}}


def _is_device_name(value: object) -> bool:
    return isinstance(value, str) and value.split(":")[0] in {"cpu", "cuda", "meta", "mps"}
