"""What do we ourselves cost a step, where the model costs next to nothing?

A model of two layers, hidden size 64. Every case runs with few and with many tokens: the difference, over the number of steps
between, is the time of a step, without recording, sending and the prompt's forward. Ours minus stock's is our own. At 256
requests it should be at most four times that at one.

    python benchmarks/tiny.py [--case add_30] [--rounds 9]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cases import CASES
from harness import Measured, Task, measure, sides, trio
from ratios import RESAMPLES
from results import Row, arguments, facts, keep, show, tell
from throughput import task_of, vocab_of

Values = npt.NDArray[np.float64]

NUM_ROUNDS = 9
REQUESTS = (1, 16, 64, 256)
FEW, MANY = 16, 112
NAMES = ("idle", "add_30", "save_30")  # "30" stands for every block: two here
LAYERS, HIDDEN, VOCAB, HEADS = 2, 64, 512, 2


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
    asked = [task for name in options.names for count in REQUESTS for task in _pair(name, count, num_rounds)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder))
        with sides(trio(checkpoint, max_num_seqs=max(REQUESTS)), tell=tell) as alive:
            run = facts(alive, options.seed)
            measured = measure(alive, asked, vocab_of(checkpoint), options.seed, tell)
    rows = {
        f"{name}, {count} requests": {"num_requests": count, **_row(measured, name, count), "run": run}
        for name in options.names
        for count in REQUESTS
    }
    show("our own time", COLUMNS, [_cells(name, row) for name, row in rows.items()])
    keep(options, "tiny", rows, num_rounds)


COLUMNS = ["case", "stock µs a step", "ours on top, µs [95 %]", "A/A, µs [95 %]"]


def _pair(name: str, count: int, num_rounds: int) -> list[Task]:
    case = next(case for case in CASES if case.name == name)
    return [
        replace(task_of(case, num_rounds, count, num_tokens), name=_label(name, count, num_tokens))
        for num_tokens in (FEW, MANY)
    ]


def _label(name: str, count: int, num_tokens: int) -> str:
    return f"{name}, {count} requests, {num_tokens} tokens"


def _row(measured: dict[str, Measured], name: str, count: int) -> Row:
    few, many = (measured[_label(name, count, num_tokens)] for num_tokens in (FEW, MANY))
    step = {side: _slope(few.seconds(side), many.seconds(side)) for side in ("stock", "ours", "again")}
    return {
        "stock": float(np.median(step["stock"])),
        "own": _interval(step["ours"] - step["stock"]),
        "a_a": _interval(step["again"] - step["stock"]),
        "steps": {side: values.tolist() for side, values in step.items()},
    }


def _slope(few: Sequence[float], many: Sequence[float]) -> Values:
    """Microseconds a step, round by round."""
    slopes: Values = (np.array(many) - np.array(few)) / (MANY - FEW) * 1e6
    return slopes


def _interval(values: Values) -> list[float]:
    """The median and its 95 % interval."""
    drawn = np.median(np.random.default_rng(0).choice(values, (RESAMPLES, len(values))), axis=1)
    return [float(np.median(values)), *(float(bound) for bound in np.percentile(drawn, [2.5, 97.5]))]


def _cells(name: str, row: Row) -> list[str]:
    own, again = ("{:.0f} [{:.0f}, {:.0f}]".format(*row[key]) for key in ("own", "a_a"))
    return [name, f"{row['stock']:.0f}", own, again]


if __name__ == "__main__":
    main()
