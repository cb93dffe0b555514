"""vLLM's V2 model runner on a machine without a GPU: its Triton kernels run in Triton's interpreter.

Slow: a step takes some 100 times as long, so models and runs must be tiny, and `enforce_eager=True`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
IS_CHOSEN = os.environ.get(VARIABLE) == "1"
_FOLDER = Path(__file__).parent / "interpreted"


def install() -> None:
    """In this process and in those that it starts; before anything imports Triton or vLLM."""
    assert "triton" not in sys.modules, "Triton chooses its interpreter when it's imported, and it was already"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_FOLDER), os.environ.get("PYTHONPATH"))))
    runpy.run_path(str(_FOLDER / "sitecustomize.py"))
