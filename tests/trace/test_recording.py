"""What the block records: golden text of graphs, order, places, refusals. No engine."""

from __future__ import annotations

import einops
import numpy as np
import pytest
import torch
from fake_model import FakeModel

import nnsight_vllm as nv
from nnsight_vllm.errors import (
    ControlFlowError,
    GradientsUnavailable,
    OutOfOrderError,
    RecordError,
    RefusedError,
    ScopeError,
    UnknownModuleError,
    ValueNotSetError,
)
from nnsight_vllm.graph.check import check
from nnsight_vllm.trace.tracer import Tracer

PROMPT = "four words of prompt"


def lines(model: FakeModel, containing: str = "") -> list[str]:
    return [line.strip() for line in model.printed.splitlines() if containing in line]


def test_reads_edits_calls_and_saves_are_recorded_in_program_order() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        resid = model.model.layers[0].output[0].save()
        model.model.layers[1].mlp.output[:] = 0
        model.model.layers[1].output[0][-1] = 3 * resid[-1]
        model.lm_head(model.model.norm(resid)).argmax(-1).save()
    assert lines(model) == [
        "%0 = read model.layers.0.output @0",
        "save s0 = %0",
        "%2 = read model.layers.1.mlp.output @0",
        "%3 = py.setitem(%2, :, 0) writes model.layers.1.mlp.output",
        "%4 = py.getitem(%0, -1)",
        "%5 = py.mul(3, %4)",
        "%6 = read model.layers.1.output @0",
        "%7 = py.setitem(%6, -1, %5) writes model.layers.1.output",
        "%8 = call model.norm(%0)",
        "%9 = call lm_head(%8)",
        "%10 = tensor.argmax(%9, -1)",
        "save s1 = %10",
    ]


def test_tensors_are_constants_by_content() -> None:
    model = FakeModel()
    with model.trace(PROMPT) as tracer:
        model.model.layers[0].output[0][:] += torch.ones(8)
        model.model.layers[1].output[0][:] += torch.ones(8)
        model.model.layers[2].output[0][:] += np.ones(8, dtype=np.float32)
    assert len({line.split("const ")[1] for line in lines(model, "const")}) == 1
    assert len(tracer.constants.data) == 1


def test_an_augmented_assignment_to_an_item_is_one_write() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        model.model.layers[1].output[0][-1] += 1
        model.model.layers[2].output[0] += 1
    assert lines(model, "writes") == [
        "%2 = py.iadd(%1, 1) writes model.layers.1.output",
        "%4 = py.iadd(%3, 1) writes model.layers.2.output",
    ]


def test_an_augmented_assignment_to_a_copy_writes_the_sum_back() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        model.model.layers[1].mlp.output[[0, 2]] += 1
    assert lines(model)[1:] == [
        "%1 = py.getitem(%0, [0, 2])",
        "%2 = py.iadd(%1, 1)",
        "%3 = py.setitem(%0, [0, 2], %1) writes model.layers.1.mlp.output",
    ]


@pytest.mark.parametrize("view", ["h[1:3]", "h.view(2, 2, 8)", "h.T", "h.chunk(2)[0]", "h.unbind(0)[1]", "h[:, 0]"])
def test_views_of_a_site_are_places(view: str) -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        eval(view, {"h": model.model.layers[1].mlp.output}).mul_(2)
    assert lines(model)[-1].endswith("writes model.layers.1.mlp.output")


@pytest.mark.parametrize("value", ["h.clone()", "h + 1", "h[[0, 1]]", "h[h[:, 0] > 0]", "h.double()"])
def test_clones_arithmetic_and_advanced_indexing_make_values(value: str) -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        eval(value, {"h": model.model.layers[1].mlp.output}).mul_(2)
    assert "writes" not in model.printed


def test_a_write_through_a_place_whose_site_has_passed_is_out_of_order() -> None:
    model = FakeModel()
    with pytest.raises(OutOfOrderError, match=r"layers\.0\.output in place, but the model has passed it"):
        with model.trace(PROMPT):
            h = model.model.layers[0].output[0]
            _ = model.model.layers[1].output
            h[:] = 0


def test_a_write_through_a_place_that_was_assigned_anew_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(OutOfOrderError, match="was assigned anew"), model.trace(PROMPT):
        h = model.model.layers[0].mlp.output
        model.model.layers[0].mlp.output = h * 2
        h[:] = 0


