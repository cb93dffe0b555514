"""Requests of many kinds in one batch, for engines that must all give the same answers.

As a script, `python tests/mixed_requests.py CHECKPOINT FILE`: the answers of an engine in a process of its own, into a file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

import nnsight_vllm as nv

if TYPE_CHECKING:
    from nnsight_vllm import VLLM

LIMITS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 12, "block_size": 32, "seed": 0}
TOLERANCE = 1e-4  # of a value's largest element, in float32: other numbers of rows, other sums
FEW_TOKENS = [30, 31, 32, 33, 34]
Program = Callable[["VLLM", Any], list[Any]]


class Answer(TypedDict):
    """What came of one request: plain data."""

    name: str
    tokens: list[int]
    reason: str | None
    logprobs: list[dict[int, tuple[float, int]]]
    values: list[Any]


def plain(model: VLLM, tracer: Any) -> list[Any]:
    return []


def reads(model: VLLM, tracer: Any) -> list[Any]:
    rows, tokens = nv.list().save(), nv.list().save()
    with tracer.all():
        rows.append(model.model.layers[2].output[0])
        tokens.append(model.samples.output)
    return [rows, tokens]


def pushes(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.all():
        model.model.layers[1].output[0][:] += 0.2
    return []


def pushes_harder(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.all():
        model.model.layers[1].output[0][:] += 0.4
    return []


def spreads_a_mean(model: VLLM, tracer: Any) -> list[Any]:
    h = model.model.layers[0].output[0]
    h += h.mean(0)
    return [model.model.layers[3].mlp.output.save()]


def edits_logits(model: VLLM, tracer: Any) -> list[Any]:
    tops = nv.list().save()
    with tracer.all():
        scores = model.logits.output
        scores[:, ::2] -= 5.0
        tops.append(scores.topk(3).values)
    return [tops]


def sees_the_head(model: VLLM, tracer: Any) -> list[Any]:
    heads = nv.list().save()
    with tracer.all():
        heads.append(model.lm_head.output)
    return [heads]


def sets_tokens(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[3:9]:
        model.samples.output[0] = 11
    return []


def stops(model: VLLM, tracer: Any) -> list[Any]:
    with tracer.iter[7]:
        last = model.model.layers[0].output[0].save()
        tracer.stop()
    return [last]


MIX: list[Program] = [
    plain,
    reads,
    pushes,
    plain,
    edits_logits,
    pushes_harder,
    sees_the_head,
    spreads_a_mean,
    sets_tokens,
    sets_tokens,
    stops,
]


def prompt(number: int, length: int = 20) -> list[int]:
    """Repetitive, so that n-grams are found in it; no two are as long."""
    return [30 + (number * 7 + position) % 5 for position in range(length + number)]


def answers(model: VLLM, numbers: Sequence[int], max_tokens: int, **sampling: Any) -> list[Answer]:
    """Of these requests of `MIX`, together. Those without graphs have few tokens to choose from, so that n-grams come again.

    A temperature is for those with graphs: drafts are accepted at random.
    """
    assert model.llm.reset_prefix_cache()
    heat = {"temperature": sampling.pop("temperature", 0.0)}
    found = []
    with model.trace(max_tokens=max_tokens, ignore_eos=True, **sampling) as tracer:
        for number in numbers:
            own = {"temperature": 0.0, "allowed_token_ids": FEW_TOKENS} if MIX[number] is plain else heat
            with tracer.invoke(prompt(number), **own):
                saved = MIX[number](model, tracer)
                found.append((MIX[number].__name__, tracer.result.save(), saved))
    return [_answer(name, result, saved) for name, result, saved in found]


def _answer(name: str, result: Any, saved: list[Any]) -> Answer:
    values = [list(proxy.value) if isinstance(proxy.value, list) else proxy.value for proxy in saved]
    logprobs = [{token: (one.logprob, one.rank) for token, one in step.items()} for step in result.logprobs or ()]
    return Answer(
        name=name,
        tokens=list(result.token_ids),
        reason=result.finish_reason,
        logprobs=logprobs,
        values=values,
    )


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        name = one["name"]
        assert (name, one["tokens"], one["reason"]) == (name, other["tokens"], other["reason"])
        assert_close(one["values"], other["values"])
        for step, its in zip(one["logprobs"], other["logprobs"], strict=True):
            assert {token: rank for token, (_, rank) in step.items()} == {
                token: rank for token, (_, rank) in its.items()
            }
            assert_close(*(torch.tensor([s[token][0] for token in sorted(step)]) for s in (step, its)))


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    else:
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * max(1.0, float(other.abs().max())))


if __name__ == "__main__":
    checkpoint, file, max_tokens = sys.argv[1:]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with nv.VLLM(checkpoint, dtype="float32", **LIMITS) as engine:
        torch.save(answers(engine, range(len(MIX)), int(max_tokens), logprobs=2), file)
