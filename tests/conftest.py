"""What every test shares: where engines run, the checkpoints, and at most two engines alive at once."""

from __future__ import annotations

import os

# Before anything imports vLLM or a Hugging Face library.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # engines of different processes keep off each other's core
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)]))

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import v2_on_cpu
from live_server import LiveServer, serve_tiny

from nnsight_vllm import demo_model

if TYPE_CHECKING:
    from nnsight_vllm import VLLM

if v2_on_cpu.IS_CHOSEN:
    v2_on_cpu.install()

MAX_ENGINES = 2
ENGINE_DEFAULTS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "seed": 0}


class Engines:
    """Engines by checkpoint and keywords, started at first use; the least recently used one makes room for a third."""

    def __init__(self) -> None:
        self._alive: OrderedDict[str, VLLM] = OrderedDict()

    def __call__(self, checkpoint: str, **keywords: Any) -> VLLM:
        """The engine for these `VLLM` keywords, on top of `ENGINE_DEFAULTS`. Don't close it and don't keep it over tests."""
        keywords = ENGINE_DEFAULTS | keywords
        key = repr((checkpoint, sorted(keywords.items())))
        if key not in self._alive:
            self._make_room()
            self._alive[key] = _start(checkpoint, keywords)
        self._alive.move_to_end(key)
        return self._alive[key]

    def close(self) -> None:
        while self._alive:
            self._alive.popitem(last=False)[1].close()

    def _make_room(self) -> None:
        while len(self._alive) >= MAX_ENGINES:
            self._alive.popitem(last=False)[1].close()


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """`engines(checkpoint, enforce_eager=True, ...)`: an engine that tests with the same keywords share."""
    shared = Engines()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The path of the demo checkpoint, in the user's cache or in the one that NNSIGHT_VLLM_CACHE names."""
    return demo_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`tiny_checkpoint("gemma2")`: the path of a tiny random checkpoint; tests/checkpoints.py lists the architectures."""
    root: Path = tmp_path_factory.mktemp("checkpoints")

    def path(arch: str) -> str:
        from checkpoints import tiny

        return tiny(arch, root)

    return path


@pytest.fixture(scope="session")
def live(tiny_checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server on a tiny llama with two tenants, for all tests that talk to one: use names of your own in it."""
    with serve_tiny(tiny_checkpoint("llama"), tmp_path_factory.mktemp("server")) as server:
        yield server


def _start(checkpoint: str, keywords: dict[str, Any]) -> VLLM:
    from nnsight_vllm.model import VLLM

    return VLLM(checkpoint, **keywords)
