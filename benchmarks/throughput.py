"""How fast is a batch whose requests carry graphs, against vLLM alone?

Every case runs on stock vLLM, on our engine, and on a second stock vLLM (A/A: what two equal engines differ by). Required
bars are those of the issue; a bar holds if the median of the paired ratios reaches it.

    python benchmarks/throughput.py [--case add_30] [--rounds 5] [--starts 1]
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import msgspec
from cases import CASES, Case
from harness import NUM_REQUESTS, NUM_TOKENS, Measured, Side, SideError, Task, measure, random_prompts, sides, trio
from messages import Done, Job, Start
from ratios import Ratio, paired
from results import Row, arguments, facts, keep, show, tell

NUM_STARTS = 3
COLUMNS = ["case", "stock tok/s", "ours tok/s", "ratio [95 %]", "spread", "A/A [95 %]", "bar", "", "first run"]


def task_of(case: Case, num_rounds: int | None, num_requests: int = NUM_REQUESTS, num_tokens: int = NUM_TOKENS) -> Task:
    """The case as work for three sides."""
    return Task(
        name=case.name,
        works={"stock": "cases:plain", "ours": case.work, "again": "cases:plain"},
        num_rounds=num_rounds or case.num_rounds,
        num_requests=num_requests,
        num_tokens=num_tokens,
        options=case.options,
        check=checked(case, num_requests, num_tokens),
    )


def row_of(task: Task, measured: Measured, run: Row) -> Row:
    """What is kept of a case."""
    return {
        "num_requests": task.num_requests,
        "num_tokens": task.num_tokens,
        "options": task.options,
        "ratio": paired(measured.seconds("stock"), measured.seconds("ours")),
        "a_a": paired(measured.seconds("stock"), measured.seconds("again")),
        "rounds": measured.rounds,
        "first": measured.first,
        "run": run,
    }


def main() -> None:
    options = arguments(__doc__, [case.name for case in CASES], num_starts=NUM_STARTS)
    chosen = [case for case in CASES if case.name in options.names]
    rows: dict[str, Row] = {}
    for sites, group in groupby(sorted(chosen, key=lambda case: str(case.sites)), key=lambda case: case.sites):
        rows |= _measured(list(group), trio(options.checkpoint, sites), options)
    print_rows(rows)
    keep(options, "throughput", rows, min(len(row["rounds"]) for row in rows.values()))


def vocab_of(checkpoint: str) -> int:
    """The size of a checkpoint's vocabulary."""
    config: dict[str, Any] = json.loads((Path(checkpoint) / "config.json").read_text())
    return int(config["vocab_size"])


def print_rows(rows: dict[str, Row]) -> None:
    """The table on the screen."""
    by_name = {case.name: case for case in CASES}
    show("throughput against stock vLLM", COLUMNS, [_cells(by_name[name], row) for name, row in rows.items()])


def _measured(cases: list[Case], starts: dict[str, Start], options: Namespace) -> dict[str, Row]:
    """All rounds of the cases, shared among several starts of the engines: two equal engines aren't equally fast."""
    vocab, found = vocab_of(options.checkpoint), dict[str, Measured]()
    tasks = [task_of(case, options.rounds) for case in cases]
    for number in range(options.starts):
        with sides(starts, tell=tell) as alive:
            run = facts(alive, options.seed)
            share = [replace(task, num_rounds=-(-task.num_rounds // options.starts)) for task in tasks]
            for name, measured in measure(alive, share, vocab, options.seed + number, tell).items():
                found.setdefault(name, Measured(measured.first)).rounds.extend(measured.rounds)
            if number == 0:
                _require_edits(alive["ours"], cases, vocab)
    return {
        case.name: {"title": case.title, "bar": case.bar, "sites": case.sites, **row_of(task, found[case.name], run)}
        for case, task in zip(cases, tasks, strict=True)
    }


def _cells(case: Case, row: Row) -> list[str]:
    ratio: Ratio = row["ratio"]
    count = row["num_requests"] * row["num_tokens"]
    speed = {side: count / median([entry[side] for entry in row["rounds"]]) for side in ("stock", "ours")}
    return [
        case.name,
        f"{speed['stock']:.0f}",
        f"{speed['ours']:.0f}",
        str(ratio),
        f"{ratio.smallest:.3f}–{ratio.largest:.3f}",
        str(row["a_a"]),
        "" if case.bar is None else f"{case.bar:.2f}",
        "" if case.bar is None else ("holds" if ratio.median >= case.bar else "missed"),
        f"{row['first']['ours']:.2f} s",
    ]


def checked(case: Case, num_requests: int, num_tokens: int) -> Callable[[dict[str, Done]], None]:
    """A run that didn't do its work must not count as a fast one."""

    def check(done: dict[str, Done]) -> None:
        for side, run in done.items():
            if [len(tokens) for tokens in run.tokens] != [num_tokens] * num_requests:
                raise SideError(f"{case.name}: {side} generated {[len(tokens) for tokens in run.tokens]} tokens")
        missing = num_requests * case.is_saving - done["ours"].num_complete
        if missing:
            raise SideError(f"{case.name}: {missing} of {num_requests} requests don't have all their values")

    return check


def _require_edits(ours: Side, cases: list[Case], vocab: int) -> None:
    """Raise if a case that edits generates what our idle engine generates."""
    job = Job("cases:idle", random_prompts(Random(0), vocab, NUM_REQUESTS), NUM_TOKENS // 4, 0)
    idle = ours.run(job).tokens
    for case in cases:
        same = ours.run(msgspec.structs.replace(job, work=case.work, options=case.options)).tokens == idle
        if case.is_editing and same:
            raise SideError(f"{case.name}: the edits changed nothing")


if __name__ == "__main__":
    main()
