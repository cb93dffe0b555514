"""Slots by content, counted users, and growth."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from row_edits import RANK, random_columns
from torch import Tensor

from nnsight_vllm.kernels.columns import COLUMNS, needs_rank
from nnsight_vllm.kernels.table import Table

WIDTH = 5


def _table(capacity: int = 2) -> Table:
    return Table("add", WIDTH, torch.bfloat16, capacity=capacity)


def _line(number: float) -> dict[str, Tensor | float]:
    return {"vectors": torch.full((WIDTH,), number, dtype=torch.bfloat16), "coefficients": number}


def test_equal_contents_share_a_slot_until_the_last_user_leaves() -> None:
    table = _table()
    first, second, other = table.acquire("a", _line(1)), table.acquire("a", _line(1)), table.acquire("b", _line(2))
    assert first == second != other
    table.release(first)
    assert table.acquire("a", _line(1)) == first
    table.release(first)
    table.release(first)
    assert table.acquire("c", _line(3)) == first
    table.check_integrity()


def test_a_line_is_in_the_buffers_after_fill_and_not_before() -> None:
    table = _table()
    slot = table.acquire("a", _line(3))
    assert not table.is_filled
    assert table.columns["vectors"].count_nonzero() == 0
    assert table.fill() is False
    assert table.is_filled
    assert table.columns["vectors"][slot].tolist() == [3.0] * WIDTH
    assert table.columns["coefficients"][slot] == 3.0


def test_a_slot_that_is_released_before_the_step_is_never_filled() -> None:
    table = _table()
    table.release(table.acquire("a", _line(3)))
    assert table.is_filled
    table.fill()
    assert table.columns["vectors"].count_nonzero() == 0


def test_a_full_table_grows_says_so_and_keeps_every_line(caplog: pytest.LogCaptureFixture) -> None:
    table = _table(capacity=2)
    slots = [table.acquire(number, _line(number)) for number in (1, 2)]
    table.fill()
    addresses = [column.data_ptr() for column in table.columns.values()]
    slots += [table.acquire(number, _line(number)) for number in (3, 4, 5)]
    with caplog.at_level(logging.INFO, logger="nnsight_vllm.kernels.table"):
        assert table.fill() is True
    assert "grew to 8 lines" in caplog.text
    assert (table.capacity, table.generation) == (8, 1)
    assert [column.data_ptr() for column in table.columns.values()] != addresses
    assert [table.columns["coefficients"][slot].item() for slot in slots] == [1, 2, 3, 4, 5]
    assert table.columns["vectors"][slots, 0].tolist() == [1, 2, 3, 4, 5]


def test_addresses_stay_while_there_is_room() -> None:
    table = _table(capacity=4)
    addresses = [column.data_ptr() for column in table.columns.values()]
    for number in range(20):
        table.release(table.acquire(number, _line(number)))
        slot = table.acquire((number,), _line(number))
        assert table.fill() is False
        table.release(slot)
    assert [column.data_ptr() for column in table.columns.values()] == addresses


@pytest.mark.parametrize("operation", COLUMNS)
def test_every_operation_has_a_table(operation: str) -> None:
    rank = RANK if needs_rank(operation) else None
    table = Table(operation, WIDTH, torch.float32, rank=rank, capacity=1)
    columns = random_columns(operation, 3, WIDTH, torch.float32)
    for number in range(3):
        line = {name: c[number] if c.ndim > 1 else float(c[number]) for name, c in columns.items()}
        assert table.acquire(number, line) == number
    table.fill()
    assert all(torch.equal(table.columns[name][:3], values) for name, values in columns.items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"vectors": torch.zeros(WIDTH, dtype=torch.bfloat16)}, "expected a line of"),
        (_line(1) | {"vectors": torch.zeros(WIDTH)}, r"expected torch.bfloat16 \[5\]; got torch.float32 \[5\]"),
        (_line(1) | {"vectors": torch.zeros(4, dtype=torch.bfloat16)}, r"got torch.bfloat16 \[4\]"),
        (_line(1) | {"vectors": 3.0}, "expected a tensor; got 3.0"),
        (_line(1) | {"coefficients": torch.ones(1)}, "expected a number"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_and_takes_no_slot(line: dict[str, Tensor | float], message: str) -> None:
    table = _table()
    with pytest.raises(ValueError, match=message):
        table.acquire("a", line)
    table.check_integrity()
    assert table.is_filled
    assert table.acquire("b", _line(1)) == 0


def test_what_cannot_be_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a rank"):
        Table("low_rank", WIDTH, torch.float32)
    with pytest.raises(ValueError, match="has no rank"):
        Table("add", WIDTH, torch.float32, rank=3)
    with pytest.raises(ValueError, match="expected an operation"):
        Table("rotate", WIDTH, torch.float32)
    with pytest.raises(ValueError, match="expected a dtype"):
        Table("add", WIDTH, torch.float64)
    with pytest.raises(ValueError, match="sizes from 1"):
        Table("add", WIDTH, torch.float32, capacity=0)
    with pytest.raises(ValueError, match=r"slot 0 .* is free"):
        _table().release(0)


class TableLife(RuleBasedStateMachine):
    """Users come and go in any order; each always finds its own content at its slot."""

    @initialize(capacity=st.integers(1, 3))
    def start(self, capacity: int) -> None:
        self.table = _table(capacity)
        self.users: list[tuple[int, int]] = []

    @rule(content=st.integers(1, 6))
    def come(self, content: int) -> None:
        self.users.append((content, self.table.acquire(content, _line(content))))

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.users) - 1))
        self.table.release(self.users.pop(index)[1])

    @rule()
    def step(self) -> None:
        capacity, generation = self.table.capacity, self.table.generation
        has_moved = self.table.fill()
        assert has_moved == (self.table.capacity > capacity) == (self.table.generation > generation)
        for content, slot in self.users:
            assert self.table.holds(slot)
            assert self.table.columns["vectors"][slot].tolist() == [content] * WIDTH
            assert self.table.columns["coefficients"][slot] == content

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "table"):
            self.table.check_integrity()


TestTableLife = TableLife.TestCase
TestTableLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
