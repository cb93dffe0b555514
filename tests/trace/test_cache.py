"""`tracer.cache()` while recording, and what it is to the user when values have come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_model import FakeModel

from nnsight_vllm.errors import RefusedError, UnknownModuleError, ValueNotSetError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.text import render
from nnsight_vllm.plan.program import compile_graph
from nnsight_vllm.trace.backend import Completion, Outcome, Result, Sample

ONE, TWO = torch.ones(2, 8), torch.zeros(1, 8)


def collecting(model: FakeModel) -> str:
    (request,) = model.__dict__["backend"].requests
    (graph,) = request.after
    return render(decode(graph))


def test_named_modules_are_collected_in_firing_order_by_a_graph_of_their_own() -> None:
    model = FakeModel()
    with model.trace("a b") as tracer:
        tracer.cache(["model.norm", model.model.layers[1].mlp])
    (request,) = model.__dict__["backend"].requests
    assert request.graph is None and len(request.graphs) == 1
    assert collecting(model) == (
        "%2 = py.list()\n"
        "save cache model.layers.1.mlp.output = %2\n"
        "%6 = py.list()\n"
        "save cache model.norm.output = %6\n"
        "iterations %1 in 0:\n"
        "  %4 = read model.layers.1.mlp.output\n"
        "  %5 = py.append(%2, %4)\n"
        "  %8 = read model.norm.output\n"
        "  %9 = py.append(%6, %8)"
    )


def test_all_modules_are_and_nothing_of_it_is_kept_in_the_engine() -> None:
    model = FakeModel()
    with model.trace("a b") as tracer:
        tracer.cache(include_inputs=True)
    (request,) = model.__dict__["backend"].requests
    graph, catalogue = decode(request.after[0]), tracer.backend.tree.catalogue
    check(graph, catalogue)
    assert [line.split()[-1] for line in render(graph).splitlines() if " = read " in line] == [
        s.name for s in catalogue.sites
    ]
    assert set(compile_graph(graph).streams.values()) == {f"cache {site.name}" for site in catalogue.sites}


def test_values_are_found_by_path_by_module_and_by_walking() -> None:
    model = FakeModel(
        **{
            "cache model.layers.1.output": [ONE, TWO],
            "cache model.layers.1.self_attn.q_proj.output": [ONE],
            "cache model.layers.1.self_attn.q_proj.input": [TWO],
        }
    )
    with model.trace("a b") as tracer:
        cache = tracer.cache([model.model.layers[1], "model.layers.1.self_attn.q_proj"], include_inputs=True)
        with pytest.raises(ValueNotSetError, match="when the block is over"):
            _ = cache.model.layers[1].output
    block, linear = cache["model.layers.1"], cache.model.layers[1].self_attn.q_proj
    assert [value[0] is expected for value, expected in zip(block.output, (ONE, TWO), strict=True)] == [True, True]
    assert linear.output == [ONE] and linear.input == [TWO] and linear.inputs == [((TWO,), {})]
    assert cache[model.model.layers[1]].output[1] == (TWO,)
    assert list(cache) == ["model.layers.1", "model.layers.1.self_attn.q_proj"] and len(cache) == 2
    assert list(cache.model.layers) == ["1", "1.self_attn.q_proj"] and "model.layers.1" in cache
    assert [entry.output[0] for _, entry in cache.model.layers[1].self_attn.items()] == [ONE]
    assert cache.get("model.norm") is None and model.model.norm not in cache


def test_what_is_not_there_is_said() -> None:
    model = FakeModel(**{"cache model.norm.output": [ONE]})
    with model.trace("a b") as tracer:
        cache = tracer.cache("model.norm")
        other = tracer.cache(model.logits)
    with pytest.raises(UnknownModuleError, match=r"model.layers.0 isn't in the cache of .*test_cache.py:\d+"):
        _ = cache["model.layers.0"]
    with pytest.raises(UnknownModuleError, match=r"no module 'nrom'.*nearest: norm"):
        _ = cache.model.nrom
    with pytest.raises(RefusedError, match=r"ask for cache.include_inputs=True"):
        _ = cache.model.norm.input
    with pytest.raises(ValueNotSetError, match=r"logits.output was never computed"):
        _ = other.logits.output


def test_a_cache_asks_for_modules_that_have_what_it_collects() -> None:
    model = FakeModel()
    with pytest.raises(RefusedError, match=r"use model.logits"), model.trace("a") as tracer:
        tracer.cache("")
    with pytest.raises(UnknownModuleError, match="nearest"), model.trace("a") as tracer:
        tracer.cache(["model.layers.7"])
    with pytest.raises(RefusedError, match="takes modules or their paths"), model.trace("a") as tracer:
        tracer.cache([5])


def test_a_cache_belongs_to_an_invoke() -> None:
    model = FakeModel()
    with model.trace() as tracer:
        with pytest.raises(RefusedError, match=r"only available inside a trace \(or one of its invokes\)"):
            tracer.cache()
        with tracer.invoke("a"):
            tracer.cache(model.model.norm)
        with tracer.invoke("b"):
            model.model.norm.output.save()
    assert [len(request.after) for request in model.__dict__["backend"].requests] == [1, 0]


def test_several_caches_of_a_request_are_collected_once() -> None:
    model = FakeModel()
    with model.trace("a") as tracer:
        tracer.cache(model.model.norm)
        tracer.cache([model.model.norm, model.logits])
    assert collecting(model).count("read") == 2


def test_with_several_samples_there_is_a_list_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    name = "cache model.layers.0.output"

    def run(requests: Any, tensors: Any) -> list[Outcome]:
        samples = [Sample({name: [ONE, TWO]}), Sample({name: [TWO]})]
        return [Outcome(Result([Completion("", [1], "stop")] * 2), samples)]

    monkeypatch.setattr(model.__dict__["backend"], "run", run)
    with model.trace("a", n=2) as tracer:
        cache = tracer.cache(model.model.layers[0])
    assert cache.model.layers[0].output == [[(ONE,), (TWO,)], [(TWO,)]]
