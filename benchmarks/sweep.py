"""How many requests a second does an activation-patching sweep reach?

A clean run and a corrupted prompt; then one run for every block and token, with the residual stream at that place taken from the
clean run, and the difference of two logits as the result: 1 + 30 x 15 runs. Beside stock vLLM on the same prompts without any
edit, `transformers` with forward hooks, batched as well as it can, and `nnsight` 0.8.1 if it is there.

    python benchmarks/sweep.py [--rounds 5] [--nnsight path/to/its/venv/bin/python]

On a CPU `transformers` uses every core; vLLM gives its worker all but one. It gets every patched run in batches of the size
that is fastest on this machine; skipping the blocks below a patch would be another algorithm and isn't done.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import PAUSE, Measured, Side, SideError, sides, start_of
from messages import Delivered, Done, Host, Job, Kind, Start
from ratios import paired
from results import Row, arguments, facts, keep, show, tell
from throughput import vocab_of
from torch import Tensor

NUM_ROUNDS = 5
PROMPT_LENGTH = 15
NUM_WARMUPS = 2
BATCH_SIZES = (15, 60, 225, 450)
MIN_CORRELATION = 0.9  # of the results of two engines, in bfloat16
WORKS: dict[Kind, str] = {
    "ours": "sweep:ours",
    "stock": "sweep:stock",
    "transformers": "sweep:hooks",
    "nnsight": "sweep:nnsight",
}


def ours(host: Host, job: Job) -> Callable[[], Delivered]:
    """Two traces: the clean run, then all patched ones."""
    model, (clean, corrupted), (right, wrong) = host.engine, job.prompts, _answers(host, job)

    def run() -> Delivered:
        with model.trace(clean, **job.sampling):
            states = [layer.output[0].save() for layer in model.model.layers]
        differences = []
        with model.trace(**job.sampling) as tracer:
            for block, state in enumerate(states):
                for token in range(len(corrupted)):
                    with tracer.invoke(corrupted):
                        model.model.layers[block].output[0][token] = state[token]
                        logits = model.logits.output[0]
                        differences.append((logits[right] - logits[wrong]).save())
        return _delivered([float(difference) for difference in differences])

    return run


def stock(host: Host, job: Job) -> Callable[[], Delivered]:
    """As many requests, none edited."""
    from vllm import SamplingParams

    clean, corrupted = job.prompts
    prompts = [{"prompt_token_ids": prompt} for prompt in [clean] + [corrupted] * (host.num_layers * len(corrupted))]

    def run() -> Delivered:
        host.engine.generate(prompts[:1], SamplingParams(**job.sampling), use_tqdm=False)
        outputs = host.engine.generate(prompts[1:], SamplingParams(**job.sampling), use_tqdm=False)
        return Delivered([], len(outputs))

    return run


def nnsight(host: Host, job: Job) -> Callable[[], Delivered]:
    """The same two traces in its language: its blocks return `(hidden, residual)`, whose sum is the stream."""
    model, (clean, corrupted), (right, wrong) = host.engine, job.prompts, _answers(host, job)
    sampling = job.sampling

    def run() -> Delivered:
        with model.trace(clean, **sampling):
            states = [sum(layer.output).clone() for layer in model.model.layers].save()
        with model.trace(**sampling) as tracer:
            differences = [].save()  # type: ignore[attr-defined]
            for block in range(host.num_layers):
                for token in range(len(corrupted)):
                    with tracer.invoke(corrupted):
                        hidden, residual = model.model.layers[block].output
                        hidden[token] = states[block][token] - residual[token]
                        logits = model.logits[0]
                        differences.append(float(logits[right] - logits[wrong]))
        return _delivered(differences)

    return run


def hooks(host: Host, job: Job) -> Callable[[], Delivered]:
    """`transformers`: the patched runs in batches, each hook patching its block's rows. The best size is found once."""
    (clean, corrupted), answers = job.prompts, _answers(host, job)
    places = [(block, token) for block in range(host.num_layers) for token in range(len(corrupted))]

    def run_with(size: int) -> Delivered:
        with torch.inference_mode():
            states = _clean_states(host.engine, clean)
            found: list[float] = []
            for start in range(0, len(places), size):
                found += _patched(host.engine, corrupted, places[start : start + size], states, answers)
        return _delivered(found)

    if host.engine not in _BEST_SIZE:
        _BEST_SIZE[host.engine] = min(BATCH_SIZES, key=lambda size: _seconds(lambda: run_with(size)))
    return lambda: run_with(_BEST_SIZE[host.engine])


def main() -> None:
    options = _arguments()
    num_rounds = options.rounds or NUM_ROUNDS
    starts = {name: start_of(name, options.checkpoint, max_num_seqs=256) for name in options.names}
    with sides(starts, {"nnsight": options.nnsight or sys.executable}, tell) as alive:
        run = facts(alive, options.seed)
        measured, num_requests = _measured(alive, vocab_of(options.checkpoint), num_rounds, random.Random(options.seed))
    rows = {name: _row(name, measured, num_requests, run) for name in options.names}
    show("activation-patching sweep", COLUMNS, [_cells(name, row) for name, row in rows.items()])
    keep(options, "sweep", rows, num_rounds)


COLUMNS = ["engine", "requests/s", "smallest–largest", "ours to it [95 %]", "first run"]
