"""Does an engine that serves graphs grow?

Resident memory of each process of an engine, after every batch of requests whose graphs add, save, compute and differ; 2,000
requests after a warm-up. Stock vLLM runs the same prompts beside it. Each case of the table takes its turn.

Pages that were freed and that the C library keeps for later are resident too, and how many differs from run to run. So before the
first round and after the last, every worker gives them back (`malloc_trim`): what is resident then is in use. Part of that is
oneDNN's, in either engine: it keeps what it made for the last 1,024 shapes, and prompts of other lengths make other shapes.

    python benchmarks/memory.py [--rounds 8]
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from cases import CASES
from harness import Side, random_prompts, sides, start_of
from messages import Delivered, Host, Job
from results import Row, arguments, facts, keep, show, tell
from throughput import vocab_of

BATCH = 50
BATCHES_A_ROUND = 5  # one of each case
NUM_ROUNDS = 8  # of 250 requests
NUM_WARMUPS = 2  # rounds
NUM_TOKENS = 16
CASE_NAMES = ("add_30", "save_30", "gated", "structures", "logits")
MEGABYTE = 1 << 20
COLUMNS = ["engine", "process", "after warm-up", "at the end", "largest", "in use after warm-up", "in use at the end"]
ROLES = {"VLLM::EngineCore": "engine core", "VLLM::Worker": "worker"}


def main() -> None:
    options = arguments(__doc__, ["ours", "stock"])
    num_rounds = options.rounds or NUM_ROUNDS
    starts = {name: start_of(name, options.checkpoint) for name in options.names}
    vocab = vocab_of(options.checkpoint)
    rows: dict[str, Row] = {}
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # workers are sent a function, `give_back`
    for name, start in starts.items():
        with sides({name: start}, tell=tell) as alive:
            run = facts(alive, options.seed)
            points = list(_memory(alive[name], name, vocab, num_rounds, random.Random(options.seed)))
        rows[name] = {
            "num_requests": num_rounds * BATCHES_A_ROUND * BATCH,
            "megabytes": points[1:-1],
            "in_use": [points[0], points[-1]],
            "run": run,
        }
    table = [
        [name, role, *_span(row["megabytes"], role), *(point[role] for point in row["in_use"])]
        for name, row in rows.items()
        for role in row["megabytes"][0]
    ]
    show("resident memory, MB", COLUMNS, table)
    keep(options, "memory", rows, num_rounds)


def trim(host: Host, job: Job) -> Callable[[], Delivered]:
    """Let the workers give back what is free."""
    llm = getattr(host.engine, "llm", host.engine)

    def run() -> Delivered:
        llm.collective_rpc(give_back)
        return Delivered([])

    return run


def give_back(worker: object) -> None:
    """In the worker: garbage, then the C library's free pages."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(side: Side) -> dict[str, int]:
    """Megabytes of an engine's processes, by what they do."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _session(int(folder.name)) == side.pid:
            title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            role = "front end" if int(folder.name) == side.pid else ROLES.get(title)
            if role is not None:
                pages = int((folder / "statm").read_text().split()[1])
                found[role] = pages * os.sysconf("SC_PAGE_SIZE") // MEGABYTE
    return found


def _session(pid: int) -> int | None:
    """An engine's processes are a session of their own."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _memory(side: Side, name: str, vocab: int, num_rounds: int, draw: random.Random) -> Iterator[dict[str, int]]:
    """In use after the warm-up; resident after the warm-up and after each round; in use at the end."""
    for _ in range(NUM_WARMUPS):
        _round(side, name, vocab, draw)
    resting = resident(side)
    yield _in_use(side, name)
    yield resting
    for number in range(1, num_rounds + 1):
        _round(side, name, vocab, draw)
        megabytes = resident(side)
        tell(f"{name}: {number * BATCHES_A_ROUND * BATCH} requests after the warm-up, {megabytes} MB")
        yield megabytes
    yield _in_use(side, name)


def _round(side: Side, name: str, vocab: int, draw: random.Random) -> None:
    for case in CASES:
        if case.name in CASE_NAMES:
            prompts = random_prompts(draw, vocab, BATCH)
            options = {**case.options, **({"structures": BATCH} if case.name == "structures" else {})}
            work = case.work if name == "ours" else "cases:plain"
            side.run(Job(work, prompts, NUM_TOKENS, draw.getrandbits(31), options))


def _in_use(side: Side, name: str) -> dict[str, int]:
    side.run(Job("memory:trim", [], 0, 0))
    megabytes = resident(side)
    tell(f"{name}: in use {megabytes} MB")
    return megabytes


def _span(points: list[dict[str, int]], role: str) -> list[int]:
    values = [point[role] for point in points]
    return [values[0], values[-1], max(values)]


if __name__ == "__main__":
    main()
