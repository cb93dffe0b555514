"""A trace that is recorded and not run."""

from __future__ import annotations

import pytest
from fake_model import HIDDEN, FakeModel

from nnsight_vllm.errors import OutOfOrderError, RecordError, ValueNotSetError


def test_a_scan_gives_shapes_and_runs_nothing() -> None:
    model = FakeModel()
    with model.scan("a b c"):
        h = model.model.layers[0].output[0]
        width = h.shape[-1]
        product = (h @ h.T).save()
    assert width == HIDDEN
    assert tuple(h.shape) == (3, HIDDEN) and tuple(product.shape) == (3, 3)
    assert model.__dict__["backend"].requests == []
    with pytest.raises(ValueNotSetError):
        _ = product.value


def test_a_scan_finds_what_a_trace_would() -> None:
    model = FakeModel()
    with pytest.raises(RecordError, match=r"index 8 is out of bounds.*test_scan.py:\d+"), model.scan("a b"):
        model.model.layers[0].output[0][:, HIDDEN] = 0
    with pytest.raises(OutOfOrderError), model.scan("a b"):
        second = model.model.layers[1].output[0].sum()
        model.model.layers[0].output[0][:] = second


def test_several_requests_are_scanned_each_by_itself() -> None:
    model = FakeModel()
    with model.scan() as tracer:
        with tracer.invoke("a b c"):
            one = model.model.norm.output
        with tracer.invoke("a"):
            other = model.model.norm.output
    assert (len(one.shape), one.shape[0], other.shape[0]) == (2, 3, 1)
