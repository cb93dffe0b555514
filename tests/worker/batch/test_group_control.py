"""A group of requests gives what its requests give one by one: generated graphs, spans and constants on the toy model."""

from __future__ import annotations

import pytest
import torch
from generated import LOOKS, STEPS, Builder, Plan, build, compare, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import Toy

from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Block, Graph, Iterations
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.ops.operations import OPERATIONS

plans = st.builds(
    Plan,
    st.lists(st.sampled_from(sorted(STEPS)), max_size=4).map(tuple),
    st.lists(st.sampled_from(sorted(LOOKS)), max_size=3).map(tuple),
    st.sampled_from([None, None, "join", "stop"]),
    st.booleans(),
)
prompts = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(plans, min_size=1, max_size=2), prompts, st.integers(0, 3), st.booleans(), st.integers(0, 2))
def test_a_group_gives_what_its_requests_give_alone(
    plans: list[Plan], prompts: list[int], seed: int, identical: bool, late: int
) -> None:
    requests = []
    for i, prompt in enumerate(prompts):
        stop = None if seed == 0 else i % 3 + 1
        data, files = build(plans[i % len(plans)], seed if identical else seed + 10 * i, stop)
        requests.append((data, files, prompt))
    late = min(late, len(requests) - 1)
    grouped, alone = run(requests, 4, True, late), run(requests, 4, False, late)
    for i in range(len(requests)):
        name = f"r{i}"
        failures = [[d.failure.kind for d in toy.received.get(name, []) if d.failure] for toy in (grouped, alone)]
        assert failures[0] == failures[1], (name, [d.failure for d in grouped.received.get(name, []) if d.failure])
        one, other = grouped.saved.get(name, {}), alone.saved.get(name, {})
        assert sorted(one) == sorted(other), name
        for key in one:
            compare(one[key], other[key], f"{name}.{key}")
    assert grouped.stopped == alone.stopped
    for tap in alone.seen:
        for one_tensor, other_tensor in zip(grouped.seen[tap], alone.seen[tap], strict=True):
            compare(one_tensor, other_tensor, f"tap {tap}")
    assert not grouped.executor.leftovers(grouped.executor.requests)


ELEMENTWISE = [
    "add",
    "sub",
    "add a number",
    "scale",
    "the last row",
    "a row of its own",
    "some rows",
    "a column",
    "columns",
    "a part of the last row",
    "zero",
    "assigned",
    "a number assigned",
    "clamped",
    "chosen columns",
    "compared and halved",
    "a private copy",
    "numbers on both sides",
    "added with a strength",
    "replaced",
]


@pytest.mark.parametrize("constants", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_programs_give_the_same_bits(name: str, dtype: str, constants: str) -> None:
    plan = Plan((name, "sub", name), ("all", "compared"), None, False)
    kind: torch.dtype = getattr(torch, constants)
    requests = [(*build(plan, 11 * i, None, kind), 1 + i % 3) for i in range(5)]
    grouped, alone = (run(requests, 3, batching, 1, dtype) for batching in (True, False))
    assert grouped.executor.stats().batched > 0
    assert grouped.saved == alone.saved
    assert grouped.seen == alone.seen
    for toy in (grouped, alone):
        assert not [delta.failure for deltas in toy.received.values() for delta in deltas if delta.failure]


def test_rows_of_others_between_a_groups_keep_their_bits_where_they_are_nan() -> None:
    undefined, column = Plan(("zero", "norm", "a matrix"), (), None, False), Plan(("a column",), (), None, False)
    requests = [(*build(plan, 10 * i, None), 1) for i, plan in enumerate([undefined, column] * 2)]
    grouped, alone = (run(requests, 2, batching, 0) for batching in (True, False))
    assert repr(grouped.seen) == repr(alone.seen)


@pytest.mark.parametrize("batching", [True, False])
def test_a_request_over_its_limit_of_results_fails_and_says_the_numbers(batching: bool) -> None:
    toy = Toy(batching=batching, limits=Limits(request=200, engine=10_000))
    data, _ = build(Plan((), ("the last row",), None, True), 0, None)
    for name in ("a", "b"):
        toy.add(name, data, prompt=1)
    for step in range(3):
        toy.step(a=(1, step), b=(1, step))
    assert [toy.failure(name).split(";")[1] for name in ("a", "b")] == [" max_saved_bytes is 200"] * 2
    toy.executor.drop(["a", "b"])
    assert toy.executor._outgoing.num_saved == 0


def test_all_requests_together_have_a_limit_too() -> None:
    toy = Toy(limits=Limits(request=10_000, engine=500))
    data, _ = build(Plan((), ("the last row",), None, True), 0, None)
    for name in ("a", "b", "c"):
        toy.add(name, data, prompt=1)
    toy.step(a=(1, 0), b=(1, 0), c=(1, 0))
    failed = [name for name in ("a", "b", "c") if any(delta.failure for delta in toy.received[name])]
    assert failed and "max_saved_bytes_in_all is 500" in toy.failure(failed[0])
    assert len(failed) < 3


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_step_is_counted_and_most_are_batched(name: str) -> None:
    requests = [(*build(Plan((name,), (), None, False), 7 * i, None), 2) for i in range(3)]
    toy = run(requests, 2, True, 0)
    stats = toy.executor.stats()
    opaque = {"a direction of the run", "flipped", "transposed", "a row that may not be there", "numbers on both sides"}
    assert bool(stats.prevented) == (name in opaque), (name, stats.prevented)
    assert stats.batched > 0


def test_an_interrupt_inside_of_a_group_is_raised_when_the_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(OPERATIONS, "tensor.relu", interrupted)
    toy = Toy()
    b = Builder(0)
    b.save(b.op("tensor.relu", b.read("1.out")), "never")
    data = encode(Graph(Block([Iterations(1, 0, None, 1, 2, Block(b.nodes))])))
    for name in ("a", "b"):
        toy.add(name, data)
    plain = Builder(0)
    plain.save(plain.op("py.getitem", plain.read("2.mlp"), -1), "last")
    toy.add("c", encode(Graph(Block([Iterations(1, 0, None, 1, 2, Block(plain.nodes))]))))
    with pytest.raises(KeyboardInterrupt):
        toy.step(a=(2, 0), b=(2, 0), c=(2, 0))
    assert [(r.has_failed, r.is_over) for r in toy.executor.requests.values()] == [(True, True)] * 2 + [(False, False)]
    toy.executor.drop(["a", "b"])
    toy.step(c=(1, 2))
    assert toy.saved["c"]["last"]
    assert not toy.executor.leftovers(["c"])
