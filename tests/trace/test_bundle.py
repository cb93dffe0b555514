"""Values of one invoke in another, as they are recorded. No engine."""

from __future__ import annotations

import pytest
import torch
from fake_model import FakeBackend, FakeModel

import nnsight_vllm as nv
from nnsight_vllm.errors import OutOfOrderError, RefusedError, ScopeError
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.trace.proxy import Proxy

PROMPT = "four words of prompt"


def graphs(model: FakeModel) -> list[list[str]]:
    return [[line.strip() for line in part.splitlines()] for part in model.printed.split("\n\n")]


def links(model: FakeModel) -> list[Links | None]:
    backend: FakeBackend = model.__dict__["backend"]
    return [request.links for request in backend.requests]


def test_a_value_of_one_invoke_is_exported_and_imported() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            embeddings = model.model.embed_tokens.output
        with tracer.invoke("_ _ _ _"):
            model.model.embed_tokens.output = embeddings
    assert graphs(model) == [
        ["%0 = read model.embed_tokens.output @0", "export 0.0 = %0"],
        ["%0 = import 0.0 @0", "write model.embed_tokens.output @0 = %0"],
    ]
    assert links(model) == [Links(makes={"0.0": 1}), Links(needs=[Need("0.0", 0, 0)])]


def test_shapes_are_known_in_the_other_invoke() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0]
        with tracer.invoke("two words"):
            assert h.shape == (4, 8) and h[-1].shape == (8,) and h.dtype == torch.float32
            with pytest.raises(nv.RecordError, match=r"got \[4, 8\], expected \[2, 8\]"):
                model.model.layers[0].output = (h,)


def test_the_export_has_what_the_block_left() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0]
            first = h[0]
            h[:, 1] = 5
            model.model.layers[1].mlp.output.save()
        with tracer.invoke(PROMPT):
            model.model.layers[1].output[0][:] += first
    assert graphs(model)[0] == [
        "%0 = read model.layers.0.output @0",
        "%1 = py.getitem(%0, 0)",
        "%2 = py.setitem(%0, (:, 1), 5) writes model.layers.0.output",
        "export 0.0 = %1",
        "%3 = read model.layers.1.mlp.output @0",
        "save s0 = %3",
    ]


def test_uses_are_counted_a_sample_each_and_one_export_serves_all() -> None:
    model = FakeModel()
    model.backend.sampling = lambda arguments: _Sampling(arguments.get("n", 1))
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0][-1]
        for n in (1, 3):
            with tracer.invoke(PROMPT, n=n):
                model.model.layers[1].output[0][-1] = h
                model.model.layers[2].output[0][-1] += h
    assert [one.makes if one else None for one in links(model)] == [{"0.0": 4}, {}, {}]
    assert graphs(model)[1] == graphs(model)[2]
    assert sum("import" in line for line in graphs(model)[1]) == 1


class _Sampling:
    def __init__(self, n: int) -> None:
        self.n, self.max_tokens = n, 16


def test_a_value_of_several_samples_is_refused_with_both_lines() -> None:
    model = FakeModel()
    model.backend.sampling = lambda arguments: _Sampling(arguments.get("n", 1))
    with pytest.raises(RefusedError, match=r"(?s)test_bundle.py:\d+: h = model.*n=2.*test_bundle.py:\d+: model.model"):
        with model.trace() as tracer:
            with tracer.invoke(PROMPT, n=2):
                h = model.model.layers[0].output[0][-1]
            with tracer.invoke(PROMPT):
                model.model.layers[1].output[0][-1] = h


def test_an_import_stands_before_the_block_that_uses_it_and_waits_for_its_first_iteration() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0][-1]
        with tracer.invoke(PROMPT):
            model.model.layers[0].output[0].save()
            with tracer.iter[2:5]:
                model.model.layers[1].output[0][-1] = h
            model.model.layers[2].output[0][-1] += h
    assert graphs(model)[1] == [
        "%0 = read model.layers.0.output @0",
        "save s0 = %0",
        "%5 = import 0.0 @2",
        "iterations %3 in 2:5",
        "%4 = read model.layers.1.output",
        "%6 = py.setitem(%4, -1, %5) writes model.layers.1.output",
        "%7 = read model.layers.2.output @4",
        "%8 = py.getitem(%7, -1)",
        "%9 = py.iadd(%8, %5) writes model.layers.2.output",
    ]
    assert links(model)[1] == Links(needs=[Need("0.0", 2, 5)])


