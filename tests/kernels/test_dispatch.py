"""Who edits the rows, and what is refused before anyone does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from row_edits import random_columns, random_rows

from nnsight_vllm.kernels.dispatch import VARIABLE, added, choose, edit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_device_chooses_unless_the_environment_or_the_caller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert (choose(CPU), choose(CUDA)) == ("reference", "triton")
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose(CUDA) == "reference"
    assert choose(CUDA, "triton") == "triton"
    monkeypatch.setenv(VARIABLE, "numpy")
    with pytest.raises(ValueError, match="got 'numpy'"):
        choose(CPU)


def test_the_reference_loads_neither_triton_nor_vllm() -> None:
    code = (
        "import torch, sys; from nnsight_vllm.kernels.dispatch import edit\n"
        "edit(torch.ones(2, 3), 'ablate', torch.zeros(2, dtype=torch.int32), {})\n"
        "print([m for m in ('triton', 'vllm') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stderr


def test_triton_on_a_cpu_without_its_interpreter_is_refused_with_advice() -> None:
    code = (
        "import torch; from nnsight_vllm.kernels.dispatch import edit\n"
        "edit(torch.ones(2, 3), 'ablate', torch.zeros(2, dtype=torch.int32), {}, force='triton')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "set TRITON_INTERPRET=1" in run.stderr


def test_what_does_not_fit_is_refused() -> None:
    rows, columns = random_rows(4, 6, torch.float32), random_columns("add", 2, 6, torch.float32)
    slots = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="H contiguous"):
        edit(random_rows(6, 4, torch.float32).T, "add", slots, columns)
    with pytest.raises(ValueError, match="of a dtype out of"):
        edit(rows.double(), "add", slots, columns)
    with pytest.raises(ValueError, match=r"int32 slots \[4\]"):
        edit(rows, "add", slots.long(), columns)
    with pytest.raises(ValueError, match=r"int32 slots \[4\]"):
        edit(rows, "add", slots[:3], columns)
    with pytest.raises(ValueError, match="expected the columns"):
        edit(rows, "scale", slots, columns)
    with pytest.raises(ValueError, match=r"add.vectors: .* of width 6"):
        edit(rows, "add", slots, columns | {"vectors": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"add.coefficients"):
        edit(rows, "add", slots, columns | {"coefficients": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2, 2, 2, 2], [1, 1, 0, 1]])
def test_what_is_gathered_once_adds_the_bits_of_the_edit(
    slots: list[int], dtype: torch.dtype, vectors: torch.dtype
) -> None:
    rows, columns, at = random_rows(4, 6, dtype), random_columns("add", 4, 6, vectors), torch.tensor(slots).int()
    whole = added(at, columns)
    assert whole is not None and whole.shape == (1 if len(set(slots)) == 1 else 4, 6)
    expected = rows.clone()
    edit(expected, "add", at, columns)
    assert torch.equal(rows.add_(whole), expected)


def test_rows_without_a_line_and_triton_need_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, slots = random_columns("add", 2, 6, torch.float32), torch.tensor([0, 1]).int()
    assert added(torch.tensor([0, -1]).int(), columns) is None
    monkeypatch.setenv(VARIABLE, "triton")
    assert added(slots, columns) is None
