"""What is done with each chunk of a prompt, as graphs: golden text, from what users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fake_model import HIDDEN, FakeModel, catalogue

import nnsight_vllm as nv
from nnsight_vllm.frontend.cache_salt import known_by
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.nodes import Block, Const, Graph, Op, Read, Ref
from nnsight_vllm.graph.text import render
from nnsight_vllm.plan.chunking import Unchunked, chunking_of
from nnsight_vllm.plan.chunks import Chunked

V = torch.ones(HIDDEN)
PROMPT = "a b c d e f g h"


def cut(program: Callable[[FakeModel, Any], object]) -> Chunked:
    model = FakeModel()
    with model.trace(PROMPT, max_tokens=4) as tracer:
        program(model, tracer)
    (request,) = model.__dict__["backend"].requests
    assert request.graph is not None
    found = known_by(catalogue())(request.graph, tracer.constants.data, 8).chunking
    assert isinstance(found, Chunked), found
    return found


def chunk(found: Chunked, start: int, stop: int) -> str:
    made = found.chunk(start, stop)
    assert made is not None
    check(made, catalogue())
    return render(made)


def last(found: Chunked, start: int) -> str:
    made = found.last(start)
    assert made is not None
    check(made, catalogue())
    return render(made)


def test_what_only_looks_at_the_last_row_does_nothing_before_it_and_is_the_same_in_the_last_chunk() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        h = model.model.layers[0].output[0]
        (h[-1] @ V).save()
        h[-1:] += V
        model.lm_head(model.model.norm(h[-1])).argmax(-1).save()
        model.logits.output[:, 3] = 0

    found = cut(program)
    assert found.chunk(0, 7) is None
    assert found.last(4) is None


def test_a_chunk_keeps_rows_and_the_last_one_joins_them() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        h = model.model.layers[0].output[0]
        h += 1.0
        (h * 2).save()
        model.logits.output.save()

    found = cut(program)
    assert chunk(found, 0, 4) == "\n".join(
        [
            "%0 = read model.layers.0.output @0",
            "%1 = py.iadd(%0, 1.0) writes model.layers.0.output",
            "%2 = py.mul(%0, 2)",
            f"save {found.sent[3][0].key} = %2",
        ]
    )
    assert last(found, 4) == "\n".join(
        [
            "%0 = read model.layers.0.output @0",
            "%1 = py.iadd(%0, 1.0) writes model.layers.0.output",
            "%2 = py.mul(%0, 2)",
            f"%6 = const {found.sent[3][0].key[:12]}",
            "%7 = torch.cat([%6, %2])",
            "save s0 = %7",
            "%4 = read logits.output @0",
            "save s1 = %4",
        ]
    )


def test_rows_have_the_numbers_of_the_chunk_and_what_is_not_in_it_is_left_out() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        h = model.model.layers[0].output[0]
        h[1] = 0
        h[2:6] *= 2
        h[-2].save()

    found = cut(program)
    assert (
        chunk(found, 0, 2)
        == "%0 = read model.layers.0.output @0\n%1 = py.setitem(%0, 1, 0) writes model.layers.0.output"
    )
    assert chunk(found, 3, 5) == "\n".join(
        [
            "%0 = read model.layers.0.output @0",
            "%2 = py.getitem(%0, 0:2)",
            "%3 = py.imul(%2, 2) writes model.layers.0.output",
        ]
    )
    assert found.chunk(6, 7) is not None and found.chunk(1, 2) is not None
    key = found.sent[5][0].key
    assert chunk(found, 6, 7) == f"%0 = read model.layers.0.output @0\n%4 = py.getitem(%0, 0)\nsave {key} = %4"
    assert last(found, 5).splitlines()[1:] == [
        "%2 = py.getitem(%0, 0:1)",
        "%3 = py.imul(%2, 2) writes model.layers.0.output",
        "%4 = py.getitem(%0, 1)",
        "save s0 = %4",
    ]
    assert last(found, 7).splitlines() == [
        "%0 = read model.layers.0.output @0",
        f"%6 = const {key[:12]}",
        "save s0 = %6",
    ]


def test_a_block_of_iterations_has_the_prompt_written_out() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        rows = nv.list().save()
        with tracer.all():
            h = model.model.layers[1].output[0]
            h += V
            rows.append(h)

    found = cut(program)
    assert chunk(found, 0, 4) == "\n".join(
        [
            "%8 = read model.layers.1.output @0",
            "%9 = const 80af5214264d",
            "%10 = py.iadd(%8, %9) writes model.layers.1.output",
            f"save {found.sent[11][0].key} = %8",
        ]
    )
    assert last(found, 4) == "\n".join(
        [
            "%0 = py.list()",
            "save s0 = %0",
            "%8 = read model.layers.1.output @0",
            "%9 = const 80af5214264d",
            "%10 = py.iadd(%8, %9) writes model.layers.1.output",
            f"%12 = const {found.sent[11][0].key[:12]}",
            "%13 = torch.cat([%12, %8])",
            "%11 = py.append(%0, %13)",
            "iterations %3 in 1:",
            "  %4 = read model.layers.1.output",
            "  %5 = const 80af5214264d",
            "  %6 = py.iadd(%4, %5) writes model.layers.1.output",
            "  %7 = py.append(%0, %4)",
        ]
    )


def test_why_a_prompt_must_be_whole_is_told_by_the_operation() -> None:
    model = FakeModel()
    with model.trace(PROMPT, max_tokens=4) as tracer:
        model.model.layers[0].output[0].softmax(0).save()
    (request,) = model.__dict__["backend"].requests
    found = known_by(catalogue())(request.graph, tracer.constants.data, 8).chunking
    assert found == Unchunked("tensor.softmax takes rows of the prompt together")


def test_columns_that_a_tensor_chooses_are_taken_of_each_row() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        h = model.model.layers[0].output[0]
        h[:, torch.tensor([1, 3])] = 0
        h[:, torch.tensor([2, 4])].save()

    assert chunk(cut(program), 0, 4).splitlines()[2] == "%2 = py.setitem(%0, (:, %1), 0) writes model.layers.0.output"


def test_a_constant_that_chunks_would_make_random_each_for_itself_is_made_once() -> None:
    nodes = [Const(0, "0" * 64), Op(1, "tensor.normal_", [Ref(0)]), Read(2, "model.layers.0.output", 0)]
    found = chunking_of(Graph(Block(nodes)), lambda site: 1, lambda digest: 1, 8)  # type: ignore[arg-type]
    assert found == Unchunked("tensor.normal_ changes a constant by other values")
