"""How does the cost grow with the number of requests, and with the number of different structures among them?

Two questions of one kind. `batch`: 1 to 256 requests that all edit. `structures`: 256 requests that hold 1, 8, 32
or 256 different structures of eight operations each. Ratios are against stock vLLM on the same prompts; 32 and 16 tokens each.

    python benchmarks/growth.py [--case batch] [--rounds 5]
"""

from __future__ import annotations

from dataclasses import replace

from cases import CASES, Case
from harness import Task, measure, sides, trio
from results import Row, arguments, facts, keep, show, tell
from throughput import row_of, task_of, vocab_of

NUM_ROUNDS = 5
MAX_REQUESTS = 256
BATCHES = (1, 8, 32, MAX_REQUESTS)
BATCH_TOKENS = 32
BATCH_CASES = ("add_30",)
STRUCTURES = (1, 8, 32, 256)
STRUCTURE_TOKENS = 16


def tasks(names: list[str], num_rounds: int) -> list[Task]:
    """All sizes of the questions asked."""
    by_name = {case.name: case for case in CASES}
    found = []
    if "batch" in names:
        found += [
            replace(task_of(by_name[name], num_rounds, count, BATCH_TOKENS), name=f"{name}, {count} requests")
            for name in BATCH_CASES
            for count in BATCHES
        ]
    if "structures" in names:
        found += [task_of(_structures(count), num_rounds, MAX_REQUESTS, STRUCTURE_TOKENS) for count in STRUCTURES]
    return found


def main() -> None:
    options = arguments(__doc__, ["batch", "structures"])
    num_rounds = options.rounds or NUM_ROUNDS
    asked = tasks(options.names, num_rounds)
    with sides(trio(options.checkpoint, max_num_seqs=MAX_REQUESTS), tell=tell) as alive:
        run = facts(alive, options.seed)
        measured = measure(alive, asked, vocab_of(options.checkpoint), options.seed, tell, num_warmups=1)
    rows = {task.name: row_of(task, measured[task.name], run) for task in asked}
    show("growth", ["case", "ratio [95 %]", "A/A [95 %]"], [_cells(name, row) for name, row in rows.items()])
    keep(options, "growth", rows, num_rounds)


def _structures(count: int) -> Case:
    name = f"{count} structures, {MAX_REQUESTS} requests"
    return Case(name, name, None, options={"structures": count, "operations": 8}, function="structures")


def _cells(name: str, row: Row) -> list[str]:
    return [name, str(row["ratio"]), str(row["a_a"])]


if __name__ == "__main__":
    main()
