"""The Triton kernels in the interpreter against the reference. `test_twins.py` runs this file in a process of its own.

By hand: `TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_twins.py`.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from faithful_interpreter import install
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
from nnsight_vllm.kernels.table import Table

assert triton.knobs.runtime.interpret, "expected TRITON_INTERPRET=1 in the environment"
install()

OPERATIONS = tuple(COLUMNS)
SHAPES = [(shape, dtype) for shape in ((0, 40), (1, 1), (1, 1100), (2, 2500)) for dtype in DTYPES]
SHAPES.append(((257, 6), torch.bfloat16))  # once: the interpreter takes milliseconds a row
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -3e-39, 6e-8, 65504.0, 3.3e38)


def _compare(operation: str, rows: Tensor, slots: Tensor, columns: dict[str, Tensor]) -> None:
    expected, actual = rows.clone(), rows.clone()
    edit(expected, operation, slots, columns, force="reference")
    edit(actual, operation, slots, columns, force="triton")
    if operation in ELEMENTWISE:
        assert same_bits(actual, expected)
    assert excess(actual, expected, sizes_of(rows, operation, slots, columns)) <= 1
    assert same_bits(actual[slots < 0], rows[slots < 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_twin_gives_what_the_reference_gives_whoever_shares_a_line(
    operation: str, pattern: str, dtype: torch.dtype
) -> None:
    slots = slots_like(pattern, 17, 20)
    _compare(operation, random_rows(17, 40, dtype), slots, random_columns(operation, 20, 40, dtype))


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_twin_gives_what_the_reference_gives_for_any_shape(
    operation: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    num_rows, width = shape
    slots = slots_like("uniform" if num_rows < 257 else "mixed", num_rows, 5)
    _compare(operation, random_rows(num_rows, width, dtype), slots, random_columns(operation, 5, width, dtype))


@pytest.mark.parametrize("rows_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_may_have_another_dtype_than_rows(
    operation: str, columns_dtype: torch.dtype, rows_dtype: torch.dtype
) -> None:
    columns = random_columns(operation, 4, 33, columns_dtype)
    _compare(operation, random_rows(6, 33, rows_dtype), slots_like("mixed", 6, 4), columns)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the numbers that this is about
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_infinite_undefined_and_subnormal_numbers_are_as_in_the_reference(operation: str, dtype: torch.dtype) -> None:
    values = torch.tensor(SPECIAL).to(dtype)
    rows = values.repeat(len(SPECIAL), 1)
    columns = random_columns(operation, len(SPECIAL), len(SPECIAL), dtype)
    for number in (1.0, 1.7, -0.3, 1e-6):
        if "vectors" in columns:
            columns["vectors"] = values[:, None].repeat(1, len(SPECIAL))
        if "coefficients" in columns:
            columns["coefficients"] = torch.full((len(SPECIAL),), number)
        expected, actual = rows.clone(), rows.clone()
        slots = torch.arange(len(SPECIAL), dtype=torch.int32)
        edit(expected, operation, slots, columns, force="reference")
        edit(actual, operation, slots, columns, force="triton")
        assert same_bits(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("operation", ["project_out", "clamp", "norm_matched_add"])
def test_what_is_undefined_is_nan_in_both(operation: str) -> None:
    rows = torch.ones(2, 5)
    columns = random_columns(operation, 1, 5, torch.float32)
    columns.update({name: torch.zeros(1, 5) for name in columns if name == "directions"})
    columns.update({name: -torch.ones(1, 5) for name in columns if name == "vectors"})
    if "coefficients" in columns:
        columns["coefficients"] = torch.ones(1)
    for force in ("reference", "triton"):
        actual = rows.clone()
        edit(actual, operation, torch.tensor([0, -1], dtype=torch.int32), columns, force=force)
        assert actual[0].isnan().all()
        assert same_bits(actual[1], rows[1])


@pytest.mark.parametrize("operation", ["clamp", "sae_clamp"])
def test_a_row_with_nothing_to_change_keeps_its_bits(operation: str) -> None:
    rows, columns = unchanged(operation)
    actual = rows.clone()
    edit(actual, operation, torch.tensor([0, -1], dtype=torch.int32), columns, force="triton")
    assert same_bits(actual, rows)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_in_wider_memory_leave_the_rest_of_it_alone(operation: str) -> None:
    memory = random_rows(5, 100, torch.bfloat16)
    before = memory.clone()
    rows, slots = memory[:, 7:44], slots_like("uniform", 5, 3)
    columns = random_columns(operation, 3, 37, torch.bfloat16)
    alone = rows.contiguous()
    edit(alone, operation, slots, columns, force="triton")
    edit(rows, operation, slots, columns, force="triton")
    assert same_bits(rows, alone)
    assert same_bits(memory[:, :7], before[:, :7])
    assert same_bits(memory[:, 44:], before[:, 44:])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_has_the_same_bits_alone(operation: str) -> None:
    rows, slots = random_rows(6, 1100, torch.float32), slots_like("uniform", 6, 3)
    columns = random_columns(operation, 3, 1100, torch.float32)
    together = rows.clone()
    edit(together, operation, slots, columns, force="triton")
    for row in range(6):
        alone = rows[row : row + 1].clone()
        edit(alone, operation, slots[row : row + 1], columns, force="triton")
        assert same_bits(alone[0], together[row])


def test_edits_of_tables_run_in_order_as_in_the_reference() -> None:
    rows = random_rows(8, 40, torch.bfloat16)
    expected, actual = rows.clone(), rows.clone()
    for seed, operation in enumerate(["scale", "add", "replace", "add", "scale", "ablate", "add"]):
        table = Table(operation, 40, torch.bfloat16)
        columns = random_columns(operation, 2, 40, torch.bfloat16, seed)
        for number in range(2):
            table.acquire(number, {name: c[number] if c.ndim > 1 else float(c[number]) for name, c in columns.items()})
        table.fill()
        slots = torch.tensor([1] * seed + [0, 0] + [-1] * 8, dtype=torch.int32)[:8]
        edit(expected, operation, slots, table.columns, force="reference")
        edit(actual, operation, slots, table.columns, force="triton")
    assert same_bits(actual, expected)
    assert not same_bits(actual, rows)


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_a_rank_need_not_be_a_power_of_two(rank: int) -> None:
    columns = random_columns("low_rank", 3, 70, torch.bfloat16, rank=rank)
    _compare("low_rank", random_rows(4, 70, torch.bfloat16), slots_like("uniform", 4, 3), columns)


@triton.jit  # type: ignore[untyped-decorator]
def _cast_kernel(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_interpreter_converts_as_torch_does(name: str) -> None:
    dtype = getattr(torch, name)
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    _cast_kernel[(1,)](narrow, wide, SIZE=2**16)
    assert same_bits(wide, narrow.float())
    values = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    values[: 2**15] = values[: 2**15] & ~0xFFFF | 0x8000  # halfway between two bfloat16 numbers
    rounded = torch.empty(2**16, dtype=dtype)
    _cast_kernel[(1,)](values.view(torch.float32), rounded, SIZE=2**16)
    assert same_bits(rounded, values.view(torch.float32).to(dtype))
