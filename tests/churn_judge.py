"""Whether a request got what it gets alone: equal tokens, texts, ends and failures; values and logits within a tolerance.

Tolerance: other rows in a step are other sums in a matrix product. In float32 (eps 1.2e-7) over four layers of 128 to 256
terms this gives 1e-6 of a tensor's largest element, a few times that where a graph amplifies it; 5e-5 of it is allowed, and a
wrong row is of order one. Where the rows of all its steps were those of the run alone, nothing may differ by a bit.

What rounding decides: a token may be another one only if the run alone, its logits for that token raised by the tolerance,
draws it too; and a value whose sign a graph asks for may lie on either side of zero only if it's within the tolerance of it.
Both are counted as ties. Nothing else is excused, and up to the tie everything must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from churn_engine import Got
from churn_scenario import Ask
from torch import Tensor

TOLERANCE = 5e-5


@dataclass(frozen=True)
class Verdict:
    is_tie: bool = False
    is_same_bits: bool = False
    difference: float = 0.0


def judge(ask: Ask, number: int, got: Got, alone: Got, margins: tuple[str, ...], is_whole: bool = True) -> Verdict:
    """Compare sample `number` with the run alone; an aborted one up to its end. Raises `AssertionError`."""
    is_same = got.steps == alone.steps != [] and is_whole
    tolerance = 0.0 if is_same else TOLERANCE
    at = _num_equal(got.tokens, alone.tokens)
    apart = _compare_logits(got, alone, tolerance, at)
    if any(_is_undecided(alone.values.get(name)) for name in margins) and not is_same:
        return Verdict(is_tie=True)
    if at < min(len(got.tokens), len(alone.tokens)):
        assert not is_same, f"other tokens from the same rows: {got.tokens}, alone {alone.tokens}"
        _require_tie(ask, number, got.tokens[at], alone, at)
        _compare_lists(ask, got, alone, at)
        return Verdict(is_tie=True)
    if not is_whole:
        assert len(got.tokens) <= len(alone.tokens), (got.tokens, alone.tokens)
        return Verdict(difference=max(apart, _prefixes(got.values, alone.values)))
    assert got.tokens == alone.tokens
    for name in ("reason", "stop_reason", "text", "failure", "logs"):
        assert getattr(got, name) == getattr(alone, name), (name, getattr(got, name), getattr(alone, name))
    assert sorted(got.values) == sorted(alone.values)
    worst = max((difference(got.values[name], alone.values[name]) for name in alone.values), default=0.0)
    assert worst <= tolerance, f"saved values differ by {worst} of the largest"
    return Verdict(is_same_bits=is_same, difference=max(apart, worst))


def difference(one: Any, other: Any) -> float:
    """The largest difference of two saved values, in terms of the largest finite element; what isn't a float must be equal."""
    assert type(one) is type(other), (one, other)
    pairs = list(_tensors(one, other, ""))
    size = max((_largest(tensor) for _, tensor in pairs), default=0.0)
    return max((_apart(left, right) / (size or 1.0) for left, right in pairs), default=0.0)


# -- tokens --------------------------------------------------------------------------------------------------------------


def _require_tie(ask: Ask, number: int, token: int, alone: Got, at: int) -> None:
    """The other token must be the one drawn when its logit is as much larger as rounding may make it."""
    logits = alone.logits[at].clone()
    assert _draw(ask, number, logits, at) == alone.tokens[at], "this isn't how the token was drawn"
    logits[token] += 2 * TOLERANCE * _largest(logits)
    drawn = _draw(ask, number, logits, at)
    assert drawn == token, f"token {at} is {token}, alone {alone.tokens[at]}, and no tie: {drawn}"


def _draw(ask: Ask, number: int, logits: Tensor, at: int) -> int:
    """The token that vLLM's sampler on a CPU draws as the request's `at`-th."""
    if ask.temperature == 0:
        return int(logits.argmax())
    generator = torch.Generator().manual_seed(ask.seed + (number if ask.n > 1 else 0))
    seeds = [torch.randint(0, 2**31, (1,), generator=generator) for _ in range(at + 1)]
    return int(torch.ops._C.fused_gumbel_argmax((logits / ask.temperature)[None], seeds[-1])[0])


def _num_equal(one: list[int], other: list[int]) -> int:
    pairs = zip_longest(one, other)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), len(one))


def _is_undecided(margins: Any) -> bool:
    """Whether a value that a graph asks for the sign of is zero within the tolerance."""
    found = [tensor.abs() for tensor in margins or []]
    size = max([1.0, *(float(tensor.max()) for tensor in found)])
    return any(float(tensor.min()) <= TOLERANCE * size for tensor in found)


# -- values --------------------------------------------------------------------------------------------------------------


def _compare_logits(got: Got, alone: Got, tolerance: float, count: int) -> float:
    """Of its tokens up to and with the first one that isn't equal: those of an end without a token may be anybody's."""
    worst = 0.0
    for token in range(min(count + 1, len(got.tokens), len(alone.tokens))):
        if token in got.logits:  # the front end's own run isn't watched
            apart = difference(got.logits[token], alone.logits[token])
            assert apart <= tolerance, f"logits of token {token} differ by {apart} of the largest"
            worst = max(worst, apart)
    return worst


def _compare_lists(ask: Ask, got: Got, alone: Got, at: int) -> None:
    """What lists gained up to iteration `at`, after which the texts aren't the same."""
    assert ask.graph is not None or not alone.values
    if ask.graph is None:
        return
    count = len(ask.graph.iterations(at + 1))
    trips = len(ask.graph.iterations(len(alone.tokens)))
    for name, value in alone.values.items():
        if isinstance(value, list) and trips and len(value) % trips == 0:
            shared = count * (len(value) // trips)
            assert difference(got.values[name][:shared], value[:shared]) <= TOLERANCE


def _prefixes(values: dict[str, Any], whole: dict[str, Any]) -> float:
    """What came of an aborted request's values is the beginning of all of them."""
    worst = 0.0
    for name, value in values.items():
        other = whole[name]
        if isinstance(value, list):
            other = other[: len(value)]
        elif isinstance(value, dict):
            other = {key: other[key] for key in value}
        worst = max(worst, difference(value, other))
    assert worst <= TOLERANCE, f"values up to the end differ by {worst} of the largest"
    return worst


def _tensors(one: Any, other: Any, path: str) -> Any:
    """Pairs of floating tensors at the same places; everything else is compared here."""
    if isinstance(other, Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype, (path, one, other)
        if other.is_floating_point():
            yield one, other
        else:
            assert torch.equal(one, other), (path, one, other)
    elif isinstance(other, list | tuple):
        assert len(one) == len(other), (path, len(one), len(other))
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _tensors(left, right, f"{path}[{i}]")
    elif isinstance(other, dict):
        assert list(one) == list(other), (path, list(one), list(other))
        for key in other:
            yield from _tensors(one[key], other[key], f"{path}[{key!r}]")
    else:
        assert one == other, (path, one, other)


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN and infinities must be alike."""
    finite = one.isfinite()
    assert torch.equal(finite, other.isfinite()), "not finite at other places"
    assert torch.equal(one[~finite].nan_to_num(nan=0.0), other[~finite].nan_to_num(nan=0.0)), "another infinity"
    return float((one[finite] - other[finite]).abs().max()) if bool(finite.any()) else 0.0


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
