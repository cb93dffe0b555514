"""Sessions, as they are recorded. No engine."""

from __future__ import annotations

from typing import Any

import pytest
from fake_model import FakeBackend, FakeModel

import nnsight_vllm as nv
from nnsight_vllm.errors import ControlFlowError, InterventionError, RefusedError, ValueNotSetError
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.trace.backend import Outcome, Request, Sample
from nnsight_vllm.trace.session import Session

PROMPT = "four words of prompt"


def session(model: FakeModel) -> Session:
    return Session(backend_of(model))


def backend_of(model: FakeModel) -> FakeBackend:
    backend: FakeBackend = model.__dict__["backend"]
    return backend


def graphs(model: FakeModel) -> list[list[str]]:
    return [[line.strip() for line in part.splitlines()] for part in model.printed.split("\n\n")]


def test_the_traces_of_a_session_run_together_at_its_end() -> None:
    model = FakeModel(s0="the value")
    with session(model):
        with model.trace(PROMPT):
            first = model.model.layers[0].output[0].save()
        assert not backend_of(model).requests
        with pytest.raises(ValueNotSetError):
            _ = first.value
        with model.trace() as tracer:
            with tracer.invoke(PROMPT):
                second = model.model.layers[1].output[0].save()
    assert len(backend_of(model).requests) == 2
    assert first == "the value" and second == "the value"


def test_a_value_of_one_trace_is_used_in_the_next() -> None:
    model = FakeModel()
    with session(model):
        with model.trace(PROMPT):
            h = model.model.layers[2].output[0][-1, :]
        with model.trace("other words of prompt"):
            model.model.layers[1].output[0][-1, :] = h[:]
    assert graphs(model) == [
        ["%0 = read model.layers.2.output @0", "%1 = py.getitem(%0, (-1, :))", "export 0.0 = %1"],
        [
            "%0 = import 0.0 @0",
            "%1 = py.getitem(%0, :)",
            "%2 = read model.layers.1.output @0",
            "%3 = py.setitem(%2, (-1, :), %1) writes model.layers.1.output",
        ],
    ]


def test_what_is_done_to_a_value_between_traces_goes_on_in_its_own() -> None:
    model = FakeModel()
    with session(model):
        with model.trace(PROMPT):
            h = model.model.layers[0].output[0]
        rows = list(h)
        mean = sum(rows) / len(rows)
        mean.save()
        with model.trace(PROMPT):
            model.model.layers[1].output[0][-1] = mean
    assert len(rows) == 4
    assert graphs(model)[0][-3:] == ["%9 = py.truediv(%8, 4)", "export 0.0 = %9", "save s0 = %9"]
    assert graphs(model)[1][1] == "%1 = import 0.0 @0"


def test_iter_runs_its_block_for_each_item() -> None:
    model = FakeModel(s0="value")
    kept = []
    with session(model) as opened:
        with opened.iter([1, 2, 3]) as number:
            with model.trace(PROMPT):
                scaled = model.model.layers[number - 1].mlp.output * number
                kept.append(scaled.save())
    assert [lines[1] for lines in graphs(model)] == [f"%1 = py.mul(%0, {i})" for i in (1, 2, 3)]
    assert [one.value for one in kept] == ["value"] * 3 and scaled == "value"


def test_iter_runs_nothing_for_no_items_and_works_as_for() -> None:
    model = FakeModel()
    seen: list[int] = []
    with session(model) as opened:
        with opened.iter([]) as item:
            seen.append(item)
        for item in opened.iter(range(2)):
            seen.append(item)
    assert seen == [0, 1] and not backend_of(model).requests


def test_an_error_in_an_iters_block_is_the_users() -> None:
    model = FakeModel()
    seen = []
    with pytest.raises(ZeroDivisionError), session(model) as opened, opened.iter([2, 1, 0, 5]) as item:
        seen.append(item)
        _ = 1 / item
    assert seen == [2, 1, 0]


def test_lists_of_a_session_are_pythons_own_and_have_values_in_the_end() -> None:
    model = FakeModel(s0="value")
    with session(model) as opened:
        li = nv.list()
        for number in range(3):
            li.append([number])
        li2 = nv.list().save()
        with opened.iter(li) as item:
            for inner in item:
                li2.append(inner)
        values = nv.list().save()
        for item in li:
            for inner in item:
                with model.trace(PROMPT):
                    values.append(model.model.layers[inner].mlp.output.save())
        named = nv.dict(a=1).save()
    assert li2 == [0, 1, 2] and values == ["value"] * 3 and named == {"a": 1}
    assert all(type(value) is str for value in values)


def test_iter_inside_of_iter_says_how_to_write_it() -> None:
    model = FakeModel()
    with pytest.raises(ControlFlowError, match=r"write `for item in session\.iter"), session(model) as opened:
        with opened.iter([[1], [2]]) as items:
            with opened.iter(items):
                pass


def test_an_error_in_a_session_runs_nothing() -> None:
    model = FakeModel()
    with pytest.raises(KeyError), session(model):
        with model.trace(PROMPT):
            h = model.model.layers[0].output[0].save()
        raise KeyError
    assert not backend_of(model).requests
    with pytest.raises(ValueNotSetError, match="its trace failed"):
        _ = h.value
    with model.trace(PROMPT):  # the session is over
        model.model.layers[0].output[0].save()
    assert len(backend_of(model).requests) == 1


def test_a_trace_that_fails_is_no_part_of_the_session() -> None:
    model = FakeModel()
    with session(model):
        with pytest.raises(nv.OutOfOrderError), model.trace(PROMPT):
            model.model.layers[1].output[0].save()
            model.model.layers[0].output[0].save()
        with model.trace(PROMPT):
            model.model.layers[2].output[0].save()
    assert len(backend_of(model).requests) == 1


def test_errors_name_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()

    def run(requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        failed = Outcome(None, [Sample(failure=Failure("ValueError", "no", 0))])  # type: ignore[arg-type]
        return [Outcome(None, [Sample({"s0": 5})]), failed]  # type: ignore[arg-type]

    monkeypatch.setattr(backend_of(model), "run", run)
    expected = r"(?s)^trace 2 of the session \(.*test_session.py:\d+: with model.trace\(PROMPT\):\): ValueError: no; .*layers\[2\]"
    with pytest.raises(InterventionError, match=expected), session(model):
        with model.trace(PROMPT):
            fine = model.model.layers[0].output[0].save()
        with model.trace(PROMPT):
            model.model.layers[2].output[0].save()
    assert fine == 5


def test_sessions_dont_nest_and_stand_outside_of_traces() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match="inside another"), session(model), session(model):
        pass
    with pytest.raises(RefusedError, match="inside a trace"), model.trace(PROMPT), session(model):
        pass


def test_values_dont_pass_between_sessions() -> None:
    model = FakeModel()
    with session(model):
        with model.trace(PROMPT):
            h = model.model.layers[0].output[0]
    with pytest.raises(ValueNotSetError, match="wasn't saved"), session(model), model.trace(PROMPT):
        model.model.layers[1].output[0][:] = h


def test_a_scan_in_a_session_stays_a_scan() -> None:
    model = FakeModel()
    with session(model), model.scan(PROMPT):
        model.model.layers[0].output[0].save()
    assert not backend_of(model).requests


def test_names_bound_in_a_function_that_ended_stay_as_they_are() -> None:
    model = FakeModel(s0="value")

    def one() -> Any:
        with model.trace(PROMPT):
            h = model.model.layers[0].output[0].save()
        return h

    with session(model):
        returned = one()
    assert returned == "value"
