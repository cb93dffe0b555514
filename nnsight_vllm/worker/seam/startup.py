"""What the worker asks of vLLM when it starts: the version, its worker class, our settings, which model runner it has."""

from __future__ import annotations

from typing import Any

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.wire import refusal
from nnsight_vllm.wire.extras import KEY
from nnsight_vllm.worker.seam.runner_v1 import RunnerV1
from nnsight_vllm.worker.seam.runner_v2 import RunnerV2
from nnsight_vllm.worker.seam.vllm_seam import Seam

SUPPORTED = "0.32."


def require_supported() -> None:
    """Raise `EngineSettingError` on a vLLM that this folder wasn't written for."""
    from vllm import __version__

    if not __version__.startswith(SUPPORTED):
        raise EngineSettingError(f"nnsight_vllm runs on vLLM {SUPPORTED}*; this is {__version__}")


def worker_base() -> type:
    """vLLM's worker class for this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker  # type: ignore[no-any-return]
    from vllm.v1.worker.gpu_worker import Worker

    return Worker  # type: ignore[no-any-return]


def settings_of(vllm_config: Any) -> dict[str, Any]:
    """Our part of vLLM's `additional_config`."""
    settings = (vllm_config.additional_config or {}).get(KEY)
    if not isinstance(settings, dict) or "sites" not in settings:
        raise EngineSettingError(f"additional_config needs {{{KEY!r}: {{'sites': ...}}}}; got {settings!r}")
    return settings


def salt_compile_cache(vllm_config: Any, fingerprint: str) -> None:
    """Keep compiled code apart by instrumentation: vLLM's cache key has `additional_config` but not the hooks.

    The file of the front end is another one in every start, so it mustn't be in the key.
    """
    settings = {**settings_of(vllm_config), "fingerprint": fingerprint}
    settings.pop(refusal.KEY, None)
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settings}


def seam_of(raw: Any, vllm_config: Any) -> Seam:
    """The seam to vLLM's model runner, which is of one of two kinds."""
    return Seam(RunnerV2(raw) if vllm_config.use_v2_model_runner else RunnerV1(raw))