def test_an_import_first_used_in_a_branch_is_there_after_it_too() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0][-1]
        with tracer.invoke(PROMPT):
            own = model.model.layers[1].output[0]
            if own.sum() > 0:
                own[-1] = h
            own[0] = h
    lines = graphs(model)[1]
    imports = [i for i, line in enumerate(lines) if "import" in line]
    assert len(imports) == 1 and imports[0] < next(i for i, line in enumerate(lines) if "cond" in line)


def test_control_flow_over_the_value_of_another_invoke() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            norm = model.model.layers[0].output[0][-1].norm()
        with tracer.invoke(PROMPT):
            h = model.model.layers[1].output[0]
            if norm > 3:
                h *= norm
    lines = graphs(model)[1]
    assert lines[:3] == ["%0 = read model.layers.1.output @0", "%1 = import 0.0 @0", "%2 = py.gt(%1, 3)"]
    assert lines[3].endswith("cond %2"), lines
    assert not any("import" in line for line in lines[3:])


def test_an_iteration_blocks_last_value_is_exported_behind_it() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            with tracer.iter[0:3]:
                h = model.model.layers[0].output[0][-1]
        with tracer.invoke(PROMPT):
            assert h.shape == (8,)
            model.model.layers[0].output[0][-1] = h
    assert graphs(model)[0][-1] == "export 0.0 = %3"
    recorder = tracer.invokes[1].recorder
    assert recorder.bundle._waits[recorder][0].until == 2


def test_rows_of_a_block_over_prompt_and_answer_are_those_of_its_last_trip() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            with tracer.iter[0:3]:
                h = model.model.layers[0].output[0]
        with tracer.invoke(PROMPT):
            assert h.shape == (1, 8)


def test_a_value_of_an_unbounded_block_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match=r"(?s)h = model.*never final.*tracer.iter\[:n\]"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            with tracer.all():
                h = model.model.layers[0].output[0][-1]
        with tracer.invoke(PROMPT):
            model.model.layers[0].output[0][-1] = h


def test_a_list_that_fills_in_an_unbounded_block_doesnt_delay_other_values() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0]
            tokens = nv.list().save()
            with tracer.all():
                tokens.append(model.samples.output)
        with tracer.invoke(PROMPT):
            model.model.layers[0].output[0][:] = h
    assert graphs(model)[0][:2] == ["%0 = read model.layers.0.output @0", "export 0.0 = %0"]


def test_containers_and_numbers_pass() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            kept = nv.list()
            h = model.model.layers[0].output[0]
            kept.append(h)
            size = nv.int(h.sum())
        with tracer.invoke(PROMPT):
            assert kept[0].shape == (4, 8)
            model.model.layers[0].output[0][:] = kept[0] * size
    assert graphs(model)[0] == [
        "%0 = py.list()",
        "%1 = read model.layers.0.output @0",
        "%2 = py.append(%0, %1)",
        "export 0.0 = %0",
        "%3 = tensor.sum(%1)",
        "%4 = py.int(%3)",
        "export 0.1 = %4",
    ]


def test_a_value_that_exists_in_a_branch_only_stays_there() -> None:
    model = FakeModel()
    with pytest.raises(ScopeError, match="one path only"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0]
            with tracer.cond(h.sum() > 0):
                inner = h * 2
        with tracer.invoke(PROMPT):
            model.model.layers[0].output[0][:] = inner


def test_the_result_of_another_invoke_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match="known after the run"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            done = tracer.result
        with tracer.invoke(PROMPT):
            model.model.layers[0].output[0][:] = done


def test_a_value_saved_by_another_invoke_comes_home_with_its_own() -> None:
    model = FakeModel(s0="the value")
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0]
        with tracer.invoke(PROMPT):
            kept = h.save()
            model.model.layers[1].output[0][:] = h
    assert graphs(model)[0] == ["%0 = read model.layers.0.output @0", "save s0 = %0", "export 0.0 = %0"]
    assert kept == h == "the value"


def test_changing_the_value_of_another_invoke_changes_this_ones_copy() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            h = model.model.layers[0].output[0]
        with tracer.invoke(PROMPT):
            h[0] += 1
            h *= 2
            model.model.layers[0].output[0][:] = h
    assert graphs(model)[0] == ["%0 = read model.layers.0.output @0", "export 0.0 = %0"]
    assert graphs(model)[1][:4] == [
        "%0 = import 0.0 @0",
        "%1 = py.getitem(%0, 0)",
        "%2 = py.iadd(%1, 1)",
        "%3 = py.imul(%0, 2)",
    ]


