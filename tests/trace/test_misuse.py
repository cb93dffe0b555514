"""Values of the run given to Python's, numpy's and torch's own functions: recorded, or refused at the user's line."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import FakeModel

from nnsight_vllm.errors import ControlFlowError, RecordError, RefusedError, UnknownModuleError

PROMPT = "four words of prompt"
COMPLEX = torch.ones(8, dtype=torch.complex64)

delivered: Any = None
rewritten: Any = None


def run(code: str, model: FakeModel) -> object:
    with model.trace(PROMPT):
        names = {"model": model, "layers": model.model.layers, "h": model.model.layers[0].mlp.output}
        result: object = eval(code, {**names, "torch": torch, "np": np, "pickle": pickle, "COMPLEX": COMPLEX})
    return result


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("setattr(layers[1].mlp, 'output', True)", RecordError, "holds a tensor, got bool"),
        ("setattr(layers[1].mlp, 'output', COMPLEX)", RecordError, "complex64 can't be written into float32"),
        ("setattr(layers[1].mlp, 'output', h * COMPLEX)", RecordError, "complex64 can't be written into float32"),
        ("h.__setitem__(0, COMPLEX)", RecordError, "imaginary part"),
        ("h.copy_(COMPLEX)", RecordError, "imaginary part"),
        ("layers[0].output.shape", RefusedError, r"write model\.layers\.0\.output\[0\]\.shape"),
        ("layers[0].output.sum()", RefusedError, r"write model\.layers\.0\.output\[0\]\.sum"),
        ("layers[0].output * 2", RefusedError, r"write model\.layers\.0\.output\[0\] \* "),
        ("layers[0].output + 2", RefusedError, r"write model\.layers\.0\.output\[0\] \+ "),
        ("layers[1].inputs.shape", RefusedError, r"write model\.layers\.1\.inputs\[0\]\[0\]\.shape"),
        ("np.exp(h)", RefusedError, "numpy's exp"),
        ("np.add.reduce(h)", RefusedError, "numpy's add"),
        ("np.mean(h)", RecordError, "mean"),
        ("layers['1']", UnknownModuleError, "a number or a slice, got '1'"),
        ("layers[None]", UnknownModuleError, "a number or a slice, got None"),
        ("model._tree.module(None)", UnknownModuleError, "path is text.* got None"),
        ("torch.as_tensor(h)", ControlFlowError, r"a tensor already.*torch\.stack"),
        ("torch.tensor([h[0, 0]])", ControlFlowError, r"a tensor already.*torch\.stack"),
        ("pickle.dumps(h)", RefusedError, "can't be pickled while recording"),
        ("pickle.dumps({'h': h})", RefusedError, "can't be pickled while recording"),
        ("h.type()", RefusedError, r"\.dtype tells"),
        ("h.type('torch.HalfTensor')", RefusedError, r"takes a torch\.dtype"),
    ],
)
def test_what_cannot_be_done_with_a_value_says_why_and_where(code: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run(code, FakeModel())
    assert "<string>:1" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "recorded"),
    [
        ("round(h[0, 0], 2)", "py.round(%1, 2)"),
        ("round(h)", "py.round(%0, None)"),
        ("h.type(torch.float16)", "tensor.to(%0, float16)"),
        ("h.type(dtype=torch.float16)", "tensor.to(%0, float16)"),
        ("torch.clamp_(h, 0, 1)", "tensor.clamp_(%0, 0, 1) writes model.layers.0.mlp.output"),
        ("torch.clamp_(input=h, min=0)", "tensor.clamp_(%0, min=0) writes model.layers.0.mlp.output"),
        ("torch.relu_(h)", "torch.relu_(%0) writes model.layers.0.mlp.output"),
        ("np.ones(8) @ h.T", "py.matmul(%2, %1)"),
        ("np.float32(2) < h", "py.lt(%1, %0)"),
        ("np.float64(2) * h", "py.mul(2.0, %0)"),
        ("np.subtract(np.ones(8), h)", "py.sub(%1, %0)"),
    ],
)
def test_what_can_be_recorded_is(code: str, recorded: str) -> None:
    model = FakeModel()
    run(code, model)
    assert model.printed.splitlines()[-1].partition(" = ")[2] == recorded


def test_a_tuple_of_a_module_can_still_be_put_together_anew() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        output = model.model.layers[0].output
        assert len(output + (1,)) == len((1,) + output) == 2  # noqa: RUF005
        with pytest.raises(AttributeError):
            _ = output.no_attribute_of_a_tensor


def test_a_saved_value_is_pickled_and_rounded_as_itself() -> None:
    model = FakeModel(s0=torch.full((2,), 1.26))
    with model.trace(PROMPT):
        kept = [model.model.layers[0].output[0].save()]
    assert torch.equal(pickle.loads(pickle.dumps(kept))[0], torch.full((2,), 1.26))
    assert float(round(kept[0], 1)[0]) == pytest.approx(1.3)


def test_saved_names_that_a_function_declares_global_are_delivered() -> None:
    global delivered, rewritten
    model = FakeModel(s0=torch.ones(2), s1=torch.zeros(2))
    with model.trace(PROMPT):
        delivered = model.model.layers[0].output[0].save()
        rewritten = model.model.layers[1].output[0].save()
    assert isinstance(delivered, torch.Tensor)
    with model.trace(PROMPT):
        h = model.model.layers[0].output[0]
        if h.sum() > 0:
            h[:] = 0
        rewritten = h.save()
    assert isinstance(rewritten, torch.Tensor)
