"""Engines in processes of their own, measured in turn: what every benchmark shares.

A round gives every side the same fresh prompts, one side after the other in random order. Warm-up rounds come first and aren't
counted; the very first run of each side is reported apart, since it holds what is done once.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from messages import Done, Failed, Job, Kind, Ready, Reply, Sites, Start

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "seed": 0}
NUM_REQUESTS = 32
NUM_TOKENS = 64
NUM_WARMUPS = 2
PROMPT_LENGTHS = (10, 40)
FIRST_ID = 10  # special tokens come before
TIMEOUT = 900.0  # seconds, for a start or a run
PAUSE = 0.2  # seconds between two runs: what one side still tidies up isn't in the other's time

_ENVIRONMENT = {
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
}


class SideError(RuntimeError):
    """An engine's process failed; the message has its traceback and the end of what it printed."""


class Side:
    """One engine in a process of its own. A context manager."""

    def __init__(self, start: Start, python: str = sys.executable) -> None:
        environment = {**os.environ, **_ENVIRONMENT}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self.start = start
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("side.py")), msgspec.json.encode(start).decode()],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            ready = self._reply()
            assert isinstance(ready, Ready)
            self.ready = ready
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, job: Job) -> Done:
        """Run a job and wait. Raises `SideError`."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(job) + b"\n")
        self._process.stdin.flush()
        done = self._reply()
        assert isinstance(done, Done)
        return done

    def close(self) -> None:
        """Let the engine end by itself, or end its processes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(self._process.pid)
            self._process.wait()
            self._process.stdout.close()
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reply(self) -> Reply:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + TIMEOUT
        while not select.select([stdout], [], [], 1.0)[0]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SideError(f"the {self.start.kind} engine gave no answer\n{self._printed()}")
        line = stdout.readline()
        if not line:
            raise SideError(f"the {self.start.kind} engine ended ({self._process.wait(30)})\n{self._printed()}")
        reply: Reply = msgspec.json.decode(line, type=Reply)
        if isinstance(reply, Failed):
            raise SideError(f"the {self.start.kind} engine failed\n{self._printed()}\n{reply.error}")
        return reply

    def _printed(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 3000))
        return self._log.read().decode(errors="replace")


def _end_group(pid: int) -> None:
    """End what is left of a process' session: ours alone, since it was started as one."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def sides(
    starts: Mapping[str, Start], pythons: Mapping[str, str] | None = None, tell: Callable[[str], None] = print
) -> Iterator[dict[str, Side]]:
    """All sides, started one after the other."""
    with ExitStack() as stack:
        alive = {}
        for name, start in starts.items():
            tell(f"starting {name} ({start.kind})")
            alive[name] = stack.enter_context(Side(start, (pythons or {}).get(name, sys.executable)))
        yield alive


def start_of(kind: Kind, checkpoint: str, sites: Sites = "all", **arguments: Any) -> Start:
    """How an engine is started unless a benchmark asks for something else."""
    return Start(kind, checkpoint, {**ARGUMENTS, **arguments}, sites)


def trio(checkpoint: str, sites: Sites = "all", **arguments: Any) -> dict[str, Start]:
    """Stock, ours, and stock again in a third process: what two equal engines differ by."""
    stock = start_of("stock", checkpoint, **arguments)
    return {"stock": stock, "ours": start_of("ours", checkpoint, sites, **arguments), "again": stock}


@dataclass(frozen=True)
class Task:
    """Something to measure: the work of each side, and how large it is."""

    name: str
    works: dict[str, str]
    num_rounds: int
    num_requests: int = NUM_REQUESTS
    num_tokens: int = NUM_TOKENS
    options: dict[str, int] = field(default_factory=dict)
    check: Callable[[dict[str, Done]], None] = lambda done: None


@dataclass
class Measured:
    """Seconds of a task by side, one entry a round; `first` is each side's first run."""

    first: dict[str, float]
    rounds: list[dict[str, float]] = field(default_factory=list)

    def seconds(self, side: str) -> list[float]:
        return [round[side] for round in self.rounds]


def measure(
    alive: Mapping[str, Side],
    tasks: Sequence[Task],
    vocab: int,
    seed: int,
    tell: Callable[[str], None] = print,
    num_warmups: int = NUM_WARMUPS,
) -> dict[str, Measured]:
    """Warm every task up, then run its rounds, tasks and sides in random order."""
    draw = random.Random(seed)
    found: dict[str, Measured] = {}
    for task in tasks:
        for warmup in range(num_warmups):
            done = _round(alive, task, vocab, draw)
            if warmup == 0:
                task.check(done)
                found[task.name] = Measured({side: run.seconds for side, run in done.items()})
        tell(f"{task.name}: warm; first runs {_listed(found[task.name].first)}")
    for number in range(max((task.num_rounds for task in tasks), default=0)):
        due = [task for task in tasks if number < task.num_rounds]
        for task in draw.sample(due, len(due)):
            done = _round(alive, task, vocab, draw)
            task.check(done)
            seconds = {side: run.seconds for side, run in done.items()}
            found[task.name].rounds.append(seconds)
            tell(f"{task.name} {number + 1}/{task.num_rounds}: {_listed(seconds)}")
    return found


def random_prompts(draw: random.Random, vocab: int, count: int) -> list[list[int]]:
    """Prompts of random tokens."""
    return [[draw.randrange(FIRST_ID, vocab) for _ in range(draw.randint(*PROMPT_LENGTHS))] for _ in range(count)]


def _round(alive: Mapping[str, Side], task: Task, vocab: int, draw: random.Random) -> dict[str, Done]:
    prompts, seed = random_prompts(draw, vocab, task.num_requests), draw.getrandbits(31)
    done = {}
    for name in draw.sample(list(task.works), len(task.works)):
        time.sleep(PAUSE)
        done[name] = alive[name].run(Job(task.works[name], prompts, task.num_tokens, seed, task.options))
    return done


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{side} {value:.3f} s" for side, value in sorted(seconds.items()))
