"""What does our server cost, beside stock `vllm serve`?

`vllm bench serve` (its own function, called here so that a round doesn't start a Python) sends the same random prompts to each
server in turn, in random order: stock, ours, and stock once more in a third process. Once without our field, once with an edit in
every request: a vector, by name, added at one block. Throughput, and the 99th percentiles of the time to the first token,
between tokens, and of a request as a whole.

    python benchmarks/serving.py [--rounds 15] [--starts 3]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from harness import ARGUMENTS, NUM_REQUESTS, NUM_TOKENS, ROOT, SideError
from ratios import Ratio, paired
from results import Row, arguments, in_this_process, keep, show, tell
from safetensors.torch import save

sys.path.append(str(ROOT / "tests"))  # the server in a process of its own is the tests'
from live_server import OURS, STOCK, LiveServer

NUM_STARTS = 3
NUM_PROMPTS = 2 * NUM_REQUESTS
NAME = "benchmarked"
EDIT = {"edits": [{"site": "model.layers.10.output[0]", "op": "add", "tensor": "direction", "scale": 4.0}]}
COLUMNS = ["case", "measure", "ours to stock [95 %]", "stock to itself [95 %]", "required"]
# What is compared, and whether more of it is better.
MEASURES = {"output_throughput": True, "p99_ttft_ms": False, "p99_tpot_ms": False, "p99_e2el_ms": False}
ENVIRONMENT = {
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": str(ROOT),
}
Measured = dict[str, dict[str, float]]  # of a round: measure -> side -> value


@dataclass(frozen=True)
class Case:
    """`bar`: of the throughput's ratio."""

    name: str
    title: str
    bar: float
    num_rounds: int
    extra: dict[str, Any]


CASES = [
    Case("plain", "requests without our field", 0.98, 15, {}),
    Case("edited", "add a vector at one block, in every request", 0.96, 6, {"intervention": EDIT}),
]


def main() -> None:
    options = arguments(__doc__, [case.name for case in CASES], num_starts=NUM_STARTS)
    cases = [case for case in CASES if case.name in options.names]
    run = in_this_process(options.seed)
    found: dict[str, list[Measured]] = {case.name: [] for case in cases}
    for number in range(options.starts):
        draw = random.Random(options.seed + number)
        with ExitStack() as stack:
            urls = {}
            for side in ("stock", "ours", "again"):
                tell(f"starting {side}")
                urls[side] = stack.enter_context(_server(side, options.checkpoint)).url
            _put_vector(urls["ours"], options.checkpoint)
            for case in cases:
                _round(case, urls, options.checkpoint, draw)  # not counted
            for turn in range(max(_share(case, options) for case in cases)):
                for case in cases:
                    if turn < _share(case, options):
                        found[case.name].append(_round(case, urls, options.checkpoint, draw))
                        tell(f"{case.name} {len(found[case.name])}: {found[case.name][-1]['output_throughput']}")
    rows = {case.name: _row(case, found[case.name], run) for case in cases}
    show("our server beside stock `vllm serve`", COLUMNS, [cells for row in rows.values() for cells in cells_of(row)])
    keep(options, "serving", rows, min(len(row["rounds"]) for row in rows.values()))


def cells_of(row: Row) -> list[list[str]]:
    """A line for each measure."""
    lines = []
    for measure in MEASURES:
        ratio, same = _ratio(row, measure, "ours"), _ratio(row, measure, "again")
        required = ""
        if measure == "output_throughput":
            required = f"{row['bar']:.2f} {'✓' if ratio.median >= row['bar'] else '✗'}"
        elif row["is_plain"]:  # an edit's own time is what it is: its bar is of throughput
            required = f"stock's own spread, {same.smallest:.2f} {'✓' if ratio.median >= same.smallest else '✗'}"
        lines.append([row["title"], measure, str(ratio), str(same), required])
    return lines


def _ratio(row: Row, measure: str, side: str) -> Ratio:
    """Above one: better than stock."""
    stock = [round[measure]["stock"] for round in row["rounds"]]
    other = [round[measure][side] for round in row["rounds"]]
    return paired(other, stock) if MEASURES[measure] else paired(stock, other)


def _row(case: Case, rounds: list[Measured], run: Row) -> Row:
    return {
        "title": case.title,
        "bar": case.bar,
        "is_plain": not case.extra,
        "num_prompts": NUM_PROMPTS,
        "rounds": rounds,
        "run": run,
    }


def _share(case: Case, options: Namespace) -> int:
    return int(-(-(options.rounds or case.num_rounds) // options.starts))


def _server(side: str, checkpoint: str) -> LiveServer:
    arguments = [checkpoint, "--served-model-name", NAME]
    for name, value in ARGUMENTS.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return LiveServer(arguments, OURS if side == "ours" else STOCK, ENVIRONMENT, seconds=900)


def _put_vector(url: str, checkpoint: str) -> None:
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    vector = torch.nn.functional.normalize(torch.randn(config["hidden_size"], generator=torch.manual_seed(0)), dim=0)
    data = save({"tensor": vector})
    digest = hashlib.sha256(data).hexdigest()
    answer = httpx.put(f"{url}/v1/interventions/tensors/{digest}", params={"name": "direction"}, content=data)
    answer.raise_for_status()


def _round(case: Case, urls: dict[str, str], checkpoint: str, draw: random.Random) -> Measured:
    """Each server once, all with the same prompts; the field goes to ours only."""
    seed = draw.getrandbits(31)
    round: Measured = {measure: {} for measure in MEASURES}
    for side in draw.sample(list(urls), len(urls)):
        before = _edited(urls["ours"])
        result = _bench(urls[side], checkpoint, seed, case.extra if side == "ours" else {})
        wanted = NUM_PROMPTS if side == "ours" and case.extra else 0
        if result["completed"] != NUM_PROMPTS or result["total_output_tokens"] != NUM_PROMPTS * NUM_TOKENS:
            raise SideError(f"{side}: {result['completed']} requests, {result['total_output_tokens']} tokens")
        if not wanted <= _edited(urls["ours"]) - before <= wanted + 1:  # vLLM's client tries a request first
            raise SideError(f"{case.name}: {_edited(urls['ours']) - before:.0f} requests had graphs")
        for measure in MEASURES:
            round[measure][side] = float(result[measure])
    return round


def _edited(url: str) -> float:
    """How many requests with graphs our server had."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("nnsight_requests_with_graphs_total"))


def _bench(url: str, checkpoint: str, seed: int, extra: dict[str, Any]) -> dict[str, Any]:
    """`vllm bench serve`, quietly."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = ["--base-url", url, "--model", NAME, "--tokenizer", checkpoint, "--dataset-name", "random"]
    given += ["--random-input-len", "25", "--random-range-ratio", json.dumps({"input": 0.6, "output": 0.0})]
    given += ["--random-output-len", str(NUM_TOKENS)]
    given += ["--num-prompts", str(NUM_PROMPTS), "--max-concurrency", str(NUM_REQUESTS), "--seed", str(seed)]
    given += ["--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    given += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"]
    if extra:
        given += ["--extra-body", json.dumps(extra)]
    with contextlib.redirect_stdout(io.StringIO()):
        result: dict[str, Any] = bench(parser.parse_args(given))
    return result


if __name__ == "__main__":
    main()
