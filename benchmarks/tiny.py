"""What do we ourselves cost the worker a step, where the model costs next to nothing?

A model of two layers, hidden size 64; the engine in this process. The clock stands around the executor's calls alone: what
begins and ends a step, and what runs at taps. Steps that hold a prompt don't count. At 256 requests it should be at most four
times that at one.

    python benchmarks/tiny.py [--case add_30] [--rounds 9]
"""

from __future__ import annotations

import functools
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before anything imports vLLM: the worker's clock is ours
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import cases
import torch
from cases import CASES
from harness import ARGUMENTS, random_prompts
from messages import Host, Job
from results import Row, arguments, in_this_process, keep, show, tell

from nnsight_vllm import VLLM
from nnsight_vllm.worker.batch.executor import Executor

NUM_ROUNDS = 9
REQUESTS = (1, 16, 64, 256)
NUM_TOKENS = 48
NAMES = ("add_1", "add_30", "save_30")  # "30" stands for every block: two here
LAYERS, HIDDEN, VOCAB, HEADS = 2, 64, 512, 2
CALLS = ("admit", "drop", "begin_step", "enter_logits", "at_tap", "leave_logits", "end_step")


class Clock:
    """Microseconds in the executor, a step each."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._now = 0.0
        self._depth = 0
        for name in CALLS:
            setattr(Executor, name, self._timed(name, getattr(Executor, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._now += time.perf_counter() - start
                if name == "end_step":
                    self.steps.append(self._now * 1e6)
                    self._now = 0.0

        return timed


def tiny_checkpoint(folder: Path) -> str:
    """A random model and a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 512}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads, eos_token_id=1))
    model.bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return str(folder)


def main() -> None:
    options = arguments(__doc__, NAMES)
    num_rounds = options.rounds or NUM_ROUNDS
    clock, draw = Clock(), random.Random(options.seed)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {**ARGUMENTS, "max_num_seqs": max(REQUESTS), "max_num_batched_tokens": 16384}
        with VLLM(tiny_checkpoint(Path(folder)), **sizes) as model:
            host, run = Host(model, HIDDEN, LAYERS, VOCAB), in_this_process(options.seed)
            torch.set_num_threads(1)  # as in a worker of its own
            for name in options.names:
                for count in REQUESTS:
                    rounds = [_round(host, clock, name, count, draw) for _ in range(num_rounds + 1)][1:]
                    tell(f"{name}, {count} requests: {median(rounds):.0f} us")
                    rows[f"{name}, {count} requests"] = {"num_requests": count, "rounds": rounds, "run": run}
    show("our own time", COLUMNS, [_cells(name, row) for name, row in rows.items()])
    keep(options, "tiny", rows, num_rounds)


COLUMNS = ["case", "us a step", "smallest-largest"]


def _round(host: Host, clock: Clock, name: str, count: int, draw: random.Random) -> float:
    """The median step of a run."""
    case = next(case for case in CASES if case.name == name)
    job = Job(case.work, random_prompts(draw, VOCAB, count), NUM_TOKENS, draw.getrandbits(31), case.options)
    run = getattr(cases, case.work.partition(":")[2])(host, job)
    clock.steps.clear()
    run()
    return median(clock.steps[2:])


def _cells(name: str, row: Row) -> list[str]:
    return [name, f"{median(row['rounds']):.0f}", f"{min(row['rounds']):.0f}–{max(row['rounds']):.0f}"]


if __name__ == "__main__":
    main()
