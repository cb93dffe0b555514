"""`nnsight_vllm.edits` on plain tensors, and what a trace records of it."""

from __future__ import annotations

import math

import pytest
import torch
from fake_model import HIDDEN, FakeModel

from nnsight_vllm import edits
from nnsight_vllm.errors import RecordError


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_project_out_leaves_nothing_along_the_direction() -> None:
    h, d = rows(3, 8), rows(8)
    assert edits.project_out(h, d) is h
    assert (h @ d).abs().max() < 1e-5
    other = rows(3, 8)
    edits.project_out(other, d, 0.5)
    torch.testing.assert_close(other @ d, rows(3, 8) @ d / 2)


def test_clamp_bounds_the_component_and_leaves_other_rows() -> None:
    h, d = rows(64, 8), rows(8) * 3
    before = h.clone()
    edits.clamp(h, d, low=-0.5, high=0.25)
    component = h @ d / d.norm()
    assert component.min() > -0.5 - 1e-5 and component.max() < 0.25 + 1e-5
    inside = ((before @ d / d.norm()) - 0.0).clamp(-0.49, 0.24) == before @ d / d.norm()
    assert inside.any() and torch.equal(h[inside], before[inside])
    edits.clamp(h, d)  # no bound: nothing to do
    assert h.isfinite().all()


def test_norm_matched_add_keeps_the_length() -> None:
    h, v = rows(3, 8), rows(8)
    lengths = h.norm(dim=-1)
    edits.norm_matched_add(h, v, 5.0)
    torch.testing.assert_close(h.norm(dim=-1), lengths)
    assert (torch.cosine_similarity(h, v[None], dim=-1) > 0.5).all()


def test_low_rank_and_features_follow_their_formulas() -> None:
    h, down, up = rows(3, 8), rows(2, 8), rows(8, 2)
    expected = h + 0.5 * (h @ down.T) @ up.T
    torch.testing.assert_close(edits.low_rank(h, down, up, 0.5), expected)
    h, encoder, decoder = rows(3, 8), rows(8), rows(16)[8:]
    expected = h + (4.0 - (h @ encoder + 0.1).relu())[:, None] * decoder
    torch.testing.assert_close(edits.sae_clamp(h, encoder, decoder, 4.0, bias=0.1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_leading_shape_and_any_memory(dtype: torch.dtype) -> None:
    d = rows(8)
    expected = edits.project_out(rows(6, 8, dtype=dtype), d)
    torch.testing.assert_close(edits.project_out(rows(6, 8, dtype=dtype).reshape(2, 3, 8), d).reshape(6, 8), expected)
    torch.testing.assert_close(edits.project_out(rows(6, 8, dtype=dtype)[1], d), expected[1])
    scattered = rows(6, 8, dtype=dtype).t().contiguous().t()
    torch.testing.assert_close(edits.project_out(scattered, d), expected)
    assert edits.project_out(rows(0, 8, dtype=dtype), d).shape == (0, 8)


def test_a_trace_records_one_operation_on_the_site() -> None:
    model = FakeModel()
    with model.trace("a b c"):
        h = model.model.layers[0].output[0]
        assert edits.clamp(h, rows(HIDDEN), high=2.0) is h
        edits.project_out(model.model.layers[1].mlp.output[-1], h[-1].clone())
    assert "edit.clamp_(%0, %1, -inf, 2.0) writes model.layers.0.output" in model.printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda h: edits.project_out(h, torch.ones(HIDDEN + 1)), r"expected directions \[8\]; got torch.float32 \[9\]"),
        (lambda h: edits.low_rank(h, torch.ones(2, HIDDEN), torch.ones(HIDDEN, 3)), r"expected ups \[8, 2\]"),
        (
            lambda h: edits.clamp(h, torch.ones(HIDDEN), torch.ones(2)),
            r"expected a number for lows; got torch.float32 \[2\]",
        ),
        (lambda h: edits.project_out(h, 2.0), r"expected directions \[8\]; got 2.0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_line(wrong: object, message: str) -> None:
    model = FakeModel()
    with pytest.raises(RecordError, match=message), model.trace("a b"):
        wrong(model.model.layers[0].output[0])  # type: ignore[operator]


def test_plain_tensors_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"expected directions \[8\]"):
        edits.project_out(rows(2, 8), rows(3))
    with pytest.raises(TypeError, match="edits a tensor"):
        edits.project_out(torch.ones(2, 8, dtype=torch.int64), rows(8))
    with pytest.raises(TypeError, match="expected a number for coefficients"):
        edits.project_out(rows(2, 8), rows(8), rows(8))
    h = edits.project_out(rows(2, 8), rows(8), math.nan)
    assert h.isnan().all()
