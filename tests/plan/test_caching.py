"""What the prefix cache may share of graphs, as recorded from what users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_model import HIDDEN, FakeModel, catalogue

import nnsight_vllm as nv
from nnsight_vllm import edits
from nnsight_vllm.frontend.cache_salt import known_by, salt_of
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Block, Const, Graph, Iterations, Op, Read, Ref
from nnsight_vllm.plan.caching import Caching, Salt
from nnsight_vllm.plan.chunking import Unchunked, chunking_of
from nnsight_vllm.plan.chunks import Chunked

V, W, M = torch.ones(HIDDEN), torch.arange(float(HIDDEN)), torch.eye(HIDDEN)


def found(program: Callable[[FakeModel, Any], object]) -> tuple[Salt, int | None]:
    """The salt, and how many tokens of a prompt of four may come from the cache (None: any number)."""
    model = FakeModel()
    with model.trace("a b c d", max_tokens=4) as tracer:
        program(model, tracer)
    (request,) = model.__dict__["backend"].requests
    assert request.graph is not None
    caching = known_by(catalogue())(request.graph, tracer.constants.data, 4).caching
    return caching.salt, caching.most


def every(program: Callable[[Any, FakeModel], object], save: bool = False) -> Callable[[FakeModel, Any], object]:
    def run(model: FakeModel, tracer: Any) -> None:
        with tracer.all():
            h = model.model.layers[0].output[0]
            program(h, model)
            if save:
                h.save()

    return run


def _iadd(h: Any, value: Any) -> None:
    h += value


def _imul(h: Any, value: Any) -> None:
    h *= value


def _onto_logits(value: Any, model: FakeModel) -> None:
    _iadd(model.logits.output, value)


NOTHING_CHANGED = {
    "logits saved": (lambda m, t: m.logits.output.save(), None),
    "logits edited": (lambda m, t: _iadd(m.logits.output, 1.0), None),
    "samples edited": (lambda m, t: m.samples.output.__setitem__(0, 5), None),
    "the last row saved": (lambda m, t: m.model.layers[0].output[0][-1].save(), None),
    "the last row computed with": (
        lambda m, t: (m.model.layers[0].output[0][-1] @ V).relu().save(),
        None,
    ),
    "the lens of the last row": (
        lambda m, t: m.lm_head(m.model.norm(m.model.layers[0].output[0][-1])).argmax().save(),
        None,
    ),
    "all rows saved": (lambda m, t: m.model.layers[0].output[0].save(), 0),
    "a row saved": (lambda m, t: m.model.layers[0].output[0][2].save(), 2),
    "rows saved after the last": (lambda m, t: m.model.layers[0].output[0][1:].save(), 1),
    "a mean saved": (lambda m, t: m.model.layers[0].output[0].mean(0).save(), 0),
    "the number of rows logged": (lambda m, t: t.log(m.model.layers[0].output[0].sum()), 0),
    "a list of rows": (lambda m, t: nv.list(m.model.layers[0].output[0]).save(), 0),
    "logits by rows": (lambda m, t: _onto_logits(m.model.layers[0].output[0].sum(), m), 0),
}


@pytest.mark.parametrize("name", sorted(NOTHING_CHANGED))
def test_graphs_that_change_no_rows_share_plain_blocks(name: str) -> None:
    program, most = NOTHING_CHANGED[name]
    assert found(program) == (Salt.NONE, most)


def test_what_later_iterations_look_at_is_never_in_the_cache() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        with tracer.iter[1:]:
            model.model.layers[0].output[0].mean(0).save()

    assert found(program) == (Salt.NONE, None)


EVERY_ROW = {
    "add": lambda h, m: _iadd(h, V),
    "add to all": lambda h, m: _iadd(h[:], V),
    "scale": lambda h, m: _imul(h, 2.0),
    "zero": lambda h, m: h.__setitem__(slice(None), 0),
    "a matrix": lambda h, m: _iadd(h, h @ M),
    "projected": lambda h, m: _iadd(h, -(h @ V)[:, None] * V),
    "gated": lambda h, m: _iadd(h, ((h @ V) > 0.5)[:, None] * W),
    "normed": lambda h, m: _imul(h, 1 / h.norm(dim=-1, keepdim=True)),
    "softmax": lambda h, m: _iadd(h, h.softmax(dim=-1)),
    "columns": lambda h, m: h.__setitem__((slice(None), 2), 0.0),
    "some columns": lambda h, m: _iadd(h[:, 1:3], 1.0),
    "assigned": lambda h, m: setattr(m.model.layers[1].mlp, "output", m.model.layers[1].mlp.output * W),
    "an edit": lambda h, m: edits.clamp(h, V, low=-1.0),
    "low rank": lambda h, m: edits.low_rank(h, M[:2], M[:, :2]),
}


@pytest.mark.parametrize("name", sorted(EVERY_ROW))
def test_edits_of_each_row_by_itself_are_shared_by_graph(name: str) -> None:
    assert found(every(EVERY_ROW[name])) == (Salt.GRAPH, None)


def test_results_may_be_too_large_and_then_later_rows_are_not_edited() -> None:
    assert found(every(lambda h, m: _iadd(h, V), save=True)) == (Salt.LENGTH, 0)


def test_an_edit_behind_what_may_fail_is_the_prompts_own() -> None:
    def looked_up(model: FakeModel, tracer: Any) -> None:
        row = model.model.layers[0].output[0][torch.tensor([2])]
        h = model.model.layers[1].output[0]
        h += V
        row.save()

    assert found(looked_up) == (Salt.PROMPT, 0)  # a prompt of two rows gets no edit


BY_LENGTH = {
    "the last row": every(lambda h, m: _iadd(h[-1], V)),
    "the last row set": every(lambda h, m: h.__setitem__(-1, V)),
    "the last row by itself": every(lambda h, m: _imul(h[-1], h[-1])),
    "a slice in every iteration": every(lambda h, m: _iadd(h[1:], V)),
    "the first rows in every iteration": every(lambda h, m: _iadd(h[:2], V)),
    "a slice to the end": lambda m, t: _iadd(m.model.layers[0].output[0][1:], V),
    "rows from the end": lambda m, t: m.model.layers[0].output[0].__setitem__(slice(-3, -1), V),
    "a row from the end": lambda m, t: _iadd(m.model.layers[0].output[0][-2], V),
    "a row and what may be too large": lambda m, t: (_set(m, 2, V), m.logits.output.save()),
    "the prompt only": lambda m, t: _iadd(m.model.layers[0].output[0], V),
}


@pytest.mark.parametrize("name", sorted(BY_LENGTH))
def test_what_depends_on_where_the_prompt_ends_is_shared_by_length(name: str) -> None:
    assert found(BY_LENGTH[name]) == (Salt.LENGTH, None)


def test_later_iterations_alone_are_shared_by_length() -> None:
    def program(model: FakeModel, tracer: Any) -> None:
        with tracer.iter[1:]:
            h = model.model.layers[0].output[0]
            h += h.mean()

    assert found(program) == (Salt.LENGTH, None)


def _set(model: FakeModel, key: Any, value: Any) -> FakeModel:
    model.model.layers[0].output[0][key] = value
    return model


BY_POSITION = {
    "a row": lambda m, t: _set(m, 2, V),
    "an add to a row": lambda m, t: _iadd(m.model.layers[0].output[0][0], V),
    "a row by itself": lambda m, t: _set(m, 1, m.model.layers[0].output[0][1] * W),
    "rows from the front": lambda m, t: _set(m, slice(1, 3), 0.0),
    "up to the end of this prompt": lambda m, t: _set(m, slice(1, 4), 0.0),
    "columns of rows": lambda m, t: _set(m, (slice(None, 2), 3), 0.0),
    "two rows": lambda m, t: (_set(m, 0, V), _set(m, 3, W)),
}


def first(program: Callable[[FakeModel, Any], object]) -> int:
    """The first row that is changed of a prompt of four."""
    model = FakeModel()
    with model.trace("a b c d", max_tokens=4) as tracer:
        program(model, tracer)
    (request,) = model.__dict__["backend"].requests
    return known_by(catalogue())(request.graph, tracer.constants.data, 4).caching.first


def _later(model: FakeModel, tracer: Any) -> None:
    with tracer.iter[1:]:
        model.model.layers[0].output[0][:] += V


def _branching(model: FakeModel, tracer: Any) -> None:
    h = model.model.layers[0].output[0]
    with tracer.cond(h[-1].sum() > 0):
        h[-1] += V


FIRST = {
    "nothing": (lambda m, t: m.model.layers[0].output[0].save(), 0),
    "all": (every(lambda h, m: _iadd(h, V)), 0),
    "a row": (lambda m, t: _set(m, 2, V), 2),
    "two": (lambda m, t: _set(_set(m, 3, V), slice(1, 2), V), 1),
    "the last": (every(lambda h, m: h.__setitem__(-1, V)), 3),
    "the last by a branch": (_branching, 3),
    "later ones": (_later, 4),
    "in an order of its own": (lambda m, t: _iadd(m.model.layers[0].output[0].flip(0)[1:], V), 0),
    "by a tensor": (lambda m, t: _set(m, torch.tensor([2]), V), 0),
}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_blocks_before_the_first_row_that_is_changed_are_plain(name: str) -> None:
    program, row = FIRST[name]
    assert first(program) == row


def test_what_nobody_may_share_still_takes_plain_blocks_before_it() -> None:
    assert found(_branching) == (Salt.PROMPT, 3)
    assert found(lambda m, t: _iadd(m.model.layers[0].output[0][-1], torch.randn_like(V))) == (Salt.LENGTH, None)
    assert found(lambda m, t: _set(m, -1, torch.randn_like(m.model.layers[0].output[0][-1]))) == (Salt.UNIQUE, 3)


@pytest.mark.parametrize("name", sorted(BY_POSITION))
def test_rows_named_by_positions_from_the_front_are_edited_alike_in_prompts_of_any_length(name: str) -> None:
    assert found(BY_POSITION[name]) == (Salt.GRAPH, None)


def test_a_prompt_without_all_of_those_rows_is_another_matter() -> None:
    model = FakeModel()
    with model.trace("a b c d e f", max_tokens=4) as tracer:
        model.model.layers[0].output[0][1:5] = V
    (request,) = model.__dict__["backend"].requests
    known, data = known_by(catalogue()), tracer.constants.data
    salts = [known(request.graph, data, rows).caching.salt for rows in (6, 5, 4, 1)]
    assert salts == [Salt.GRAPH, Salt.GRAPH, Salt.LENGTH, Salt.PROMPT]


def test_what_looks_at_numbered_rows_and_can_not_renumber_them_takes_nothing_from_the_cache() -> None:
    assert found(lambda m, t: m.model.layers[0].output[0][2:].mean().save()) == (Salt.NONE, 0)
    assert found(lambda m, t: (m.model.layers[0].output[0][2:] * 2).save()) == (Salt.NONE, 2)
    assert found(lambda m, t: (m.model.layers[0].output[0][3] * 2).sum().save()) == (Salt.NONE, None)

    def branching(model: FakeModel, tracer: Any) -> None:
        h = model.model.layers[0].output[0]
        with tracer.cond(h[3].sum() > 0):  # the last one, by its number
            h[3] = V

    assert found(branching) == (Salt.PROMPT, 0)


BY_PROMPT = {
    "a mean over rows": lambda h, m: _iadd(h, h.mean(0)),
    "a mean of all": lambda h, m: _iadd(h, h.mean()),
    "a norm of rows": lambda h, m: _iadd(h, h.norm(dim=-1).sum(dim=-1)),
    "one row onto all": lambda h, m: _iadd(h, h[-1]),
    "one row onto another": lambda h, m: h.__setitem__(slice(2, 4), h[1:3]),
    "rows by a tensor": lambda h, m: h.__setitem__(torch.tensor([1]), V),
    "a matrix of rows": lambda h, m: _iadd(h, torch.ones(4, HIDDEN)[:1]),
    "a cumulated sum": lambda h, m: _iadd(h, h.cumsum(0)),
    "rows by rows": lambda h, m: _iadd(h, (h @ h.T)[:, :1]),
    "flipped": lambda h, m: h.__setitem__(slice(None), h.flip(0)),
    "a module": lambda h, m: _iadd(h, m.model.norm(h)),
    "an own value": lambda h, m: _iadd(h, _private(h)),
}


def _spread(h: Any) -> None:
    h += h.mean(0)


def _private(h: Any) -> Any:
    own = h.clone()
    own += V
    return own


@pytest.mark.parametrize("name", sorted(BY_PROMPT))
def test_what_depends_on_other_rows_is_shared_by_prompt(name: str) -> None:
    assert found(every(BY_PROMPT[name])) == (Salt.PROMPT, 0)


def test_branches_and_values_of_other_sites_and_iterations() -> None:
    def branch(model: FakeModel, tracer: Any) -> None:
        h = model.model.layers[0].output[0]
        with tracer.cond(h[-1].sum() > 0):
            h += V

    def carried(model: FakeModel, tracer: Any) -> None:
        first = model.model.layers[0].output[0][-1].clone()
        with tracer.iter[1:]:
            h = model.model.layers[1].output[0]
            h += first

    def rows_later(model: FakeModel, tracer: Any) -> None:
        rows = model.model.layers[0].output[0].clone()
        with tracer.iter[1:]:
            h = model.model.layers[1].output[0]
            h += rows[0]

    def other_site(model: FakeModel, tracer: Any) -> None:
        with tracer.all():
            h = model.model.layers[0].output[0].clone()
            other = model.model.layers[1].output[0]
            other += h

    assert found(branch) == (Salt.PROMPT, 0)
    assert found(lambda m, t: _spread(m.model.layers[0].output[0])) == (Salt.PROMPT, 0)
    assert found(carried) == (Salt.LENGTH, None)
    assert found(rows_later) == (Salt.LENGTH, 0)
    assert found(other_site) == (Salt.GRAPH, None)


def test_edits_of_a_graph_that_stops_are_the_prompts_own() -> None:
    def stopping(model: FakeModel, tracer: Any) -> None:
        with tracer.all():
            h = model.model.layers[0].output[0]
            h += V
            with tracer.cond(model.samples.output[0] == 3):
                tracer.stop()

    assert found(stopping) == (Salt.PROMPT, 0)
    assert found(lambda m, t: t.stop()) == (Salt.NONE, None)


def test_random_edits_are_nobodys() -> None:
    assert found(every(lambda h, m: _iadd(h, torch.randn_like(h)))) == (Salt.UNIQUE, 0)


def test_a_view_that_the_recorder_did_not_see_counts_as_a_change() -> None:
    nodes = [Read(3, "model.layers.0.output", None), Op(4, "tensor.t", [Ref(3)]), Op(5, "tensor.zero_", [Ref(4)])]
    graph = Graph(Block([Iterations(1, 0, None, 1, 2, Block(nodes))]))  # type: ignore[arg-type]
    assert known_by(catalogue())(encode(graph), {}, 4).caching.salt is Salt.PROMPT


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 9,
        encode(Graph(Block([Read(1, "no.such.site", 0)]))),
        encode(Graph(Block([Const(1, "0" * 64)]))),
        encode(Graph(Block([Op(1, "py.getitem", []), Op(2, "py.setitem", [], writes="logits.output")]))),
    ],
)
def test_bytes_that_are_no_legal_graph_share_nothing(data: bytes) -> None:
    known = known_by(catalogue())(data, {}, 4)
    caching, cut = known.caching, known.chunking
    assert caching.salt is Salt.UNIQUE or caching.salt is Salt.NONE
    assert caching.most == 0 or caching.salt is Salt.NONE
    assert isinstance(cut, Unchunked) or caching.salt is Salt.NONE


def test_salts_hold_what_they_say() -> None:
    def salt(kind: Salt, graph: bytes = b"g", prompt: tuple[int, ...] = (1, 2), own: str | None = None) -> str | None:
        return salt_of(kind, graph, prompt, own)

    assert salt(Salt.NONE) is None and salt(Salt.NONE, own="mine") == "mine"
    assert salt(Salt.GRAPH) == salt(Salt.GRAPH, prompt=(1, 2, 3)) != salt(Salt.GRAPH, graph=b"h")
    assert salt(Salt.GRAPH) != salt(Salt.GRAPH, own="mine")
    assert salt(Salt.LENGTH) == salt(Salt.LENGTH, prompt=(3, 4)) != salt(Salt.LENGTH, prompt=(1, 2, 3))
    assert salt(Salt.PROMPT) == salt(Salt.PROMPT) != salt(Salt.PROMPT, prompt=(3, 4))
    assert salt(Salt.UNIQUE) != salt(Salt.UNIQUE)
    assert len({salt(kind) for kind in Salt}) == len(Salt)


def test_graphs_that_differ_in_their_tensors_are_looked_at_once_and_others_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []

    def look(graph: Graph, trailing: Any, rank: Any, num_rows: int) -> Chunked | Unchunked:
        looked.append(num_rows)
        return chunking_of(graph, trailing, rank, num_rows)

    monkeypatch.setattr("nnsight_vllm.frontend.cache_salt.chunking_of", look)
    known = known_by(catalogue())

    def ask(value: torch.Tensor, rows: int = 4) -> Any:
        model = FakeModel()
        with model.trace("a b c d", max_tokens=4) as tracer:
            model.model.layers[0].output[0][:] += value
        (request,) = model.__dict__["backend"].requests
        return known(request.graph, tracer.constants.data, rows)

    assert ask(V) is ask(W) is not ask(V, 5)
    assert looked == [4, 5]
    assert isinstance(ask(V).chunking, Chunked) and isinstance(ask(torch.ones(4, HIDDEN)).chunking, Unchunked)
    assert looked == [4, 5, 4]


def test_tensors_that_are_none_share_nothing() -> None:
    graph = encode(Graph(Block([Const(1, "0" * 64)])))
    assert known_by(catalogue())(graph, {"0" * 64: b"not a tensor"}, 4).caching == Caching(Salt.UNIQUE, 0)


def test_rows_edited_by_a_value_of_another_request_are_nobodys() -> None:
    model = FakeModel()
    with model.trace(max_tokens=4) as tracer:
        with tracer.invoke("a b c d"):
            h = model.model.layers[0].output[0][-1]
        with tracer.invoke("a b c d"):
            model.model.layers[0].output[0][:] += h
        with tracer.invoke("a b c d"):
            _iadd(model.logits.output, h.sum())
    graphs = [request.graph for request in model.__dict__["backend"].requests]
    caching = [known_by(catalogue())(graph, tracer.constants.data, 4).caching for graph in graphs]
    assert [(one.salt, one.most) for one in caching] == [(Salt.NONE, None), (Salt.UNIQUE, 0), (Salt.NONE, None)]


def test_rows_before_those_that_others_values_change_stay_plain() -> None:
    model = FakeModel()
    with model.trace(max_tokens=4) as tracer:
        with tracer.invoke("a b c d"):
            h = model.model.layers[0].output[0][-1]
        with tracer.invoke("a b c d"):
            model.model.layers[0].output[0][-1] = h
    graph = model.__dict__["backend"].requests[1].graph
    caching = known_by(catalogue())(graph, tracer.constants.data, 4).caching
    assert (caching.salt, caching.first) == (Salt.UNIQUE, 3)
