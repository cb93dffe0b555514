"""Every kernel compiles for GPUs that aren't here, as `docs/kernels.md` says. Nothing is run on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nnsight_vllm.kernels.columns import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import dataclasses, json, torch
from nnsight_vllm.kernels import ahead

def compile_odd(operation, size):
    return ahead.compile_one(operation, torch.bfloat16, 90, width=size, rank=min(size, 3))

compiled = list(ahead.compile_all())
page = open("docs/kernels.md").read()
print(json.dumps({
    "kernels": [dataclasses.asdict(c) for c in compiled],
    "odd": [c.cubin_bytes for o in ahead.COLUMNS for size in (1, 577) for c in [compile_odd(o, size)]],
    "renewed": ahead.renew(page, ahead.table(compiled)),
}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_operation_compiles_for_every_architecture_and_dtype(compiled: Any) -> None:
    found = {(c["operation"], c["dtype"], c["architecture"]) for c in compiled["kernels"]}
    assert found == {(o, d, a) for o in COLUMNS for d in ("bf16", "fp16", "fp32") for a in (80, 90)}
    assert all(c["cubin_bytes"] > 0 and f".target sm_{c['architecture']}" in c["ptx"] for c in compiled["kernels"])


def test_every_operation_compiles_for_odd_widths_and_for_one(compiled: Any) -> None:
    assert len(compiled["odd"]) == 2 * len(COLUMNS)
    assert all(compiled["odd"])


def test_no_kernel_spills_registers(compiled: Any) -> None:
    assert [(c["operation"], c["dtype"]) for c in compiled["kernels"] if c["spilled"]] == []


def test_no_product_and_sum_are_fused(compiled: Any) -> None:
    """Where there is no addition of 16-bit numbers, sm_80 has h + x as x * 1 + h: one rounding, as it should be."""
    for kernel in compiled["kernels"]:
        fused = re.findall(r"fma\.rn\.(?:ftz\.)?(\w+)\s+(.*);", kernel["ptx"])
        assert "f32" not in [kind for kind, _ in fused], kernel["operation"]
        ones = set(re.findall(r"mov\.b(?:16|32)\s+(%\w+), (?:0x3F80|16256|0x3F803F80|1065369472);", kernel["ptx"]))
        assert all(ones & set(re.findall(r"%\w+", operands)) for _, operands in fused), (kernel["operation"], fused)


def test_the_page_has_the_numbers_of_this_triton(compiled: Any) -> None:
    assert compiled["renewed"] == (ROOT / "docs" / "kernels.md").read_text(), (
        "python -m nnsight_vllm.kernels.ahead docs/kernels.md"
    )
