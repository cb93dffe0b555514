"""Which plugins vLLM would load: naming one of them is naming all that shall be loaded."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from nnsight_vllm.errors import EngineSettingError

VARIABLE = "VLLM_PLUGINS"
ROUTES = "vllm.endpoint_plugins"
KINDS = ("general", "io_processor", "platform", "stat_logger")
GROUPS = [f"vllm.{kind}_plugins" for kind in KINDS]


def allow(name: str) -> None:
    """Name a plugin in the environment, and with it those that vLLM loads as it is. Routes only come from named ones.

    Raises `EngineSettingError` where the installed package has no such plugin: vLLM would serve without it, and say nothing.
    """
    if name not in entry_points(group=ROUTES).names:
        raise EngineSettingError(
            f"the installed nnsight-vllm has no plugin {name!r} for vLLM: install this version of it"
        )
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_loaded(), name]))


def _loaded() -> list[str]:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return [name for name in named.split(",") if name]
    return [name for group in GROUPS for name in entry_points(group=group).names]
