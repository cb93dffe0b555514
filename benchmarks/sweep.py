"""How many requests a second does an activation-patching sweep reach?

A clean run and a corrupted prompt; then one run for every block and token, with the residual stream at that place taken from the
clean run, and the difference of two logits as the result: 1 + 30 x 15 runs. Beside stock vLLM on the same prompts without any
edit, `transformers` with forward hooks, batched as well as it can, and `nnsight` 0.8.1 if it is there.

    NNSIGHT_PYTHON=path/to/its/venv/bin/python python benchmarks/sweep.py [--rounds 5]

On a CPU `transformers` uses every core; vLLM gives its worker all but one. It gets every patched run in batches of the size
that is fastest on this machine; skipping the blocks below a patch would be another algorithm and isn't done.
"""

from __future__ import annotations

import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from harness import FIRST_ID, PAUSE, Side, SideError, sides, start_of
from messages import Delivered, Done, Host, Job
from ratios import paired
from results import Row, arguments, facts, keep, show, tell
from throughput import vocab_of
from torch import Tensor

NNSIGHT = os.environ.get("NNSIGHT_PYTHON")
NUM_ROUNDS = 5
PROMPT_LENGTH = 15
NUM_WARMUPS = 2
BATCH_SIZES = (15, 60, 225, 450)
MIN_CORRELATION = 0.9  # of the results of two engines, in bfloat16
WORKS: dict[str, str] = {
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
    """The same two traces in its language. Its blocks give `(hidden, residual)` here, whose sum is the stream."""
    from nnsight_peer import patching_sweep

    (clean, corrupted), answers = job.prompts, _answers(host, job)
    return lambda: _delivered(patching_sweep(host.engine, clean, corrupted, answers, job.sampling))


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
    with sides(starts, {"nnsight": NNSIGHT or sys.executable}, tell) as alive:
        run = facts(alive, options.seed)
        measured, num_requests = _measured(alive, vocab_of(options.checkpoint), num_rounds, random.Random(options.seed))
    rows = {name: _row(name, measured, num_requests, run) for name in options.names}
    show("activation-patching sweep", COLUMNS, [_cells(name, row) for name, row in rows.items()])
    keep(options, "sweep", rows, num_rounds)


COLUMNS = ["engine", "requests/s", "smallest–largest", "ours to it [95 %]", "first run"]


def _arguments() -> Namespace:
    """The usual options; `nnsight` takes part where its interpreter is named."""
    options = arguments(__doc__, list(WORKS))
    if "nnsight" in options.names and NNSIGHT is None:
        tell("nnsight is left out: name its interpreter in NNSIGHT_PYTHON (nnsight_peer.py tells how to set it up)")
        options.names.remove("nnsight")
    return options


def _measured(
    alive: dict[str, Side], vocab: int, num_rounds: int, draw: random.Random
) -> tuple[dict[str, list[float]], int]:
    """Seconds by engine, the first run's first; and the number of requests of a sweep."""
    seconds: dict[str, list[float]] = {name: [] for name in alive}
    num_requests = 0
    for number in range(num_rounds + NUM_WARMUPS):
        prompts = [[draw.randrange(FIRST_ID, vocab) for _ in range(PROMPT_LENGTH)] for _ in range(2)]
        seed, done = draw.getrandbits(31), {}
        for name in draw.sample(list(alive), len(alive)):
            time.sleep(PAUSE)
            done[name] = alive[name].run(Job(WORKS[name], prompts, 1, seed))
            seconds[name].append(done[name].seconds)
        num_requests = 1 + _compared(done)
        tell(
            f"round {number - NUM_WARMUPS + 1}: "
            + ", ".join(f"{name} {run.seconds:.2f} s" for name, run in done.items())
        )
    return seconds, num_requests


def _compared(done: dict[str, Done]) -> int:
    """The number of results; raises unless all engines found about the same."""
    numbers = {name: np.array(run.numbers) for name, run in done.items() if run.numbers}
    reference = numbers.get("transformers", next(iter(numbers.values()), np.zeros(0)))
    for name, found in numbers.items():
        correlation = np.corrcoef(found, reference)[0, 1]
        if not correlation > MIN_CORRELATION:
            raise SideError(f"{name}'s results correlate with the reference by {correlation:.3f}")
    return max(run.num_complete for run in done.values())


def _row(name: str, seconds: dict[str, list[float]], num_requests: int, run: Row) -> Row:
    own = seconds[name]
    row: Row = {"num_requests": num_requests, "first": own[0], "rounds": own[NUM_WARMUPS:], "run": run}
    if "ours" in seconds:
        row["ours_to_it"] = paired(own[NUM_WARMUPS:], seconds["ours"][NUM_WARMUPS:])
    return row


def _cells(name: str, row: Row) -> list[str]:
    speeds = [row["num_requests"] / seconds for seconds in row["rounds"]]
    spread = f"{min(speeds):.0f}–{max(speeds):.0f}"
    return [name, f"{np.median(speeds):.0f}", spread, str(row.get("ours_to_it", "")), f"{row['first']:.2f} s"]


def _answers(host: Host, job: Job) -> tuple[int, int]:
    """The two tokens whose logits are compared."""
    right, wrong = random.Random(job.seed).sample(range(FIRST_ID, host.vocab), 2)
    return right, wrong


def _delivered(differences: list[float]) -> Delivered:
    return Delivered([], len(differences), differences)


_BEST_SIZE: dict[Any, int] = {}


def _seconds(run: Callable[[], object]) -> float:
    """The faster of two runs."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _clean_states(model: Any, prompt: list[int]) -> list[Tensor]:
    """The residual stream after each block, [tokens, hidden]."""
    states: list[Tensor] = []
    with _hooked(model.model.layers, lambda block, hidden: states.append(hidden[0].clone())):
        model(torch.tensor([prompt]), logits_to_keep=1, use_cache=False)
    return states


def _patched(
    model: Any, prompt: list[int], places: list[tuple[int, int]], states: list[Tensor], answers: tuple[int, int]
) -> list[float]:
    """The results of a batch of patched runs, one row each."""
    rows_of = {block: [i for i, place in enumerate(places) if place[0] == block] for block, _ in places}

    def patch(block: int, hidden: Tensor) -> None:
        if block in rows_of:
            tokens = [places[i][1] for i in rows_of[block]]
            hidden[rows_of[block], tokens] = states[block][tokens]

    with _hooked(model.model.layers, patch):
        logits = model(torch.tensor([prompt] * len(places)), logits_to_keep=1, use_cache=False).logits[:, -1]
    differences: list[float] = (logits[:, answers[0]] - logits[:, answers[1]]).tolist()
    return differences


@contextmanager
def _hooked(blocks: Any, action: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `action(number, hidden)` after each block, with its output [runs, tokens, hidden]."""
    with ExitStack() as stack:
        for number, block in enumerate(blocks):

            def hook(module: Any, inputs: Any, output: Any, number: int = number) -> None:
                action(number, output[0] if isinstance(output, tuple) else output)

            stack.callback(block.register_forward_hook(hook).remove)
        yield


if __name__ == "__main__":
    main()