def test_two_layers_in_the_wrong_order_raise_with_file_and_line() -> None:
    model = FakeModel()
    with pytest.raises(
        OutOfOrderError, match=r"layers\.0\.output comes before model\.layers\.1\.output.*_recording\.py:\d"
    ):
        with model.trace(PROMPT):
            _l2 = model.model.layers[1].output.save()
            _l1 = model.model.layers[0].output.save()


def test_logits_can_be_read_but_not_written_after_the_draw() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        _ = model.samples.output
        model.logits.output.save()
    assert lines(model) == ["%1 = read logits.output @0", "%0 = read samples.output @0", "save s0 = %1"]
    with pytest.raises(OutOfOrderError, match="can't be changed after"), model.trace(PROMPT):
        _ = model.samples.output
        model.logits.output = torch.zeros(1, 32)


def test_the_documents_samples_then_logits_loop_reads_every_iteration() -> None:
    model = FakeModel()
    with model.trace(PROMPT, max_tokens=3):
        samples = nv.list().save()
        logits = nv.list().save()
        for _ in range(3):
            samples.append(model.samples.output)
            model.samples.next()
            logits.append(model.logits.output)
            model.logits.next()
    reads = [line.split(" = ")[1] for line in lines(model, "read")]
    assert reads == [f"read {site}.output @{k}" for k in range(3) for site in ("logits", "samples")]


def test_next_returns_the_module_and_the_program_never_goes_back() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        model.model.layers[2].output.save()
        model.model.layers[2].next().output.save()
        model.model.layers[0].next().output.save()
    reads = [line.split(" = ")[1] for line in lines(model, "read")]
    assert reads == ["read model.layers.2.output @0", "read model.layers.2.output @1", "read model.layers.0.output @2"]


def test_next_of_the_last_iteration_is_refused() -> None:
    model = FakeModel()
    with pytest.raises(RecordError, match="iteration 2 never runs, max_tokens is 2"), model.trace(PROMPT, max_tokens=2):
        for _ in range(3):
            model.model.layers[0].output.save()
            model.model.layers[0].next()


@pytest.mark.parametrize("form", ["with", "for", "all", "module"])
def test_an_iteration_block_is_recorded_once(form: str) -> None:
    model = FakeModel()
    with model.trace(PROMPT, max_tokens=8) as tracer:
        if form == "for":
            for _ in tracer.iter[0:4]:
                model.model.layers[0].output[0][:] = 0
        else:
            block = {"with": tracer.iter[0:4], "all": tracer.all(), "module": model.model.layers.all()}[form]
            with block:
                model.model.layers[0].output[0][:] = 0
    stop = "4" if form in {"for", "with"} else ""
    assert lines(model)[0] == f"iterations %1 in 0:{stop}"
    assert len(lines(model, "read")) == 1


def test_the_row_count_of_an_iteration_block_over_the_prompt_is_symbolic() -> None:
    model = FakeModel()
    with model.trace(PROMPT) as tracer, tracer.iter[:]:
        rows, hidden = model.model.layers[0].output[0].shape
        assert not isinstance(rows, int)
        assert hidden == 8
    with model.trace(PROMPT) as tracer, tracer.iter[1:]:
        assert model.model.layers[0].output[0].shape == (1, 8)


def test_code_after_a_bounded_block_goes_on_at_its_last_iteration() -> None:
    model = FakeModel()
    with model.trace(PROMPT) as tracer:
        with tracer.iter[0:3]:
            _ = model.model.layers[0].output
        model.model.layers[1].output[0].save()
    assert lines(model)[-2] == "%3 = read model.layers.1.output @2"


def test_after_an_unbounded_block_only_the_result_can_be_read() -> None:
    model = FakeModel()
    with pytest.raises(OutOfOrderError, match="unbounded"), model.trace(PROMPT) as tracer:
        with tracer.all():
            _ = model.model.layers[0].output
        model.model.layers[1].output.save()


def test_a_name_carried_over_iterations_is_refused_not_frozen() -> None:
    model = FakeModel()
    with pytest.raises(ScopeError, match="'total' is read and bound anew"), model.trace(PROMPT) as tracer:
        total = model.model.layers[0].output[0].sum()
        with tracer.iter[1:]:
            total = total + model.model.layers[0].output[0].sum()


