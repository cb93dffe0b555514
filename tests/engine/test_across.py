"""Values of one invoke in another: as if they had been saved in one trace and were constants of the next.

In float32. TOLERANCE is of a tensor's largest element: other requests in a step give matrix products other shapes, hence
other orders of their sums (see test_isolation.py); a wrong value is of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nv
from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.nodes import Block, Export, Graph, Import, Node, Op, Read, Ref, Slice
from nnsight_vllm.wire.extras import RequestExtras, encode_extras

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

TOLERANCE = 1e-4
CLEAN, OTHER = [5, 9, 11, 3, 40], [7, 8, 2, 4, 90]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 32,
}


@pytest.fixture
def shared(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    model = engines(tiny_checkpoint("llama"), **SETTINGS)
    yield model
    model.check_integrity()
    assert model.stats().num_kept == 0


@pytest.fixture(params=[{}, {"batching": False, "async_scheduling": False}], ids=["default", "one by one, synchronous"])
def model(request: pytest.FixtureRequest, engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    model = engines(tiny_checkpoint("llama"), **SETTINGS, **request.param)
    yield model
    assert model.stats().num_kept == 0  # each was gone with its last use, before anything clears up
    model.check_integrity()


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_embeddings_of_one_prompt_in_another(model: VLLM) -> None:
    with model.generate(**GREEDY, max_new_tokens=3) as tracer:
        with tracer.invoke(CLEAN):
            embeddings = model.model.embed_tokens.output
            original = tracer.result.save()
        with tracer.invoke(OTHER):
            model.model.embed_tokens.output = embeddings
            logits = model.logits.output.save()
            intervened = tracer.result.save()
    with model.trace(CLEAN, **GREEDY, max_tokens=1):
        saved = model.model.embed_tokens.output.save()
    with model.trace(OTHER, **GREEDY, max_tokens=3) as tracer:
        model.model.embed_tokens.output = saved
        expected = model.logits.output.save()
        result = tracer.result.save()
    assert_close(logits, expected)
    assert intervened.token_ids == result.token_ids == original.token_ids


def test_activation_patching_in_one_trace(model: VLLM) -> None:
    right, wrong = 17, 230
    layers = model.model.layers
    with model.trace(**GREEDY, max_tokens=1) as tracer:
        with tracer.invoke(CLEAN):
            clean_hs = [layer.output[0] for layer in layers]
            clean_logits = model.lm_head.output
            clean_diff = (clean_logits[-1, right] - clean_logits[-1, wrong]).save()
        with tracer.invoke(OTHER):
            logits = model.lm_head.output
            other_diff = (logits[-1, right] - logits[-1, wrong]).save()
        results: list[list[Any]] = []
        for i in range(len(layers)):
            results.append([])
            for token in range(len(CLEAN)):
                with tracer.invoke(OTHER):
                    layers[i].output[0][token, :] = clean_hs[i][token, :]
                    patched = model.lm_head.output
                    difference = patched[-1, right] - patched[-1, wrong]
                    restored = (difference - other_diff) / (clean_diff - other_diff)
                    results[-1].append(restored.item().save())
    got = torch.tensor([[float(one) for one in row] for row in results])
    with model.trace(CLEAN, **GREEDY, max_tokens=1):
        saved = [layer.output[0].save() for layer in layers]
    expected = torch.empty_like(got)
    for i in range(len(layers)):
        for token in range(len(CLEAN)):
            with model.trace(OTHER, **GREEDY, max_tokens=1):
                layers[i].output[0][token] = saved[i][token]
                alone = model.lm_head.output.save()
            expected[i, token] = (alone[-1, right] - alone[-1, wrong] - other_diff) / (clean_diff - other_diff)
    assert_close(got, expected)
    assert (got[:, -1] - 1).abs().max() > TOLERANCE or len(layers) == 1  # it isn't all trivial
    assert abs(float(results[-1][-1]) - 1) < TOLERANCE  # the last block's last row is all that the head sees


def test_a_request_is_held_before_a_later_iteration(model: VLLM) -> None:
    layer = model.model.layers[1]
    with model.trace(**GREEDY, max_tokens=8) as tracer:
        with tracer.invoke(OTHER):
            with tracer.iter[2]:
                pass
        a, b = tracer.invoke(CLEAN), tracer.invoke(OTHER)
        with a, tracer.iter[0:6]:
            late = layer.output[0][-1]
        with b:
            with tracer.iter[2]:
                layer.output[0][-1] = late
                logits = model.logits.output.save()
            held = tracer.result.save()
        with tracer.invoke(OTHER):
            plain = tracer.result.save()
    with model.trace(CLEAN, **GREEDY, max_tokens=6) as tracer:
        with tracer.iter[5]:
            value = layer.output[0][-1].save()
    with model.trace(OTHER, **GREEDY, max_tokens=8) as tracer:
        with tracer.iter[2]:
            layer.output[0][-1] = value
            expected = model.logits.output.save()
        result = tracer.result.save()
    assert_close(logits, expected)
    assert held.token_ids == result.token_ids and plain.token_ids[:2] == held.token_ids[:2]
    assert plain.token_ids != held.token_ids


def test_two_requests_that_need_each_other(model: VLLM) -> None:
    layers = model.model.layers
    with model.trace(**GREEDY, max_tokens=4) as tracer:
        a, b = tracer.invoke(CLEAN), tracer.invoke(OTHER)
        with a:
            x = layers[0].output[0][-1]
            x_saved = x.save()
        with b:
            layers[0].output[0][-1] = x
            y = layers[1].output[0][-1]
            y_saved = y.save()
        with a, tracer.iter[1]:
            layers[1].output[0][-1] = y
            z = layers[2].output[0][-1] * 2
        with b, tracer.iter[3]:
            layers[0].output[0][-1] += z
            logits = model.logits.output.save()
    with model.trace(CLEAN, **GREEDY, max_tokens=2) as tracer, tracer.iter[1]:
        layers[1].output[0][-1] = y_saved
        z_saved = (layers[2].output[0][-1] * 2).save()
    with model.trace(OTHER, **GREEDY, max_tokens=4) as tracer:
        layers[0].output[0][-1] = x_saved
        with tracer.iter[3]:
            layers[0].output[0][-1] += z_saved
            expected = model.logits.output.save()
    assert_close(logits, expected)


def test_containers_numbers_and_conditions_pass(model: VLLM) -> None:
    layers = model.model.layers
    with model.trace(**GREEDY, max_tokens=3) as tracer:
        with tracer.invoke(CLEAN):
            rows = nv.list()
            with tracer.iter[0:3]:
                rows.append(layers[0].output[0][-1])
            count = nv.int(layers[1].output[0].numel())
            both = nv.dict({"a": rows[0], "n": count})
            kept = rows.save()
        with tracer.invoke(OTHER):
            sums = nv.list().save()
            for row in rows:
                sums.append(row.sum())
            number = (both["n"] + 1).save()
            if both["a"].sum() > 1e9:
                layers[0].output[0][:] = 0
            first = (both["a"] - rows[0]).abs().max().save()
    assert number == 129 and float(first) == 0
    assert torch.allclose(torch.stack(list(sums)), torch.stack([row.sum() for row in kept]), rtol=1e-4)


def test_a_thousand_consumers_share_one_value_and_one_program(shared: VLLM) -> None:
    model, layer = shared, shared.model.layers[1]
    before = model.stats()
    strengths = [0.001 * i for i in range(1000)]
    logits = []
    with model.trace(**GREEDY, max_tokens=1) as tracer:
        with tracer.invoke(CLEAN):
            vector = layer.output[0][-1]
            saved = vector.save()
        for strength in strengths:
            with tracer.invoke(OTHER[:2]):
                layer.output[0][-1] += strength * vector
                logits.append(model.logits.output.save())
    stats = model.stats()
    assert (stats.exported - before.exported, stats.imported - before.imported) == (1, 1000)
    assert stats.program_misses - before.program_misses == 2
    assert stats.one_by_one == before.one_by_one and stats.alone - before.alone < 50
    for i in (0, 500, 999):
        with model.trace(OTHER[:2], **GREEDY, max_tokens=1):
            layer.output[0][-1] += strengths[i] * saved
            expected = model.logits.output.save()
        assert_close(logits[i].value, expected)


def test_every_sample_of_a_consumer_gets_the_value(model: VLLM) -> None:
    with model.trace(max_tokens=2, ignore_eos=True, seed=3) as tracer:
        with tracer.invoke(CLEAN):
            h = model.model.layers[0].output[0][-1]
            saved = h.save()
        with tracer.invoke(OTHER, n=3):
            got = h.clone()
            got += 1
            three = got.save()
    assert len(three) == 3 and all(torch.equal(one, saved + 1) for one in three)


def test_a_consumer_of_a_request_that_fails_fails_with_its_error_and_both_lines(model: VLLM) -> None:
    with pytest.raises(ExceptionGroup) as caught, model.trace(**GREEDY, max_tokens=6) as tracer:
        with tracer.invoke(CLEAN):
            h = model.model.layers[0].output[0]
            bad = h[(h.sum() * 0 + 1000).long()]
        with tracer.invoke(OTHER):
            model.model.layers[0].output[0][-1] = bad
            never = model.logits.output.save()
        with tracer.invoke(OTHER):
            fine = model.logits.output.save()
    own, others = caught.value.exceptions
    assert "IndexError" in str(own) and "bad = h[" in str(own)
    assert "never be there: IndexError: index 1000 is out of bounds" in str(others)
    assert "bad = h[" in str(others) and "output[0][-1] = bad" in str(others)
    assert fine.shape == (1, 500)
    with pytest.raises(nv.ValueNotSetError):
        _ = never.value


def test_a_consumer_of_a_request_that_stops_first_fails_where_it_needs_the_value(model: VLLM) -> None:
    with pytest.raises(InterventionError, match="it stopped before"), model.trace(**GREEDY, max_tokens=6) as tracer:
        with tracer.invoke(CLEAN):
            tracer.stop()
            h = model.model.layers[0].output[0][-1]
        with tracer.invoke(OTHER):
            rows = nv.list().save()
            with tracer.iter[0:2]:
                rows.append(model.model.layers[0].output[0][-1])
            with tracer.iter[2]:
                model.model.layers[0].output[0][-1] = h
            done = tracer.result.save()
    assert len(done.token_ids) == 2 and len(rows) == 2 and done.finish_reason == "error"


def test_a_consumer_of_a_request_that_ends_early_fails(shared: VLLM) -> None:
    model = shared
    with model.trace(CLEAN, **GREEDY, max_tokens=2) as tracer:
        first = tracer.result.save()
    with pytest.raises(InterventionError, match="it ended before"), model.trace(**GREEDY, max_tokens=6) as tracer:
        with tracer.invoke(CLEAN, stop_token_ids=[first.token_ids[0]], ignore_eos=False):
            with tracer.iter[3]:
                h = model.model.layers[0].output[0][-1]
        with tracer.invoke(OTHER):
            model.model.layers[0].output[0][-1] = h


def test_plain_requests_dont_see_what_passes_between_others(model: VLLM) -> None:
    """The steps have the same shapes with and without the edit."""

    def plain(edits: bool) -> Any:
        assert model.llm.reset_prefix_cache()
        with model.trace(**GREEDY, max_tokens=6, logprobs=5) as tracer:
            with tracer.invoke(CLEAN):
                h = model.model.layers[0].output[0][-1]
            with tracer.invoke(OTHER):
                if edits:
                    model.model.layers[0].output[0][-1] = h
                else:
                    h.sum()
            with tracer.invoke([1, 2, 3]):
                result = tracer.result.save()
        return [{id: one.logprob for id, one in step.items()} for step in result.logprobs]

    assert plain(True) == plain(False)


def test_consumers_of_different_values_share_nothing_of_the_cache(shared: VLLM) -> None:
    model, prompt = shared, [3] * 40
    found = []
    for producer in (CLEAN, OTHER, CLEAN):
        with model.trace(**GREEDY, max_tokens=1) as tracer:
            with tracer.invoke(producer):
                h = model.model.layers[0].output[0][-1]
            with tracer.invoke(prompt):
                model.model.layers[0].output[0][:] += h
                logits = model.logits.output.save()
                result = tracer.result.save()
        assert result.num_cached_tokens == 0
        found.append(logits)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert_close(found[2], found[0])


def test_values_of_prompts_that_come_in_pieces(model: VLLM) -> None:
    """Of a hundred tokens, sixty-four fit into a step."""
    layers, long, other = model.model.layers, list(range(3, 103)), list(range(200, 300))
    with model.trace(**GREEDY, max_tokens=2) as tracer:
        with tracer.invoke(long):
            whole = layers[0].output[0]
            saved = whole.save()
            row = whole[-1] * 2
        with tracer.invoke(other):
            layers[1].output[0][-1] = row
            patched = model.logits.output.save()
        with tracer.invoke(CLEAN):
            layers[1].output[0][-1] = whole[3] + whole[90]
            summed = model.logits.output.save()
            sizes = whole.sum(-1).save()
    assert saved.shape[0] == sizes.shape[0] == 100 and torch.allclose(sizes, saved.sum(-1), atol=1e-3)
    for prompt, value, got in ((other, saved[-1] * 2, patched), (CLEAN, saved[3] + saved[90], summed)):
        with model.trace(prompt, **GREEDY, max_tokens=2):
            layers[1].output[0][-1] = value
            expected = model.logits.output.save()
        assert_close(got, expected)


def test_a_value_flows_from_trace_to_trace_of_a_session(model: VLLM) -> None:
    layers = model.model.layers
    with model.session():
        with model.trace(CLEAN, **GREEDY, max_tokens=1):
            last = layers[3].output[0][-1, :]  # no .save()
            t1 = model.lm_head.output.argmax(dim=-1).save()
        with model.trace(OTHER, **GREEDY, max_tokens=1):
            layers[1].output[0][-1, :] = last[:]
            logits = model.logits.output.save()
    with model.trace(CLEAN, **GREEDY, max_tokens=1):
        saved = layers[3].output[0][-1].save()
        expected_t1 = model.lm_head.output.argmax(dim=-1).save()
    with model.trace(OTHER, **GREEDY, max_tokens=1):
        layers[1].output[0][-1] = saved
        expected = model.logits.output.save()
    assert torch.equal(t1, expected_t1)
    assert_close(logits, expected)


def test_a_session_goes_over_prompts_and_over_the_rows_of_a_value(shared: VLLM) -> None:
    model, layers = shared, shared.model.layers
    with model.session() as session:
        with model.trace(CLEAN, **GREEDY, max_tokens=1):
            rows = layers[0].output[0]
            kept = rows.save()
        results = nv.list().save()
        for row in rows:
            with session.iter([OTHER, CLEAN]) as prompt:
                with model.trace(prompt, **GREEDY, max_tokens=1):
                    layers[0].output[0][-1] = row
                    results.append(layers[0].output[0][-1].save())
    assert len(results) == 2 * len(CLEAN)
    assert torch.equal(torch.stack(results[::2]), kept) and torch.equal(torch.stack(results[1::2]), kept)


def test_errors_in_a_session_name_the_trace(shared: VLLM) -> None:
    model = shared
    with pytest.raises(ExceptionGroup) as caught, model.session():
        with model.trace(CLEAN, **GREEDY, max_tokens=1):
            h = model.model.layers[0].output[0]
            bad = h[(h.sum() * 0 + 1000).long()]
        with model.trace(OTHER, **GREEDY, max_tokens=1):
            model.model.layers[0].output[0][-1] = bad
    first, second = map(str, caught.value.exceptions)
    assert first.startswith("trace 1 of the session (") and second.startswith("trace 2 of the session (")
    assert "IndexError" in first and "IndexError" in second


# -- strangers, who write their own graphs and links ---------------------------------------------------------------------


def raw(model: VLLM, *requests: tuple[list[Node], Links]) -> list[Any]:
    """Send hand-written graphs with links past our front end. Returns vLLM's outputs."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            **GREEDY,
            max_tokens=4,
            extra_args=encode_extras(RequestExtras([encode(Graph(Block(nodes)))], links)),
        )
        for nodes, links in requests
    ]
    prompts = [{"prompt_token_ids": CLEAN, "cache_salt": f"{id(params)} {i}"} for i in range(len(params))]
    outputs = model.llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


