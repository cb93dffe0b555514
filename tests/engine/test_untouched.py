"""An environment with this package in it is the same to whoever doesn't ask for our engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from vllm.plugins import load_endpoint_plugins

ROOT = Path(__file__).resolve().parents[2]

# Runs in a process of its own, with whatever plugins the environment has.
STOCK = """
import json, sys
import nnsight_vllm
assert "vllm" not in sys.modules, "importing the package imported vLLM"
import vllm

llm = vllm.LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**24)
params = vllm.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
(output,) = llm.generate({"prompt_token_ids": [5, 17, 33]}, params, use_tqdm=False)
core = llm.llm_engine.engine_core.engine_core
worker = core.model_executor.driver_worker.worker
model = worker.model_runner.get_model()
hooks = ("_forward_hooks", "_forward_pre_hooks")
print(json.dumps({
    "tokens": len(output.outputs[0].token_ids),
    "classes": [f"{type(part).__module__}.{type(part).__name__}" for part in (worker, core.scheduler, worker.model_runner)],
    "hooked": [name for name, module in model.named_modules() if any(getattr(module, hook) for hook in hooks)],
    "wrapped": [name for owner in (model, worker.model_runner) for name, held in vars(owner).items()
                if getattr(held, "__globals__", {}).get("__name__", "").startswith("nnsight_vllm")],
    "additional_config": worker.vllm_config.additional_config,
    "loaded": sorted(name for name in sys.modules if name.startswith(("nnsight_vllm.", "vllm.nnsight"))),
    "operators": [name for name in sys.modules["torch"]._C._dispatch_get_all_op_names() if "nnsight" in name],
}))
llm.llm_engine.engine_core.shutdown()
"""


@pytest.fixture(scope="module")
def stock(tiny_checkpoint: Callable[[str], str]) -> dict[str, Any]:
    """What a plain `vllm.LLM` in this environment says of itself."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("VLLM_PLUGINS", None)
    command = [sys.executable, "-c", STOCK, tiny_checkpoint("llama")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_a_plain_engine_has_vllms_own_worker_scheduler_and_runner(stock: dict[str, Any]) -> None:
    assert stock["tokens"] == 2
    assert [name.partition(".")[0] for name in stock["classes"]] == ["vllm"] * 3
    assert stock["additional_config"] == {}


def test_a_plain_engine_has_neither_hooks_nor_wrapped_methods_nor_tap_operators(stock: dict[str, Any]) -> None:
    assert (stock["hooked"], stock["wrapped"], stock["operators"]) == ([], [], [])


def test_a_plain_engine_loads_no_module_of_the_package(stock: dict[str, Any]) -> None:
    assert stock["loaded"] == []


def test_vllm_finds_routes_of_ours_alone_and_loads_them_only_where_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(declared["entry-points"]) == ["vllm.endpoint_plugins"]
    assert "entry-points" not in declared["dynamic"]
    groups = [group for group in entry_points().groups if group.startswith("vllm")]
    ours = {(group, point.name) for group in groups for point in entry_points(group=group) if "nnsight" in point.value}
    assert ours == {("vllm.endpoint_plugins", "nnsight_vllm")}
    for named in (None, "", "another"):
        if named is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", named)
        assert load_endpoint_plugins(("generate",)) == []
    monkeypatch.setenv("VLLM_PLUGINS", "nnsight_vllm")
    assert [plugin.name for plugin in load_endpoint_plugins(("generate",))] == ["nnsight_vllm"]
