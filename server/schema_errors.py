"""Where a body doesn't fit our schema: pydantic's error in words of ours, with the path as its client would write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.names import nearest
from nnsight_vllm.server.schema import OPERATIONS


def refusal_of(error: dict[str, Any], num_more: int = 0) -> Refused:
    """Pydantic's error, for a stranger."""
    param, message = path_of(error["loc"]), str(error["msg"]).removeprefix("Value error, ")
    got, near = error.get("input"), ""
    if error["type"] == "union_tag_invalid":
        param, got = f"{param}.op", got.get("op") if isinstance(got, dict) else got
        message, near = f"expected one of {', '.join(OPERATIONS)}", _near(got, OPERATIONS)
    elif error["type"] == "union_tag_not_found":
        param, message = f"{param}.op", f"expected one of {', '.join(OPERATIONS)}"
    elif error["type"] == "literal_error":
        message = f"expected {error['ctx']['expected']}"
        near = _near(got, str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "))
    elif error["type"] == "extra_forbidden":
        message = "there is no such field"
    elif error["type"] == "missing":
        message = "a field is missing here"
    elif error["type"] == "string_pattern_mismatch":
        message = "expected text without control characters"
    if error["type"] != "missing":
        message += f"; got {_shown(got)}{near}"
    return Refused(message + (f" (and {num_more} more errors)" if num_more else ""), param)


def path_of(loc: tuple[str | int, ...]) -> str:
    """A path as a client would write it, without what pydantic adds for the branches of unions."""
    return "".join(_steps(loc)).lstrip(".")[:200]


def _steps(loc: tuple[str | int, ...]) -> Iterator[str]:
    for i, part in enumerate(loc):
        is_branch = str(part).startswith("(") or (i > 1 and loc[i - 2] == "edits" and isinstance(loc[i - 1], int))
        if isinstance(part, int):
            yield f"[{part}]"
        elif i and loc[i - 1] == "tensors":
            yield f"[{part!r}]"
        elif part not in ("body", "[key]") and not is_branch:
            yield f".{part}"


def _near(got: object, known: Iterable[str]) -> str:
    return nearest(got, known) if isinstance(got, str) else ""


def _shown(value: object) -> str:
    if isinstance(value, list | dict | BaseModel):
        return {list: "a list", dict: "an object"}.get(type(value), "an object")
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
