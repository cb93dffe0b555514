"""A poison raises at every use, naming the variable, the reason and the line."""

from __future__ import annotations

import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from nnsight_vllm.errors import ScopeError
from nnsight_vllm.trace.blocks.poison import Poison, is_poison, kept

USES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda value: value.shape,
    "set attribute": lambda value: setattr(value, "values", ()),
    "operator": lambda value: value + 1,
    "reflected": lambda value: 1 - value,
    "in place": lambda value: value.__iadd__(1),
    "matmul": lambda value: value @ value,
    "compare": lambda value: value == 1,
    "order": lambda value: value < 1,
    "call": lambda value: value(),
    "item": lambda value: value[0],
    "set item": lambda value: operator.setitem(value, 0, 1),
    "iterate": lambda value: list(value),
    "unpack": lambda value: print(*value),
    "in": lambda value: 1 in value,
    "length": lambda value: len(value),
    "truth": lambda value: not value,
    "str": lambda value: str(value),
    "repr": lambda value: repr(value),
    "format": lambda value: f"{value}",
    "print": lambda value: print(value),
    "int": lambda value: int(value),
    "index": lambda value: [1, 2][value],
    "round": lambda value: round(value),
    "floor": lambda value: math.floor(value),
    "hash": lambda value: {value},
    "with": lambda value: value.__enter__(),
    "isinstance": lambda value: isinstance(value, int),
    "pickle": lambda value: pickle.dumps(value),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_raises_with_name_reason_and_line(use: Callable[[Any], object]) -> None:
    with pytest.raises(ScopeError, match=r"test_poison.py:\d+: `y` can't be used here: because"):
        use(Poison("y", "because"))


def test_torch_functions_raise_too() -> None:
    torch = pytest.importorskip("torch")
    poison = Poison("y", "because")
    uses: list[Callable[[], object]] = [
        lambda: torch.add(torch.ones(1), poison),
        lambda: torch.stack([torch.ones(1), poison]),
        lambda: torch.relu(poison),
    ]
    for use in uses:
        with pytest.raises(ScopeError, match=r"test_poison.py:\d+: `y`"):
            use()


def test_holding_one_is_no_use() -> None:
    poison = Poison("y", "because", (1, 2))
    holder = {"a": [poison]}
    assert holder["a"][0] is poison and is_poison(poison)
    assert poison.values == (1, 2)


def test_kept_flattens_and_drops_doubles() -> None:
    one, two = object(), object()
    assert kept(one, Poison("y", "", (two, one)), two) == (one, two)