def test_module_all_refuses_other_modules() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match=r"isn't part of model\.layers"), model.trace(PROMPT):
        with model.model.layers.all():
            _ = model.logits.output


def test_cond_and_else_are_one_node_and_each_branch_starts_where_the_cond_stands() -> None:
    model = FakeModel()
    with model.trace(PROMPT) as tracer:
        h = model.model.layers[0].output[0]
        with tracer.cond(h.sum() > 0) as cond:
            model.model.layers[2].mlp.output[:] = 1
        with cond.else_():
            model.model.layers[1].mlp.output[:] = 2
            h2 = model.model.layers[2].output[0]
            h2[:] = 3
    assert lines(model)[3:] == [
        "cond %2",
        "%4 = read model.layers.2.mlp.output @0",
        "%5 = py.setitem(%4, :, 1) writes model.layers.2.mlp.output",
        "else",
        "%6 = read model.layers.1.mlp.output @0",
        "%7 = py.setitem(%6, :, 2) writes model.layers.1.mlp.output",
        "%8 = read model.layers.2.output @0",
        "%9 = py.setitem(%8, :, 3) writes model.layers.2.output",
    ]


def test_the_cursor_after_a_cond_is_the_later_of_the_two_branches() -> None:
    model = FakeModel()
    with pytest.raises(OutOfOrderError, match="comes before"), model.trace(PROMPT):
        h = model.model.layers[0].output[0]
        if h.sum() > 0:
            model.model.layers[2].mlp.output[:] = 1
        _ = model.model.layers[1].output


def test_if_else_yields_names_and_keeps_one_path_names_from_use() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        h = model.model.layers[0].output[0]
        if h.sum() > 0:  # noqa: SIM108
            scale = h[0, 0]
        else:
            scale = h[1, 1] * 2
        (h * scale).save()
    cond = lines(model, "cond")[0]
    assert cond.startswith("%") and "= cond" in cond
    with pytest.raises(ScopeError, match="only_then"), model.trace(PROMPT):
        h = model.model.layers[0].output[0]
        if h.sum() > 0:
            only_then = h[0]
        (h * only_then).save()


def test_a_loop_over_a_value_carries_names() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        total = model.model.layers[0].output[0][0]
        items = nv.list([1, 2, 3])
        for item in items:
            total = total + item
        total.save()
    assert any("= loop" in line and "carrying" in line for line in lines(model))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("model.model.layers[9]", UnknownModuleError, "has 3 modules"),
        ("model.model.lyers", UnknownModuleError, "nearest: layers"),
        ("model.model.layers[1].output[0][0, :, 3]", RecordError, "no batch dimension"),
        ("model.model.layers[1].mlp.output[:, 8]", RecordError, "out of bounds"),
        ("model.model.layers[1].self_attn.output[1]", RefusedError, "no probabilities"),
        ("model.output", RefusedError, "use model.logits"),
        ("model.model.layers.output", RefusedError, "doesn't fire"),
        ("model.model.layers[1].self_attn.q_proj.input.zero_()", RefusedError, "assign by value"),
        ("model.model.layers[1](1)", RefusedError, "passes a residual"),
        ("model.model.norm(torch.zeros(3, 7))", RecordError, r"takes \[..., 8\]"),
        ("model.model.layers[1].mlp.output.backward()", GradientsUnavailable, "no tape"),
        ("model.model.layers[1].mlp.output.grad", GradientsUnavailable, "no tape"),
        ("model.model.layers[1].mlp.output.numpy()", RefusedError, "operations of a graph"),
        ("model.model.layers[1].mlp.output @ torch.ones(7)", RecordError, "size mismatch"),
        ("bool(model.model.layers[1].mlp.output.sum() > 0)", ControlFlowError, "truth"),
        ("int(model.samples.output)", ControlFlowError, "nv.int"),
        ("[1, 2][model.samples.output]", ControlFlowError, "index"),
        ("3 in model.samples.output", ControlFlowError, "`in`"),
        ("len(nv.list())", ControlFlowError, "len"),
        ("tracer.iter[3:3].__enter__()", OutOfOrderError, "empty"),
        ("tracer.iter[-1]", RefusedError, "count from 0"),
        ("model.model.layers[1].mlp.output + object()", RefusedError, "can't hold object"),
        ("tracer.result + 1", RefusedError, "after the run"),
    ],
)
def test_what_cannot_be_recorded_says_why_and_where(code: str, error: type[Exception], message: str) -> None:
    model = FakeModel()
    with pytest.raises(error, match=message) as caught, model.trace(PROMPT) as tracer:
        eval(code, {"model": model, "torch": torch, "nv": nv, "tracer": tracer})
    assert "<string>:1" in str(caught.value)


