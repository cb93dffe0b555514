"""`model.edit`, `model.edits`, `clear_edits` and `edits=[...]` while recording: which graphs a request carries, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_model import HIDDEN, FakeModel

import nnsight_vllm as nv
from nnsight_vllm.errors import (
    AdmissionError,
    ControlFlowError,
    InterventionError,
    OutOfOrderError,
    RecordError,
    RefusedError,
    UnknownEditError,
    ValueNotSetError,
)
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.graph.text import render
from nnsight_vllm.trace.backend import Request, Sample

ADD = """\
iterations %1 in 0:
  %2 = read model.layers.0.output
  %3 = py.iadd(%2, 1) writes model.layers.0.output"""
SCALE = """\
iterations %1 in 0:
  %2 = read model.layers.1.output
  %3 = py.imul(%2, 2) writes model.layers.1.output"""


def adding(model: Any, name: str | None = None, **more: Any) -> Any:
    with model.edit(name, **more) as edited:
        h = model.model.layers[0].output[0]
        h += 1
    return edited


def scaling(model: Any, name: str | None = None, **more: Any) -> Any:
    with model.edit(name, **more) as edited:
        h = edited.model.layers[1].output[0]
        h *= 2
    return edited


def sent(model: Any, **arguments: Any) -> list[str]:
    """The graphs of a request that does nothing of its own."""
    with model.trace("a b", **arguments):
        pass
    return texts(requests(model)[0])


def requests(model: Any) -> list[Request]:
    found: list[Request] = model.__dict__["backend"].requests
    return found


def texts(request: Request) -> list[str]:
    return [render(decode(graph)) for graph in request.graphs]


def test_an_edited_model_runs_with_its_edit_and_the_model_stays_as_it_is() -> None:
    model = FakeModel()
    edited = adding(model)
    assert sent(edited) == [ADD]
    assert sent(model) == []
    with edited.trace("a b"):
        edited.model.layers[2].output[0].save()
    (request,) = requests(model)
    assert texts(request) == [ADD, "%0 = read model.layers.2.output @0\nsave s0 = %0"]
    assert request.graph is not None and request.edits and not request.after


def test_edits_compose_in_their_order() -> None:
    model = FakeModel()
    assert sent(scaling(adding(model))) == [ADD, SCALE]
    assert sent(adding(scaling(model))) == [SCALE, ADD]
    assert sent(model) == []


def test_edits_in_place_stay_until_they_are_cleared() -> None:
    model = FakeModel()
    before = adding(model)
    assert adding(model, inplace=True) is model
    after = scaling(model)
    assert scaling(model, inplace=True) is model
    assert sent(model) == [ADD, SCALE]
    model.clear_edits()
    assert sent(model) == []
    assert [sent(before), sent(after)] == [[ADD], [ADD, SCALE]]
    after.clear_edits()
    assert sent(after) == []


def test_any_request_may_ask_for_named_edits() -> None:
    model = FakeModel()
    adding(model, "calm")
    loud = scaling(model, "loud")
    assert list(model.edits) == list(loud.edits) == ["calm", "loud"] and "calm" in model.edits
    assert sent(model) == []
    assert sent(model, edits=["loud", "calm"]) == [SCALE, ADD]
    assert sent(model, edits="calm") == sent(model, edits=[model.edits["calm"]]) == [ADD]
    assert sent(loud, edits=["calm", "calm"]) == [SCALE, ADD, ADD]
    assert str(model.edits["calm"]) == ADD and "'calm'" in repr(model.edits)


def test_each_invoke_asks_for_its_own() -> None:
    model = FakeModel()
    adding(model, "calm")
    scaling(model, "loud")
    with model.trace(edits=["calm"]) as tracer:
        with tracer.invoke("a"):
            pass
        with tracer.invoke("b", edits=["loud"]):
            pass
        with tracer.invoke("c", edits=[]):
            pass
    assert [texts(request) for request in requests(model)] == [[ADD], [SCALE], []]


def test_a_name_can_be_given_anew_and_taken_away() -> None:
    model = FakeModel()
    first = adding(model, "calm")
    scaling(model, "calm")
    assert sent(model, edits=["calm"]) == [SCALE] and sent(first) == [ADD]
    del model.edits["calm"]
    assert len(model.edits) == 0 and sent(first) == [ADD]
    with pytest.raises(UnknownEditError, match=r"no edit is named 'calm' \(there are none"):
        sent(model, edits=["calm"])
    with pytest.raises(KeyError):
        del model.edits["calm"]


def test_an_unknown_name_is_refused_with_the_nearest_and_the_line() -> None:
    model = FakeModel()
    for name in ("calm", "calmer", "loud"):
        adding(model, name)
    message = r"^no edit is named 'clam' \(nearest: calm, calmer\); .*test_editing.py:\d+"
    with pytest.raises(AdmissionError, match=message), model.trace() as tracer, tracer.invoke("a", edits=["clam"]):
        pass
    with pytest.raises(UnknownEditError), model.trace() as tracer, tracer.invoke("a", edits=["nothing like it"]):
        pass
    for start in (model.trace, model.scan):
        with pytest.raises(UnknownEditError):
            start("a", edits=["clam"])
    with pytest.raises(RefusedError, match="asked for by name"):
        model.trace("a", edits=[5])
    assert model.edits.get("clam") is None


@pytest.mark.parametrize("name", ["", 5])
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(RefusedError, match="an edit's name is a text"):
        FakeModel().edit(name)


def test_the_tensors_of_edits_go_with_the_requests_that_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    one, two = torch.ones(HIDDEN), torch.zeros(HIDDEN)
    with model.edit() as edited:
        model.model.layers[0].output[0][:] += one
    backend = model.__dict__["backend"]
    run, came = backend.run, list[dict[str, bytes]]()

    def watched(requests: Any, tensors: dict[str, bytes]) -> Any:
        came.append(tensors)
        return run(requests, tensors)

    monkeypatch.setattr(backend, "run", watched)
    one += 5  # the edit has the value of its time
    with edited.trace("a"):
        model.model.layers[0].output[0][:] += two
    (request,) = requests(model)
    assert len(request.constants) == 2 and set(came[0]) == request.constants
    with model.trace("a"):
        model.model.layers[0].output[0][:] += two
    assert len(came[1]) == 1


def test_what_a_block_that_failed_should_have_made_is_not_run_unedited() -> None:
    model = FakeModel()
    with pytest.raises(ZeroDivisionError):
        with model.edit("calm") as edited:
            model.model.layers[0].output[0][:] += 1 / 0
    with pytest.raises(RefusedError, match=r"this edited model has no edit: its block at .*test_editing.py:\d+"):
        edited.trace("a")
    with pytest.raises(RefusedError, match="has no edit"):
        edited.edit()
    assert "calm" not in model.edits
    assert sent(model) == []


@pytest.mark.parametrize("what", ["save", "log", "stop", "list", "tuple", "nv.log"])
def test_an_edit_sends_nothing_home(what: str) -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match=r"runs in every request that uses it, so it can't .*test_editing.py:\d+"):
        with model.edit():
            h = model.model.layers[0].output[0]
            h += 1
            match what:
                case "save":
                    h.save()
                case "log":
                    nv.log(h)
                case "stop":
                    h.stop()
                case "list":
                    nv.list().save()
                case "tuple":
                    model.model.layers[0].output.save()
                case "nv.log":
                    nv.log("here")


def test_an_edit_that_changes_nothing_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match=r"this edit changes nothing.*test_editing.py:\d+"):
        with model.edit():
            h = model.model.layers[0].output[0]
            h = h * 2
    with pytest.raises(RefusedError, match="changes nothing"):
        with model.edit():
            pass


def test_order_is_that_of_traces() -> None:
    model = FakeModel()
    with pytest.raises(OutOfOrderError, match=r"test_editing.py:\d+"):
        with model.edit():
            late = model.model.layers[1].output[0].sum()
            model.model.layers[0].output[0][:] = late


def test_the_prompts_length_is_not_known() -> None:
    model = FakeModel()
    with model.edit() as edited:
        h = model.model.layers[0].output[0]
        h[:] = torch.ones(HIDDEN) * h.shape[0]
        assert h.shape[1] == HIDDEN
    assert "py.size(%2, 0)" in sent(edited)[0]
    with model.edit() as edited, edited.iter[0]:
        h = model.model.layers[0].output[0]
        h[40:50] = h.shape[0]
    assert "py.size" in sent(edited)[0]
    with pytest.raises(RecordError, match="index 3 is out of bounds"):
        with model.edit():
            model.model.layers[0].output[0][3] = 0


def test_an_edit_may_be_narrowed_to_iterations() -> None:
    model = FakeModel()
    with model.edit() as edited:
        with edited.iter[1:4]:
            model.model.layers[0].output[0][-1] = 0
        with edited.iter[6]:
            model.model.layers[0].output[0][-1] = 1
    lines = sent(edited)[0].splitlines()
    assert [line for line in lines if line.startswith("iterations")] == ["iterations %3 in 1:4", "iterations %7 in 6:7"]
    with model.edit() as edited, model.model.layers[0].all():
        model.model.layers[0].output[0][:] *= 2
    assert sent(edited)[0].startswith("iterations %3 in 0:")


def test_iterations_and_what_applies_in_all_of_them_are_two_edits() -> None:
    model = FakeModel()
    with pytest.raises(
        RefusedError, match=r"put what stands before this block into an edit of its own; .*test_editing.py:\d+"
    ):
        with model.edit() as edited:
            model.model.layers[0].output[0][:] = 0
            with edited.iter[1:]:
                model.model.layers[0].output[0][:] = 1
    with pytest.raises(RefusedError, match=r"belongs to none.*test_editing.py:\d+"):
        with model.edit() as edited:
            with edited.iter[:1]:
                model.model.layers[0].output[0][:] = 1
            model.model.layers[1].output[0][:] = 0
    with pytest.raises(RefusedError, match="next"):
        with model.edit():
            model.model.layers[0].next().output[0][:] = 0


def test_control_flow_over_values_is_recorded() -> None:
    model = FakeModel()
    with model.edit() as edited:
        h = model.model.layers[0].output[0]
        if h[-1].norm() > 3:
            h *= 0.5
        else:
            h += 1
    assert "cond" in sent(edited)[0]
    assert edited is not model and sent(model) == []


def test_a_block_left_early_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(ControlFlowError, match="left early"):
        with model.edit() as edited:
            for _ in edited.iter[1:3]:
                model.model.layers[0].output[0][:] = 1
                break


def test_edits_and_traces_do_not_nest() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match="can't be opened inside"):
        with model.trace("a"):
            with model.edit():
                pass
    with pytest.raises(RefusedError, match="can't be opened inside"):
        with model.edit():
            with model.edit():
                pass
    with pytest.raises(RefusedError, match=r"can't be opened inside|has no edit"):
        with model.edit() as edited:
            with edited.trace("a"):
                pass
    assert sent(model) == []  # nothing is left open


def test_values_of_an_edit_are_its_own() -> None:
    model = FakeModel()
    with model.edit() as edited:
        h = model.model.layers[0].output[0]
        h += 1
    with pytest.raises(RefusedError), edited.trace("a"):
        model.model.layers[1].output[0][:] = h
    with pytest.raises(ValueNotSetError):
        _ = h.value


def test_a_failure_names_the_line_of_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    edited = adding(adding(model, "calm"))
    backend = model.__dict__["backend"]
    run = backend.run
    where = [0]

    def failing(requests: Any, tensors: Any) -> Any:
        outcomes = run(requests, tensors)
        outcomes[0].samples = [Sample(failure=Failure("ValueError", "bad", 3, False, where[0]))]
        return outcomes

    monkeypatch.setattr(backend, "run", failing)
    for number, expected in enumerate(
        [r"h \+= 1, in the edit 'calm'$", r"h \+= 1$", r"\.clone\(\)\.save\(\)$", "^ValueError: bad$"]
    ):
        where[0] = number
        with pytest.raises(InterventionError, match=expected):
            with edited.trace("a") as tracer:
                tracer.cache(model.model.norm)
                model.model.layers[0].output[0].clone().save(), model.model.layers[0].output[0].clone().save()
