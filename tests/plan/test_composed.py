"""What the prefix cache may share of several graphs of one request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_model import HIDDEN, FakeModel, catalogue

from nnsight_vllm.frontend.cache_salt import CachePolicy, policy_by, salt_of
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Block, Graph, Log
from nnsight_vllm.plan.caching import Salt
from nnsight_vllm.plan.chunking import Unchunked

V = torch.arange(float(HIDDEN))
PROMPT = [1, 2, 3]


def add(model: Any) -> None:
    model.model.layers[0].output[0][:] += V


def scale(model: Any) -> None:
    model.model.layers[0].output[0][:] *= 2


def last(model: Any) -> None:
    model.model.layers[0].output[0][-1] = V


def spread(model: Any) -> None:
    h = model.model.layers[0].output[0]
    h += h.mean(0)


def noise(model: Any) -> None:
    h = model.model.layers[0].output[0]
    h += torch.randn_like(h)


def ban(model: Any) -> None:
    model.logits.output[:, 0] = 0


def fails(model: Any) -> None:
    h = model.model.layers[0].output[0]
    model.logits.output[:, 0] = h[torch.tensor([5])].sum()


def nothing(model: Any, tracer: Any) -> None:
    pass


def reads_all(model: Any, tracer: Any) -> None:
    model.model.layers[0].output[0].save()


def reads_last(model: Any, tracer: Any) -> None:
    model.model.layers[0].output[0][-1].save()


def stops(model: Any, tracer: Any) -> None:
    model.model.layers[0].output[0][-1].save()
    tracer.stop()


def writes(model: Any, tracer: Any) -> None:
    with tracer.all():
        model.model.layers[1].output[0][:] += V
        model.logits.output.save()


def averages(model: Any, tracer: Any) -> None:
    h = model.model.layers[0].output[0]
    h.mean(0).save()
    model.model.layers[1].output[0].median(0).values.save()


def caches(model: Any, tracer: Any) -> None:
    tracer.cache("model.layers.1")


def found(*changes: Any, own: Any = nothing) -> CachePolicy:
    model: Any = FakeModel()
    edited = model
    for change in changes:
        with edited.edit() as edited:
            change(model)
    with edited.trace("a b c", max_tokens=4) as tracer:
        own(model, tracer)
    (request,) = model.__dict__["backend"].requests
    tensors = {
        digest: data for invoke in tracer.invokes for edit in invoke.edits for digest, data in edit.tensors.items()
    }
    return policy_by(catalogue())(request.graphs, tensors | tracer.constants.data, request.prompt.rows)


def salt(shared: CachePolicy, prompt: list[int] = PROMPT) -> str | None:
    return salt_of(shared.salt, shared.graph, prompt, None)


@pytest.mark.parametrize(
    ("changes", "own", "expected", "reads"),
    [
        ((add,), nothing, Salt.GRAPH, True),
        ((add, scale), nothing, Salt.GRAPH, True),
        ((add, last), nothing, Salt.LENGTH, True),
        ((add, spread), nothing, Salt.PROMPT, False),
        ((spread, add), nothing, Salt.PROMPT, False),
        ((add, noise), nothing, Salt.UNIQUE, False),
        ((ban,), nothing, Salt.NONE, True),
        ((add, ban), nothing, Salt.GRAPH, True),
        ((add,), reads_last, Salt.GRAPH, True),
        ((add,), reads_all, Salt.GRAPH, False),
        ((add,), stops, Salt.GRAPH, True),
        ((add,), writes, Salt.LENGTH, True),
        ((add,), caches, Salt.GRAPH, False),
        ((), caches, Salt.NONE, False),
        ((fails,), nothing, Salt.NONE, False),
        ((add, fails), nothing, Salt.GRAPH, False),
        ((fails,), writes, Salt.UNIQUE, False),
    ],
)
def test_the_strictest_graph_decides(changes: Any, own: Any, expected: Salt, reads: bool) -> None:
    shared = found(*changes, own=own)
    assert (shared.salt, shared.most != 0) == (expected, reads)


def test_the_salt_is_of_all_graphs_that_change_rows_in_their_order() -> None:
    salts = [salt(found(*changes)) for changes in ((add,), (scale,), (add, scale), (scale, add), (add, scale, add))]
    assert len(set(salts)) == len(salts)
    assert salt(found(add, scale)) == salt(found(add, scale))


def test_graphs_that_change_no_rows_are_not_in_the_salt() -> None:
    assert len({salt(found(add, own=own)) for own in (nothing, reads_last, reads_all, stops, caches)}) == 1
    assert salt(found(add, ban)) == salt(found(ban, add)) == salt(found(add))
    assert salt(found(ban)) is None


def test_a_requests_own_edits_are() -> None:
    assert salt(found(add, own=writes)) not in (salt(found(add)), salt(found(own=writes)))


def test_bytes_that_are_no_graph_share_nothing() -> None:
    sharing = policy_by(catalogue())
    graph = encode(Graph(Block([Log(0, ["here"])])))
    assert sharing([graph], {}, 3) == CachePolicy(Salt.NONE, None, 0, b"", None)
    found = sharing([graph, b"nonsense"], {}, 3)
    assert (found.salt, found.most) == (Salt.UNIQUE, 0) and isinstance(found.chunking, Unchunked)


def test_a_prompt_may_be_cut_where_all_graphs_allow_it() -> None:
    assert found(add, scale, own=reads_all).chunking is None
    for shared in (found(add, spread), found(spread, own=caches), found(add, own=averages)):
        assert isinstance(shared.chunking, Unchunked)


def test_blocks_before_the_first_row_that_any_changes_are_plain() -> None:
    assert found(last).first == 2 and found(last, add).first == 0 and found(ban, last).first == 2
