"""Which plugins vLLM would load: naming one of them is naming all that shall be loaded."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

VARIABLE = "VLLM_PLUGINS"


def allow(name: str) -> None:
    """Name a plugin in the environment, and with it those that vLLM loads as it is. Routes only come from named ones."""
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_loaded(), name]))


def _loaded() -> list[str]:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return [name for name in named.split(",") if name]
    return [point.name for point in entry_points() if point.group.startswith("vllm.") and "endpoint" not in point.group]
