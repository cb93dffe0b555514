"""Fuzzes what a stranger's graph meets, from its bytes to a run on the toy model: `make fuzz-hostile`.

    python tests/fuzz_hostile.py random 100000 [SEED]     inputs drawn by chance, with the folder of findings as its output
    python tests/fuzz_hostile.py atheris 100000           inputs led by coverage, where `atheris` is installed

An input is on disk before it is tried, so that one that kills the process can be found; with what is wrong it is kept as
tests/server/hostile/DIGEST.bin, which a test replays.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent))
warnings.simplefilter("ignore")

T = TypeVar("T")
FINDINGS = Path(__file__).parent / "server" / "hostile"
TRIED = Path(tempfile.gettempdir()) / f"nnsight-vllm-tried-{os.getpid()}"
MAX_GROWTH = 2 << 20  # kibibytes that the process may grow by


def by_chance(num: int, seed: int) -> int:
    """How many inputs something was wrong with. Says so, and goes on."""
    from hostile import Judge, case

    judge, wrong, start = Judge(), 0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(num):
        data = case(random.Random(seed * 1_000_003 + number))
        try:
            tried(judge, data)
        except Exception as error:
            wrong += 1
            print(f"{kept(data)}: {type(error).__name__}: {error}"[:300], flush=True)
        if number % 5000 == 4999:
            seconds = time.perf_counter() - start
            print(f"{number + 1} inputs in {seconds:.0f} s: {judge.counts}", flush=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{num} inputs, {wrong} findings, {judge.counts}, memory grew by {grown >> 10} MiB")
    return wrong + (grown > MAX_GROWTH)


def by_coverage(num: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["nnsight_vllm.graph", "nnsight_vllm.plan", "nnsight_vllm.worker"]):
        from hostile import Judge, case
    judge = Judge()

    class Bytes:
        """Choices out of a fuzzer's bytes."""

        def __init__(self, data: bytes) -> None:
            self._bytes = atheris.FuzzedDataProvider(data)

        def random(self) -> float:
            return float(self._bytes.ConsumeProbability())

        def randrange(self, stop: int) -> int:
            return int(self._bytes.ConsumeIntInRange(0, stop - 1))

        def choice(self, items: Sequence[T]) -> T:
            return items[self.randrange(len(items))]

    def one(data: bytes) -> None:
        made = data[1:] if data[:1] == b"\0" else case(Bytes(data))
        try:
            tried(judge, made)
        except Exception:
            print(kept(made))
            raise

    atheris.Setup(
        [sys.argv[0], f"-runs={num}", "-max_len=600", "-len_control=0", "-rss_limit_mb=8000", "-print_final_stats=1"],
        one,
    )
    atheris.Fuzz()


def tried(judge: Any, data: bytes) -> None:
    TRIED.write_bytes(data)
    judge.judge(data)


def kept(data: bytes) -> Path:
    FINDINGS.mkdir(exist_ok=True)
    path = FINDINGS / f"{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    how, count = sys.argv[1], int(sys.argv[2])
    if how == "atheris":
        by_coverage(count)
    else:
        sys.exit(bool(by_chance(count, int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(10**6))))
