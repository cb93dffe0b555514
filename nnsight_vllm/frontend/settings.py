"""Which engine settings graphs support: everything else is refused before the engine starts, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.wire import refusal

Sites = str | Sequence[str]

_ENV_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_ENV_AHEAD = "VLLM_USE_AOT_COMPILE"


_NAMED_SITES = ("all", "blocks")
_EXPECTED_SITES = "expected 'all', 'blocks' or a list of patterns of module paths, such as ['model.layers.*.mlp']"


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _is_no_ngram(value: object) -> bool:
    """A config of speculative decoding, or a method or model named by itself; the worker sees what vLLM made of it."""
    if isinstance(value, dict):
        value = value.get("method") or value.get("model")
    return bool(value) and value not in ("ngram", "[ngram]")


_REFUSED: dict[str, tuple[Callable[[object], bool], str]] = {
    "tensor_parallel_size": (_above_one, "tensor parallelism isn't supported yet"),
    "pipeline_parallel_size": (_above_one, "pipeline parallelism isn't supported yet"),
    "data_parallel_size": (_above_one, "data parallelism isn't supported yet"),
    "prefill_context_parallel_size": (_above_one, "context parallelism isn't supported yet"),
    "decode_context_parallel_size": (_above_one, "context parallelism isn't supported yet"),
    "speculative_config": (_is_no_ngram, "of the methods of speculative decoding only 'ngram' is supported"),
    "spec_method": (_is_no_ngram, "of the methods of speculative decoding only 'ngram' is supported"),
    "spec_model": (_is_no_ngram, "of the methods of speculative decoding only 'ngram' is supported"),
    "enable_lora": (bool, "LoRA isn't supported yet"),
    "enable_dbo": (bool, "running a step as micro-batches isn't supported yet"),
    "kv_sharing_fast_prefill": (bool, "it leaves out rows of the prompt in the later layers"),
    "long_prefill_token_threshold": (bool, "it would cut prompts that a graph needs whole"),
    "skip_tokenizer_init": (bool, "prompts are measured in tokens before they are sent"),
    "worker_cls": (bool, "the package brings its own worker"),
    "scheduler_cls": (bool, "the package brings its own scheduler"),
}


def check_arguments(arguments: dict[str, object]) -> None:
    """Raise `EngineSettingError` naming the first setting that graphs don't support."""
    for name, (is_refused, reason) in _REFUSED.items():
        if is_refused(arguments.get(name)):
            raise EngineSettingError(f"{name}={arguments[name]!r}: {reason}")
    if arguments.get("runner", "auto") not in {"auto", "generate"}:
        raise EngineSettingError(f"runner={arguments['runner']!r}: only generating models take graphs")


def check_sites(sites: object) -> None:
    """Raise `EngineSettingError` for what no model could have; whether a pattern matches is known to the worker."""
    if isinstance(sites, str) and sites in _NAMED_SITES:
        return
    if not isinstance(sites, list | tuple | set | frozenset):
        raise EngineSettingError(f"sites={sites!r}: {_EXPECTED_SITES}")
    for pattern in sites:
        if not isinstance(pattern, str) or not pattern:
            raise EngineSettingError(f"sites={sites!r}: {pattern!r} is no pattern; {_EXPECTED_SITES}")


def check_checkpoint(model: str) -> None:
    """Raise `EngineSettingError` for a path that isn't there. A name that may be a model hub's is for vLLM to look up."""
    if model.startswith(("/", "./", "../", "~", ".\\")) and not Path(model).exists():
        raise EngineSettingError(f"there is no checkpoint at {model!r}")


def engine_arguments(
    arguments: dict[str, object], sites: Sites, refusal_file: str | None = None, ours: dict[str, object] | None = None
) -> dict[str, object]:
    """vLLM's arguments with our worker and scheduler in place. `refusal_file`: where the worker says why it won't start.

    `ours`: more for the worker, `batching` and `limits`.
    """
    check_arguments(arguments)
    check_sites(sites)
    if _is_on_cpu():
        os.environ.setdefault(_ENV_RUNNER, "0")  # V2's kernels need Triton, whose CPU builds are rare
        # vLLM stores code compiled ahead of time that its CPU build can't load; torch's own cache works there.
        os.environ.setdefault(_ENV_AHEAD, "0")
    extra = arguments.get("additional_config") or {}
    if not isinstance(extra, dict):
        raise EngineSettingError(f"additional_config must be a dict, got {type(extra).__name__}")
    settings: dict[str, object] = {"sites": sites if isinstance(sites, str) else sorted(sites)}
    if refusal_file is not None:
        settings[refusal.KEY] = refusal_file
    settings.update(ours or {})
    return {
        **arguments,
        "worker_cls": "nnsight_vllm.worker.worker.Worker",
        "scheduler_cls": "nnsight_vllm.scheduler.scheduler.Scheduler",
        "additional_config": {**extra, "nnsight_vllm": settings},
    }


def _is_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