def test_two_invokes_use_each_others_values_where_the_waits_can_be_ordered() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        a, b = tracer.invoke(PROMPT), tracer.invoke(PROMPT)
        with a:
            x = model.model.layers[0].output[0][-1]
        with b:
            model.model.layers[0].output[0][-1] = x
            y = model.model.layers[1].output[0][-1]
        with a, tracer.iter[1]:
            model.model.layers[0].output[0][-1] = y
    assert [one.needs if one else None for one in links(model)] == [[Need("1.0", 1, 6)], [Need("0.0", 0, 1)]]
    assert len(model.backend.requests) == 2


def test_a_cycle_is_refused_with_both_lines() -> None:
    model = FakeModel()
    expected = r"(?s)wait for itself: iteration 0 .*at .*test_bundle.py:\d+: model.model.layers\[0\].output.*; .*test_bundle.py:\d+"
    with pytest.raises(RefusedError, match=expected), model.trace() as tracer:
        a, b = tracer.invoke(PROMPT), tracer.invoke(PROMPT)
        with a:
            x = model.model.layers[0].output[0][-1]
        with b:
            model.model.layers[0].output[0][-1] = x
            y = model.model.layers[1].output[0][-1]
        with a:
            model.model.layers[2].output[0][-1] = y


def test_a_cycle_over_three_invokes_is_found() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match="wait for itself"), model.trace() as tracer:
        a, b, c = (tracer.invoke(PROMPT) for _ in range(3))
        with a:
            x = model.model.layers[0].output[0][-1]
        with b, tracer.iter[2]:
            model.model.layers[0].output[0][-1] = x
            y = model.model.layers[1].output[0][-1]
        with c, tracer.iter[1]:
            model.model.layers[0].output[0][-1] = y
            z = model.model.layers[1].output[0][-1]
        with a:
            model.model.layers[2].output[0].save()
        with a, tracer.iter[1]:
            late = model.model.layers[0].output[0][-1] + z
        with b:
            model.model.layers[2].output[0][-1] = late


def test_what_others_use_cant_be_changed_afterwards() -> None:
    model = FakeModel()
    with (
        pytest.raises(RefusedError, match=r"(?s)another invoke uses this value as it was.*clone"),
        model.trace() as tracer,
    ):
        a, b = tracer.invoke(PROMPT), tracer.invoke(PROMPT)
        with a:
            x = model.model.layers[0].output[0] * 2
        with b:
            model.model.layers[0].output[0][:] = x
        with a:
            x += 1


def test_nothing_follows_an_unbounded_block() -> None:
    model = FakeModel()
    with pytest.raises(OutOfOrderError, match="unbounded iteration block"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            x = model.model.layers[0].output[0][-1]
        with tracer.invoke(PROMPT):
            with tracer.all():
                model.model.layers[0].output[0].save()
            (x * 2).save()


def test_a_value_of_another_trace_is_refused_until_it_is_known() -> None:
    model = FakeModel(s0=torch.ones(8))
    kept: list[Proxy] = []
    with model.trace(PROMPT):
        kept.append(model.model.layers[0].output[0][-1].save())
        unsaved = model.model.layers[0].output[0]
    with model.trace(PROMPT):
        model.model.layers[1].output[0][-1] = kept[0]
    assert "= const " in model.printed
    with pytest.raises(nv.ValueNotSetError, match="wasn't saved"), model.trace(PROMPT):
        model.model.layers[1].output[0][:] = unsaved


def test_a_value_of_an_open_trace_elsewhere_is_refused() -> None:
    model = FakeModel()
    first = model.scan(PROMPT)
    with first:
        h = model.model.layers[0].output[0]
    with pytest.raises(RefusedError, match="one session"), model.trace(PROMPT):
        model.model.layers[1].output[0][:] = h


def test_a_name_that_would_carry_another_invokes_value_over_iterations_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(ScopeError, match="read and bound anew"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            x = model.model.layers[0].output[0][-1]
        with tracer.invoke(PROMPT):
            with tracer.iter[0:3]:
                x = x + model.model.layers[0].output[0][-1]
