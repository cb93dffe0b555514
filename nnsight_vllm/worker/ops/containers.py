"""Bounds on lists, tuples and dicts, and on text of them.

A list may hold another one twice, and that one a third one twice: what is small in memory takes forever to walk. So before
an operation walks a container, it is walked here, up to a bound.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

MAX_NESTING = 32
MAX_ITEMS = 1 << 18
MAX_LENGTH = 1 << 20  # of text that a graph puts together
MAX_TENSORS = 1 << 14
MAX_PRINTED = 1000
MAX_TEXT = 1 << 16


def check_container(value: Any) -> int:
    """Raise where containers are nested too deeply, or too large with everything that is in them. Returns how many items there are."""
    num_items = num_tensors = 0
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        num_tensors += isinstance(item, Tensor)
        if not isinstance(item, list | tuple | dict):
            continue
        if depth >= MAX_NESTING:
            raise OverflowError(f"containers nested more than {MAX_NESTING} deep")
        inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        num_items += len(inside)
        check_length(num_items)
        stack += [(one, depth + 1) for one in inside]
    if num_tensors > MAX_TENSORS:
        raise OverflowError(f"a container with {num_tensors} tensors; the limit is {MAX_TENSORS}")
    return num_items


def check_length(length: int, is_text: bool = False) -> None:
    most = MAX_LENGTH if is_text else MAX_ITEMS
    if length > most:
        raise OverflowError(f"a container or text of length {length}; the limit is {most}")


def printed(value: Any) -> str:
    """A value as `print` shows it. Of a container with very many items only how many, of long text the beginning."""
    if isinstance(value, list | tuple | dict):
        num_items = check_container(value)
        if num_items > MAX_PRINTED:
            return f"<{type(value).__name__} with {num_items} items>"
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"
