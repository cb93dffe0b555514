"""A line of vLLM's log for each request with interventions: `intervention key=value ...`, with the request's id.

What may be a stranger's text (the id that a client gives, names in a path into a body) is cut, and quoted where it isn't plain.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

from fastapi import Request
from vllm.logger import init_logger

_logger = init_logger(f"vllm.{__name__}")  # vLLM gives handlers to loggers below its own name
_PLAIN = re.compile(r"[\w.:/\[\]-]+", re.ASCII)
MAX_ID = 128
MAX_TEXT = 256


def asked_id(raw_request: Request) -> str:
    """The id that a client gave its request, cut; empty where it gave none."""
    return raw_request.headers.get("x-request-id", "")[:MAX_ID]


def timed(fields: Callable[[], dict[str, object] | None]) -> Callable[[], None]:
    """Starts to measure; what it returns writes the line, with what `fields` says by then, if it says something."""
    began = time.monotonic()

    def tell() -> None:
        if (found := fields()) is not None:
            write({**found, "seconds": round(time.monotonic() - began, 4)})

    return tell


def write(fields: dict[str, object]) -> None:
    """The line now."""
    _logger.info("intervention %s", " ".join(f"{name}={_shown(value)}" for name, value in fields.items()))


def _shown(value: object) -> str:
    text = str(value)[:MAX_TEXT]
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
