"""Saved values reach the user's names wherever the block stands. No engine."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from fake_model import FakeModel

from nnsight_vllm.errors import ControlFlowError, RecordError, ValueNotSetError

VALUE = torch.arange(3.0)
PROMPT = "two words"


def test_in_a_closure_the_outer_name_is_set_too() -> None:
    model = FakeModel(s0=VALUE)
    outer = None

    def inner() -> None:
        nonlocal outer
        with model.trace(PROMPT):
            outer = model.model.layers[0].output[0].save()
        assert isinstance(outer, torch.Tensor)

    inner()
    assert isinstance(outer, torch.Tensor)


def test_at_module_level_and_in_exec_without_source() -> None:
    names: dict[str, Any] = {"model": FakeModel(s0=VALUE)}
    exec("with model.trace('a b'):\n    x = model.model.layers[0].output[0].save()\n", names)
    assert torch.equal(names["x"], VALUE)
    with pytest.raises(ControlFlowError, match=r"truth of this value isn't known while recording \(.*source"):
        exec("with model.trace('a b'):\n    if model.model.layers[0].output[0].sum() > 0:\n        y = 1\n", names)


def test_in_a_block_with_control_flow_the_body_runs_once() -> None:
    model, runs = FakeModel(s0=VALUE), []
    with model.trace(PROMPT):
        runs.append(1)
        h = model.model.layers[0].output[0]
        if h.sum() > 0:
            runs.append(2)
            h[:] = 0
        else:
            runs.append(3)
        x = h.save()
    assert runs == [1, 2, 3]
    assert isinstance(x, torch.Tensor)


def test_a_value_saved_in_the_branch_that_ran_reaches_its_name() -> None:
    model = FakeModel(s1=VALUE)  # s0 is saved in the branch that didn't run
    with model.trace(PROMPT):
        h = model.model.layers[0].output[0]
        if h.sum() > 0:
            then = h.save()
        else:
            orelse = h.save()
    assert torch.equal(orelse, VALUE)
    with pytest.raises((ValueNotSetError, RecordError)):
        print(then)


def test_in_a_method_and_in_several_invokes_of_a_loop() -> None:
    class Study:
        def __init__(self) -> None:
            self.model = FakeModel(s0=VALUE)

        def run(self) -> list[Any]:
            found = []
            with self.model.trace() as tracer:
                for prompt in ("a", "a b"):
                    with tracer.invoke(prompt):
                        h = self.model.model.layers[0].output[0]
                        if h.sum() > 0:
                            h[:] = 0
                        found.append(h.save())
            return found

    assert [torch.equal(value.value, VALUE) for value in Study().run()] == [True, True]


def test_in_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    shell_module = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is a development dependency")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own there
    shell = shell_module.InteractiveShell.instance()
    shell.push({"model": FakeModel(s0=VALUE)})
    result = shell.run_cell(
        "with model.trace('a b'):\n"
        "    h = model.model.layers[0].output[0]\n"
        "    if h.sum() > 0:\n"
        "        h[:] = 0\n"
        "    x = h.save()\n"
    )
    result.raise_error()
    assert torch.equal(shell.user_ns["x"], VALUE)
    shell_module.InteractiveShell.clear_instance()


def test_an_exception_in_a_rewritten_block_shows_the_users_line() -> None:
    model = FakeModel()
    with pytest.raises(ZeroDivisionError) as caught, model.trace(PROMPT):
        if model.model.layers[0].output[0].sum() > 0:
            _ = 1 / 0
    assert "_ = 1 / 0" in str(caught.traceback[-1].statement)
