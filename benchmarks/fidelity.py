"""Does an engine with sites, and no graph in it, still generate what vLLM generates?

Every engine is a process of its own: vLLM as it is, then ours with each `sites` setting, all compiled, with the same
32 prompts in one batch, greedily. Writes docs/fidelity.md. The last line, stock vLLM with four at a time, is the
measure: so far vLLM agrees with itself when nothing but the batch changes.

    python benchmarks/fidelity.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "fidelity.md"
STOCK = "stock"
SETTINGS: list[Any] = ["all", "blocks", []]
DTYPES = ["bfloat16", "float32"]
NUM_TOKENS = 64
FEW = 4

PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "The capital of Japan is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "The three primary colors are",
    "def fibonacci(n):\n",
    "Photosynthesis is the process by which",
    "In 1969, the first humans",
    "The quick brown fox",
    "A recipe for pancakes starts with",
    "Dear Sir or Madam,",
    "The theory of relativity says that",
    "My favourite book is",
    "To install the package, run",
    "The largest planet in the solar system is",
    "import torch\n\nclass Model(torch.nn.Module):\n",
    "Shakespeare was born in",
    "The difference between a virus and a bacterium is",
    "SELECT name FROM",
    "If it rains tomorrow, we will",
    "The stock market crashed because",
    "One plus one is two. Two plus two is",
    "The human heart has",
    "Paris is to France as Berlin is to",
    "She opened the door and saw",
    "The mitochondrion is",
    "Breaking news:",
    "How do I learn to play the guitar? First,",
    "A prime number is a number that",
    "The Amazon river flows through",
    "Good morning, everyone. Today we will talk about",
    "The opposite of hot is",
]


@dataclass(frozen=True)
class Answers:
    """What one engine generated: token ids by prompt, and the folder of its compiled code."""

    tokens: list[list[int]]
    cache: str


def answers(checkpoint: str, sites: Any, dtype: str, num_tokens: int, at_once: int = len(PROMPTS)) -> Answers:
    """Start an engine in a new process and let it answer. `sites` is `STOCK` for vLLM as it is."""
    job = {"checkpoint": checkpoint, "sites": sites, "dtype": dtype, "num_tokens": num_tokens, "at_once": at_once}
    command = [sys.executable, __file__, "--engine", json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"the engine {job} failed:\n{run.stderr[-3000:]}")
    return Answers(**json.loads(run.stdout.splitlines()[-1]))


def num_equal(one: Answers, other: Answers) -> int:
    """How many completions agree in every token."""
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))


def agreeing_tokens(one: Answers, other: Answers) -> float:
    """The share of tokens before the first difference."""
    agreeing = total = 0
    for a, b in zip(one.tokens, other.tokens, strict=True):
        total += len(a)
        agreeing += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return agreeing / total


def be_engine(job: dict[str, Any]) -> None:
    """The other process: start, answer, print."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.path.insert(0, str(ROOT))
    from vllm import SamplingParams

    llm = _start(job["checkpoint"], job["sites"], job["dtype"])
    params = SamplingParams(temperature=0.0, max_tokens=job["num_tokens"], ignore_eos=True)
    batches = [PROMPTS[start : start + job["at_once"]] for start in range(0, len(PROMPTS), job["at_once"])]
    outputs = [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    cache = worker.vllm_config.compilation_config.local_cache_dir
    print(json.dumps({"tokens": [list(output.outputs[0].token_ids) for output in outputs], "cache": cache}), flush=True)
    llm.llm_engine.engine_core.shutdown()


def _start(checkpoint: str, sites: Any, dtype: str) -> Any:
    arguments: dict[str, Any] = {"dtype": dtype, "max_model_len": 512, "seed": 0}
    if sites == STOCK:
        from vllm import LLM

        return LLM(checkpoint, **arguments)
    from nnsight_vllm import VLLM

    return VLLM(checkpoint, sites=sites, **arguments).llm


def measure(checkpoint: str, tell: Callable[[str], None]) -> list[tuple[str, str, int, float]]:
    """Rows of the report: dtype, engine, equal completions, share of agreeing tokens."""
    rows = []
    for dtype in DTYPES:
        tell(f"{dtype}: stock vLLM")
        stock = answers(checkpoint, STOCK, dtype, NUM_TOKENS)
        for sites in SETTINGS:
            tell(f"{dtype}: sites={sites!r}")
            ours = answers(checkpoint, sites, dtype, NUM_TOKENS)
            rows.append(
                (dtype, f"ours, `sites={json.dumps(sites)}`", num_equal(ours, stock), agreeing_tokens(ours, stock))
            )
        tell(f"{dtype}: stock vLLM, {FEW} at a time")
        few = answers(checkpoint, STOCK, dtype, NUM_TOKENS, at_once=FEW)
        rows.append((dtype, f"stock vLLM, {FEW} prompts at a time", num_equal(few, stock), agreeing_tokens(few, stock)))
    return rows


def report(rows: list[tuple[str, str, int, float]]) -> str:
    """The page, in Markdown."""
    import torch
    import vllm

    lines = [
        "# Fidelity of the idle engine",
        "",
        "Taps keep the compiler from fusing across them, so an engine with sites rounds differently from stock vLLM even when no",
        "request carries a graph. In float32 the greedy tokens must be the same (a test holds it); in bfloat16 rounding flips",
        "close choices, and from the first one on a completion differs. This page says how often.",
        "",
        f"SmolLM2-135M-Instruct, {len(PROMPTS)} prompts in one batch, {NUM_TOKENS} greedy tokens each, compiled, against stock `vllm.LLM` with the",
        "same arguments in the same environment. The last line of each dtype is stock vLLM against itself with smaller batches.",
        "",
        "| dtype | engine | equal completions | tokens before the first difference |",
        "|---|---|---|---|",
    ]
    for dtype, engine, equal, share in rows:
        lines.append(f"| {dtype} | {engine} | {equal} of {len(PROMPTS)} ({equal / len(PROMPTS):.0%}) | {share:.1%} |")
    lines += [
        "",
        f"Run on a CPU (`{_cpu()}`, {os.cpu_count()} cores; no GPU), vLLM {vllm.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, by `python benchmarks/fidelity.py`, which writes this page.",
        "",
    ]
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from nnsight_vllm import demo_model

    console = Console()
    text = report(measure(demo_model(), console.print))
    REPORT.write_text(text)
    console.print(Markdown(text))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        be_engine(json.loads(sys.argv[2]))
    else:
        main()
