"""How much Python a decode step of a group is: calls of our own functions, and calls that those make into C.

Counts don't depend on the machine. A bound may be lowered; whoever raises one says why.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save
from toy import HIDDEN, Toy, graph

import nnsight_vllm
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.graph.nodes import Block, Const, Iterations, Node, Op, Read, Ref, Save, Slice
from nnsight_vllm.plan import program

NUM_REQUESTS, PROMPT, STEPS = 32, 2, 4
OURS = (str(Path(nnsight_vllm.__file__).parent), "<string>")  # `<string>`: a dataclass's own `__init__`
EXECUTOR = ("begin_step", "at_tap", "enter_logits", "leave_logits", "end_step")


def adding(number: int) -> tuple[bytes, bytes]:
    """A graph that adds a vector of its own at one block in every iteration, and its tensor's file."""
    data = save({"tensor": torch.arange(HIDDEN, dtype=torch.float32) + number})
    body: list[Node] = [
        Read(2, "1.out", None),
        Op(3, "py.getitem", [Ref(2), Slice()]),
        Op(4, "py.iadd", [Ref(3), Ref(1)], {}, "1.out"),
    ]
    return graph(Const(1, digest(data)), Iterations(900, 0, None, 1, 901, Block(body))), data


def collecting(number: int) -> tuple[bytes, bytes]:
    """One that collects its last row there."""
    body: list[Node] = [
        Read(2, "1.out", None),
        Op(3, "py.getitem", [Ref(2), -1]),
        Op(4, "py.append", [Ref(0), Ref(3)]),
    ]
    return graph(Op(0, "py.list"), Save(1, "s", Ref(0)), Iterations(900, 0, None, 1, 901, Block(body))), b""


class Counts:
    """Calls while a method of the executor runs: of our functions, and of C functions by ours."""

    def __init__(self, toy: Toy) -> None:
        self.python: Counter[str] = Counter()
        self.c: Counter[str] = Counter()
        for name in EXECUTOR:
            setattr(toy.executor, name, partial(self._run, getattr(toy.executor, name)))

    def _run(self, method: Callable[..., Any], *args: Any) -> Any:
        sys.setprofile(self._count)
        try:
            return method(*args)
        finally:
            sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, arg: Any) -> None:
        if not frame.f_code.co_filename.startswith(OURS):
            return
        if event == "call":
            self.python[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            self.c[getattr(arg, "__qualname__", repr(arg))] += 1


@torch.inference_mode()  # as the engine's taps
def counted(make: Callable[[int], tuple[bytes, bytes]], num_requests: int) -> tuple[int, int]:
    """The calls of one decode step."""
    toy = Toy()
    for i in range(num_requests):
        data, file = make(i)
        toy.store.put([file] if file else [])
        toy.add(f"r{i}", data, PROMPT)
    counts = None
    for step in range(STEPS):
        if step == STEPS - 1:
            counts = Counts(toy)
        toy.step(**{f"r{i}": (PROMPT, 0) if step == 0 else (1, PROMPT + step - 1) for i in range(num_requests)})
    assert counts is not None and not any(delta.failure for sent in toy.received.values() for delta in sent)
    print(counts.python, counts.c)  # shown where a bound is broken
    return counts.python.total(), counts.c.total()


def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run operation by operation."""
    monkeypatch.setattr(program, "find_fused", lambda *args: {})


@pytest.mark.parametrize(
    ("make", "num_requests", "is_fused", "most_python", "most_c"),
    [
        (adding, NUM_REQUESTS, True, 110, 115),
        (adding, NUM_REQUESTS, False, 190, 186),
        (adding, 1, True, 93, 68),
        (collecting, NUM_REQUESTS, True, 134, 137),
        (collecting, 1, True, 125, 97),
    ],
)
def test_a_decode_step_makes_no_more_calls(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[int], tuple[bytes, bytes]],
    num_requests: int,
    is_fused: bool,
    most_python: int,
    most_c: int,
) -> None:
    if not is_fused:
        unfused(monkeypatch)
    python, c = counted(make, num_requests)
    assert python <= most_python
    assert c <= most_c