def test_an_assignment_of_the_wrong_shape_names_both() -> None:
    model = FakeModel()
    with pytest.raises(RecordError, match=r"got \[5, 8\], expected \[4, 8\]"), model.trace(PROMPT):
        model.model.layers[1].mlp.output = torch.zeros(5, 8)


def test_a_block_output_is_a_tuple() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        model.model.layers[0].output = (torch.zeros(4, 8),)
        model.model.layers[1].output[0] = 0
        assert len(model.model.layers[1].output) == 1
    assert len(lines(model, "write ")) == 2
    with pytest.raises(RefusedError, match="is a tuple"), model.trace(PROMPT):
        model.model.layers[1].output[:] = 0


def test_inputs_are_arguments_and_keywords() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        (hidden,), keywords = model.model.layers[0].inputs
        assert keywords == {}
        assert hidden.shape == (4, 8)
        model.model.layers[0].inputs = ((hidden * 2,), {})
    assert lines(model)[-1] == "write model.layers.0.input @0 = %1"


def test_einops_works_on_values_of_the_run() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        h = model.model.layers[0].output[0]
        assert einops.rearrange(h, "t (a b) -> a t b", a=2).shape == (2, 4, 4)
        assert einops.reduce(h, "t h -> h", "mean").shape == (8,)
        assert einops.repeat(h, "t h -> t n h", n=3).shape == (4, 3, 8)
        assert einops.einsum(h, h, "a h, b h -> a b").shape == (4, 4)
    assert "tensor.permute" in model.printed


def test_every_recorded_graph_is_legal() -> None:
    model = FakeModel()
    with model.trace(PROMPT) as tracer:
        h = model.model.layers[0].output[0]
        for row in h:
            if row.sum() > 0:
                row.mul_(2)
        with tracer.iter[1:3]:
            model.model.layers[1].mlp.output[:] += 1
    view = tracer.graph
    check(view.nodes, model._tree.catalogue)
    assert '"type":"graph"' in view.to_json()


def test_values_reach_the_names_of_the_frame_and_saved_proxies_in_lists_are_their_values() -> None:
    model = FakeModel(s0=torch.ones(3), s1=torch.zeros(2))
    with model.trace(PROMPT) as tracer:
        a = model.model.layers[0].output[0].save()
        kept = [model.model.layers[1].output[0].save()]
        unsaved = model.model.layers[2].output[0]
        done = tracer.result.save()
    assert isinstance(a, torch.Tensor)
    assert torch.equal(a, torch.ones(3))
    assert torch.equal(kept[0] + 1, torch.ones(2))
    assert torch.equal(kept[0].value, torch.zeros(2))
    assert done.text == "text"
    with pytest.raises(ValueNotSetError, match="wasn't saved"):
        print(unsaved + 1)


def test_a_save_that_the_run_did_not_reach_says_so() -> None:
    model = FakeModel()
    with model.trace(PROMPT):
        a = model.model.layers[0].output[0].save()
    with pytest.raises(ValueNotSetError, match="didn't reach"):
        _ = a.value


def test_sites_outside_of_a_trace_and_traces_inside_of_traces_are_refused() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match="only available inside a trace"):
        _ = model.model.layers[0].output
    with pytest.raises(RefusedError, match="inside another"), model.trace(PROMPT), model.trace(PROMPT):
        pass
    with pytest.raises(RefusedError, match="inside another"), model.trace() as tracer:
        with tracer.invoke(PROMPT), tracer.invoke(PROMPT):
            pass
    tracer = model.trace(PROMPT)
    assert isinstance(tracer, Tracer)
    with tracer:
        model.model.layers[0].output.save()


def test_the_tree_prints_with_equal_blocks_told_once() -> None:
    text = repr(FakeModel())
    assert text.count("Block") == 1
    assert "(0-2): 3 x Block(" in text
