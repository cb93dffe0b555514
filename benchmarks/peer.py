"""How fast is a batch whose requests carry interventions in `nnsight` 0.8.1, on the same machine?

The cases of the throughput table that its language can express, for each request in its own `invoke`. Beside it run stock vLLM,
compiled as we use it, and stock vLLM eager, which is what `nnsight` runs on: the second ratio is what its interventions cost.

    NNSIGHT_PYTHON=path/to/its/venv/bin/python python benchmarks/peer.py [--case add_1] [--rounds 5]

`nnsight_peer.py` tells how its environment is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from cases import Draw, encoder, look
from harness import NUM_REQUESTS, NUM_TOKENS, SideError, Task, measure, sides, start_of
from messages import Delivered, Done, Host, Job
from ratios import paired
from results import Row, arguments, facts, keep, show, tell
from throughput import vocab_of

NUM_ROUNDS = 5
COLUMNS = ["case", "nnsight tok/s", "to stock [95 %]", "to stock eager [95 %]"]
NAMES = ("idle", "add_1", "add_30", "save_30", "gated", "logits")
SAVING = ("save_30", "gated", "logits")
EDITING = ("add_1", "add_30", "gated", "logits")


Step = Callable[[list[Any]], None]


def idle(host: Host, job: Job) -> Callable[[], Delivered]:
    """Requests that do nothing but bring their tokens home."""
    return _run(host, job, lambda number: lambda found: None)


def add_1(host: Host, job: Job) -> Callable[[], Delivered]:
    """As in `cases`. A block gives `(hidden, residual)`, whose sum is the stream: an addend goes to the first."""
    return _steer(host, job, [host.num_layers // 3])


def add_30(host: Host, job: Job) -> Callable[[], Delivered]:
    """As in `cases`."""
    return _steer(host, job, list(range(host.num_layers)))


def save_30(host: Host, job: Job) -> Callable[[], Delivered]:
    """As in `cases`; a list of blocks a step."""
    layers = host.engine.model.layers

    def step(found: list[Any]) -> None:
        row = []
        for layer in layers:
            hidden, residual = layer.output
            row.append(hidden[-1] + residual[-1])
        found.append(row)

    def is_complete(steps: list[Any]) -> bool:
        return all(look(list(states), job.num_tokens, lambda state: state[0]) for states in zip(*steps, strict=True))

    return _run(host, job, lambda number: step, is_complete)


def gated(host: Host, job: Job) -> Callable[[], Delivered]:
    """As in `cases`."""
    draw = Draw(job)
    directions, probes = draw.vectors(host), draw.vectors(host)
    thresholds = (torch.randn(len(job.prompts), generator=draw.generator) * 0.01).tolist()
    matrix, layer = encoder(host), host.engine.model.layers[host.num_layers // 3]

    def step_of(number: int) -> Step:
        d, p, t = directions[number].clone(), probes[number].clone(), thresholds[number]

        def step(found: list[Any]) -> None:
            hidden, residual = layer.output
            h = hidden + residual
            gate = (h @ p) > t
            hidden -= ((h @ d) * gate)[:, None] * d
            found.append(((hidden + residual) @ matrix).topk(8))

        return step

    return _run(host, job, step_of, lambda tops: look(tops, job.num_tokens, lambda top: top[0][-1, 0]))


def logits(host: Host, job: Job) -> Callable[[], Delivered]:
    """As in `cases`."""
    draw = Draw(job)
    banned, biased = draw.ids(host.vocab, 100), draw.ids(host.vocab, 20)
    biases = torch.randn(len(job.prompts), 20, generator=draw.generator) * 4
    model = host.engine

    def step_of(number: int) -> Step:
        ban, ids, bias = banned[number].clone(), biased[number].clone(), biases[number].clone()

        def step(found: list[Any]) -> None:
            scores = model.logits
            scores[:, ban] = float("-inf")
            scores[:, ids] += bias
            found.append(scores.topk(5))

        return step

    return _run(host, job, step_of, lambda tops: look(tops, job.num_tokens, lambda top: top[0][0, 0]))


def _steer(host: Host, job: Job, blocks: list[int]) -> Callable[[], Delivered]:
    vectors = Draw(job).vectors(host) * 4
    layers = [host.engine.model.layers[block] for block in blocks]

    def step_of(number: int) -> Step:
        vector = vectors[number].clone()

        def step(found: list[Any]) -> None:
            for layer in layers:
                layer.output[0][:] += vector

        return step

    return _run(host, job, step_of)


def _run(
    host: Host,
    job: Job,
    step_of: Callable[[int], Step],
    is_complete: Callable[[list[Any]], bool] | None = None,
) -> Callable[[], Delivered]:
    """One trace of all prompts. Each request takes along the names of its block only: its own constants."""
    model, prompts, num_tokens = host.engine, job.prompts, job.num_tokens

    def run() -> Delivered:
        with model.trace(**job.sampling) as tracer:
            found: Any = [None] * len(prompts)
            found.save()
            tokens: Any = [None] * len(prompts)
            tokens.save()
            for number, prompt in enumerate(prompts):
                step = step_of(number)
                with tracer.invoke(prompt):
                    values: list[Any] = []
                    ids: list[Any] = []
                    for _ in tracer.iter[0:num_tokens]:
                        step(values)
                        ids.append(model.samples.clone())
                    found[number], tokens[number] = values, ids
        complete = [is_complete(values) for values in found] if is_complete else []
        return Delivered([[int(id) for id in ids] for ids in tokens], sum(complete))

    return run


def main() -> None:
    options = arguments(__doc__, NAMES)
    python = os.environ.get("NNSIGHT_PYTHON")
    if python is None:
        raise SystemExit("name nnsight's interpreter in NNSIGHT_PYTHON (nnsight_peer.py tells how to set it up)")
    num_rounds = options.rounds or NUM_ROUNDS
    starts = {
        "stock": start_of("stock", options.checkpoint),
        "eager": start_of("stock", options.checkpoint, enforce_eager=True),
        "nnsight": start_of("nnsight", options.checkpoint),
    }
    tasks = [
        Task(
            name,
            {"stock": "cases:plain", "eager": "cases:plain", "nnsight": f"peer:{name}"},
            num_rounds,
            check=_checked(name),
        )
        for name in options.names
    ]
    with sides(starts, {"nnsight": python}, tell) as alive:
        run = facts(alive, options.seed)
        measured = measure(alive, tasks, vocab_of(options.checkpoint), options.seed, tell)
    rows: dict[str, Row] = {
        name: {
            "rounds": found.rounds,
            "first": found.first,
            "to_stock": paired(found.seconds("stock"), found.seconds("nnsight")),
            "to_eager": paired(found.seconds("eager"), found.seconds("nnsight")),
            "run": run,
        }
        for name, found in measured.items()
    }
    show("nnsight 0.8.1", COLUMNS, [_cells(name, row) for name, row in rows.items()])
    keep(options, "peer", rows, num_rounds)


def _checked(name: str) -> Callable[[dict[str, Done]], None]:
    """A run that didn't do its work must not count."""

    def check(done: dict[str, Done]) -> None:
        run = done["nnsight"]
        if [len(tokens) for tokens in run.tokens] != [NUM_TOKENS] * NUM_REQUESTS:
            raise SideError(f"{name}: nnsight generated {[len(tokens) for tokens in run.tokens]} tokens")
        if name in SAVING and run.num_complete != NUM_REQUESTS:
            raise SideError(f"{name}: {run.num_complete} of {NUM_REQUESTS} requests have all their values")
        if name in EDITING and run.tokens == done["eager"].tokens:
            raise SideError(f"{name}: the edits changed nothing")

    return check


def _cells(name: str, row: Row) -> list[str]:
    seconds = median(entry["nnsight"] for entry in row["rounds"])
    to_stock, to_eager = row["to_stock"], row["to_eager"]
    return [name, f"{NUM_REQUESTS * NUM_TOKENS / seconds:.0f}", str(to_stock), str(to_eager)]


if __name__ == "__main__":
    main()