SITE = "model.layers.0.output"
MAKES: list[Node] = [Read(0, SITE, 0), Export(1, "k", Ref(0))]
NEEDS: list[Node] = [Import(0, "k", 0), Read(1, SITE, 0), Op(2, "py.setitem", [Ref(1), Slice(), Ref(0)], writes=SITE)]


@pytest.mark.parametrize(
    "requests",
    [
        [(NEEDS, Links("x", 1, needs=[Need("k", 0, 0)]))],
        [(NEEDS, Links("x", 1))],
        [(MAKES, Links("x", 1))],
        [
            ([*NEEDS, Export(3, "l", Ref(0))], Links("x", 2, {"l": 1}, [Need("k", 0, 0)])),
            (
                [Import(0, "l", 0), Export(1, "k", Ref(0))],
                Links("x", 2, {"k": 1}, [Need("l", 0, 0)]),
            ),
        ],
    ],
    ids=["nobody makes it", "the links don't say so", "an export without a name", "a circle"],
)
def test_a_strangers_links_fail_their_own_requests(shared: VLLM, requests: list[tuple[list[Node], Links]]) -> None:
    for output in raw(shared, *requests):
        assert output.finish_reason == "abort"


def test_values_of_a_stranger_who_counts_wrong_are_gone_with_the_bundle(shared: VLLM) -> None:
    links = Links("y", 2, {"k": 1000}), Links("y", 2, needs=[Need("k", 0, 0)])
    outputs = raw(shared, *zip([MAKES, NEEDS], links, strict=True))
    assert [output.finish_reason for output in outputs] == ["length", "length"]


def test_an_aborted_request_fails_who_waits_for_it(shared: VLLM) -> None:
    from vllm import SamplingParams

    engine = shared.llm.llm_engine
    late: list[Node] = [Read(0, SITE, 50), Export(1, "k", Ref(0))]
    links = Links("z", 2, {"k": 1}), Links("z", 2, needs=[Need("k", 0, 0)])
    for name, nodes, linked in zip(("maker", "user"), (late, NEEDS), links, strict=True):
        extra = encode_extras(RequestExtras([encode(Graph(Block(nodes)))], linked))
        params = SamplingParams(**GREEDY, max_tokens=60, extra_args=extra)
        engine.add_request(name, {"prompt_token_ids": CLEAN}, params)
    ended: dict[str, Any] = {}
    is_aborted = False
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.request_id == "maker" or output.finished  # the other never runs
            if output.finished:
                ended[output.request_id] = output.outputs[0]
        if not is_aborted:
            engine.abort_request(["maker"])
            is_aborted = True
    assert ended["user"].finish_reason == "abort" and not ended["user"].token_ids
