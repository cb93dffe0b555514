"""The Triton kernels in Triton's interpreter, which is chosen when Triton is imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
def test_every_twin_gives_what_the_reference_gives() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "tests/kernels/interpreted_twins.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
