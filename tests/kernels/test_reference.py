"""The reference against a slow loop over rows: the torch expression that a user writes, or float64 where dots are summed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_edits import (
    DTYPES,
    ELEMENTWISE,
    PATTERNS,
    excess,
    random_columns,
    random_rows,
    same_bits,
    sizes_of,
    slots_like,
    unchanged,
)
from torch import Tensor

from nnsight_vllm.kernels.columns import COLUMNS
from nnsight_vllm.kernels.dispatch import edit

Line = dict[str, Tensor]
Edit = tuple[str, Line, Tensor]


def _number(line: Line, name: str) -> float:
    return float(line[name])


def _norm(vector: Tensor) -> Tensor:
    return torch.dot(vector, vector).sqrt()


def _project_out(h: Tensor, line: Line) -> Tensor:
    d = line["directions"]
    share = torch.dot(h, d) / torch.dot(d, d)
    return h - share * _number(line, "coefficients") * d


def _clamp(h: Tensor, line: Line) -> Tensor:
    unit = line["directions"] / _norm(line["directions"])
    component = torch.dot(h, unit)
    bounded = component.clamp(_number(line, "lows"), _number(line, "highs"))
    return h + (bounded - component) * unit


def _norm_matched_add(h: Tensor, line: Line) -> Tensor:
    moved = h + _number(line, "coefficients") * line["vectors"]
    return moved * (_norm(h) / _norm(moved))


def _low_rank(h: Tensor, line: Line) -> Tensor:
    return h + _number(line, "coefficients") * (line["ups"] @ (line["downs"] @ h))


def _sae_clamp(h: Tensor, line: Line) -> Tensor:
    activation = torch.relu(line["encoders"] @ h + _number(line, "biases"))
    return h + (_number(line, "targets") - activation) * line["decoders"]


# As a user writes them, in the dtypes of the rows and of the vectors.
EXACT: dict[str, Callable[[Tensor, Line], Tensor]] = {
    "add": lambda h, line: h.clone().add_(_number(line, "coefficients") * line["vectors"]),
    "scale": lambda h, line: h.clone().mul_(_number(line, "coefficients")),
    "replace": lambda h, line: h.clone().copy_(line["vectors"]),
    "ablate": lambda h, line: h.clone().zero_(),
}
# In float64, rounded once.
DOTS: dict[str, Callable[[Tensor, Line], Tensor]] = {
    "project_out": _project_out,
    "clamp": _clamp,
    "norm_matched_add": _norm_matched_add,
    "low_rank": _low_rank,
    "sae_clamp": _sae_clamp,
}


def _naive(rows: Tensor, operation: str, columns: Line, slots: Tensor) -> Tensor:
    result = rows.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        line = {name: values[slot] for name, values in columns.items()}
        if operation in EXACT:
            result[row] = EXACT[operation](rows[row], line)
        else:
            exact = {name: value.double() for name, value in line.items()}
            result[row] = DOTS[operation](rows[row].double(), exact).to(rows.dtype)
    return result


def _check(rows: Tensor, operation: str, columns: Line, slots: Tensor) -> Tensor:
    actual = rows.clone()
    edit(actual, operation, slots, columns, force="reference")
    expected = _naive(rows, operation, columns, slots)
    assert same_bits(actual[slots < 0], rows[slots < 0])
    if operation in EXACT:
        assert same_bits(actual, expected)
    else:
        assert excess(actual, expected, sizes_of(rows, operation, slots, columns)) <= 1
    return actual


def test_every_operation_is_compared() -> None:
    assert set(EXACT) == set(ELEMENTWISE)
    assert set(EXACT) | set(DOTS) == set(COLUMNS)


@pytest.mark.parametrize("rows_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", COLUMNS)
def test_an_operation_is_the_users_expression_row_by_row(
    operation: str, columns_dtype: torch.dtype, rows_dtype: torch.dtype
) -> None:
    columns = random_columns(operation, 5, 333, columns_dtype)
    for pattern in PATTERNS:
        _check(random_rows(33, 333, rows_dtype), operation, columns, slots_like(pattern, 33, 5))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (257, 1), (257, 48), (3, 4100), (70, 4096)], ids=str)
@pytest.mark.parametrize("operation", COLUMNS)
def test_any_shape_is_fine(operation: str, shape: tuple[int, int]) -> None:
    num_rows, width = shape
    columns = random_columns(operation, 7, width, torch.bfloat16)
    _check(random_rows(num_rows, width, torch.bfloat16), operation, columns, slots_like("mixed", num_rows, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_difference_is_an_add_of_the_negative(dtype: torch.dtype) -> None:
    rows, vector = random_rows(1, 500, dtype), random_rows(1, 500, dtype, seed=1)
    actual = rows.clone()
    columns = {"vectors": vector, "coefficients": torch.tensor([-0.7])}
    edit(actual, "add", torch.zeros(1, dtype=torch.int32), columns, force="reference")
    assert same_bits(actual, rows - 0.7 * vector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_rounded_before_the_sum(dtype: torch.dtype) -> None:
    rows, columns = random_rows(9, 500, dtype), random_columns("add", 1, 500, dtype)
    slots = torch.zeros(9, dtype=torch.int32)
    actual = _check(rows, "add", columns, slots)
    fused = (rows.float() + columns["coefficients"] * columns["vectors"].float()).to(dtype)
    assert not same_bits(actual, fused)


@pytest.mark.parametrize("operation", ["clamp", "sae_clamp"])
def test_a_row_with_nothing_to_change_keeps_its_bits(operation: str) -> None:
    rows, columns = unchanged(operation)
    assert same_bits(_check(rows, operation, columns, torch.tensor([0, -1], dtype=torch.int32)), rows)


def test_a_clamps_bounds_hold_and_may_be_infinite() -> None:
    rows, columns = random_rows(40, 64, torch.float32), random_columns("clamp", 1, 64, torch.float32)
    columns |= {"lows": torch.tensor([-float("inf")]), "highs": torch.tensor([0.25])}
    actual = _check(rows, "clamp", columns, torch.zeros(40, dtype=torch.int32))
    unit = columns["directions"][0] / _norm(columns["directions"][0])
    assert (actual @ unit).max() < 0.25 + 1e-5
    inside = rows @ unit <= 0.25 - 1e-5
    assert inside.any()
    assert same_bits(actual[inside], rows[inside])


@pytest.mark.parametrize("operation", COLUMNS)
@pytest.mark.parametrize("width", [48, 4096])
def test_a_row_has_the_same_bits_alone(operation: str, width: int) -> None:
    rows, slots = random_rows(33, width, torch.float32), slots_like("mixed", 33, 4)
    columns = random_columns(operation, 4, width, torch.float32)
    together = _check(rows, operation, columns, slots)
    for row in range(33):
        alone = rows[row : row + 1].clone()
        edit(alone, operation, slots[row : row + 1], columns, force="reference")
        assert same_bits(alone[0], together[row])


@st.composite
def _programs(draw: st.DrawFn) -> tuple[Tensor, list[Edit]]:
    num_rows, width = draw(st.integers(0, 9)), draw(st.integers(1, 40))
    num_slots, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
    edits = []
    for operation in draw(st.lists(st.sampled_from(sorted(COLUMNS)), max_size=6)):
        columns = random_columns(
            operation,
            num_slots,
            width,
            draw(st.sampled_from(DTYPES)),
            draw(st.integers(0, 999)),
            draw(st.integers(1, 5)),
        )
        slots = draw(st.lists(st.integers(-1, num_slots - 1), min_size=num_rows, max_size=num_rows))
        edits.append((operation, columns, torch.tensor(slots, dtype=torch.int32)))
    return random_rows(num_rows, width, dtype, draw(st.integers(0, 999))), edits


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_programs())
def test_edits_of_one_row_happen_in_order(program: tuple[Tensor, list[Edit]]) -> None:
    rows, edits = program
    stepwise, at_once = rows.clone(), rows.clone()
    for operation, columns, slots in edits:
        stepwise = _check(stepwise, operation, columns, slots)
        edit(at_once, operation, slots, columns, force="reference")
    assert same_bits(at_once, stepwise)
