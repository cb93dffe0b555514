"""Prompts in several steps give what they give in one, whatever the chunks; and what needs them whole says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from generated import LOOKS, STEPS, Plan, build, compare
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from safetensors.torch import save as save_tensor
from torch import Tensor
from toy import HIDDEN, Toy, graph

from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.nodes import (
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Dots,
    Graph,
    Iterations,
    List,
    Log,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Stop,
    Tuple,
    Write,
)
from nnsight_vllm.plan.chunking import Unchunked, chunking_of
from nnsight_vllm.plan.chunks import Chunked
from nnsight_vllm.wire.limits import Limits

PROMPT = 7
ALL = Slice()


@dataclass
class Long(Toy):
    """Rows differ by their positions: each layer adds `1 + position / 8`, and the column's number to odd positions."""

    modules: tuple[str, ...] = ("double",)
    where: list[int] = field(default_factory=list)

    def step(self, **rows: tuple[int, int]) -> dict[str, Tensor]:
        self.where = [position + i for count, position in rows.values() for i in range(count)]
        return super().step(**rows)

    def _increments(self, rows: int) -> Tensor:
        at = torch.tensor(self.where, dtype=torch.float32)[:, None]
        return 1 + at / 8 + (at % 2) * torch.arange(HIDDEN)

    def prompt(self, *ends: int, iterations: int = 3, **others: tuple[int, int]) -> Tensor:
        """Request r, its prompt in pieces that end at these positions, then its answer. Returns its stream's rows."""
        starts = [0, *ends]
        found = [self.step(r=(end - start, start), **others)["r"] for start, end in zip(starts, ends, strict=False)]
        for iteration in range(1, iterations):
            found.append(self.step(r=(1, ends[-1] + iteration - 1))["r"])
        return torch.cat(found)


def read(id: int, site: str, iteration: int | None = 0) -> Read:
    return Read(id, site, iteration)


def part(id: int, of: int, key: Any) -> Op:
    return Op(id, "py.getitem", [Ref(of), key])


def save(id: int, of: int) -> Save:
    return Save(id, f"s{id}", Ref(of))


def add(id: int, to: int, value: Any, site: str = "1.out") -> Op:
    return Op(id, "py.iadd", [Ref(to), value], writes=site)


def put(id: int, to: int, key: Any, value: Any, site: str = "1.out") -> Op:
    return Op(id, "py.setitem", [Ref(to), key, value], writes=site)


def append(id: int, to: int, value: int) -> Op:
    return Op(id, "py.append", [Ref(to), Ref(value)])


def every(*body: Node, start: int = 0, stop: int | None = None) -> Iterations:
    return Iterations(90, start, stop, 1, 91, Block(list(body)))


GRAPHS: dict[str, list[Node]] = {
    "saves of all rows": [read(0, "0.mlp"), save(1, 0), read(2, "1.out"), save(3, 2), read(4, "2.out"), save(5, 4)],
    "before and after": [
        read(0, "1.out"),
        save(1, 0),
        add(2, 0, 3.0),
        save(3, 0),
        Op(4, "py.mul", [Ref(0), 2]),
        save(5, 4),
    ],
    "an add": [read(0, "1.out"), part(1, 0, ALL), add(2, 1, 0.5)],
    "gated": [
        read(0, "0.out"),
        Op(1, "tensor.norm", [Ref(0)], {"dim": -1, "keepdim": True}),
        Op(2, "py.mul", [Ref(0), Ref(1)]),
        Write(3, "1.mlp", Ref(2), 0),
        save(4, 1),
    ],
    "the last row": [
        read(0, "1.out"),
        part(1, 0, -1),
        save(2, 1),
        Op(3, "tensor.mean", [Ref(1)]),
        add(4, 1, Ref(3)),
        Log(5, [Ref(3)]),
        part(6, 0, Slice(-1)),
        Call(7, "double", [Ref(6)]),
        save(8, 7),
    ],
    "the last row by number": [
        read(0, "1.out"),
        part(1, 0, 6),
        Op(2, "tensor.sum", [Ref(1)]),
        save(3, 2),
        add(4, 1, 1.5),
    ],
    "rows by number": [
        read(0, "1.out"),
        part(1, 0, 2),
        save(2, 1),
        add(3, 1, 10.0),
        save(4, 1),
        put(5, 0, -3, 7.0),
        part(6, 0, 5),
        Op(7, "py.mul", [Ref(6), Ref(6)]),
        put(8, 0, 5, Ref(7)),
        save(9, 0),
    ],
    "slices": [
        read(0, "1.out"),
        part(1, 0, Slice(1, 5)),
        Op(2, "tensor.mul_", [Ref(1), 3.0], writes="1.out"),
        part(3, 0, Slice(None, 3)),
        save(4, 3),
        part(5, 0, Slice(-3)),
        save(6, 5),
        put(7, 0, Slice(3), 1.0),
        put(8, 0, Tuple([Slice(2, 6), 1]), -1.0),
        part(9, 0, Tuple([Slice(2, 6), Slice(1, 3)])),
        save(10, 9),
        save(11, 0),
    ],
    "logits and tokens": [
        read(0, "0.mlp"),
        add(1, 0, 1.0, "0.mlp"),
        read(2, "logits.output"),
        save(3, 2),
        put(4, 2, Tuple([0, 3]), 99.0, "logits.output"),
        save(5, 0),
        read(6, "samples.output"),
        save(7, 6),
    ],
    "every iteration": [
        Op(0, "py.list"),
        save(1, 0),
        every(
            read(2, "1.out", None), append(3, 0, 2), add(4, 2, 2.0), append(5, 0, 2), part(6, 2, -1), append(7, 0, 6)
        ),
    ],
    "every iteration by name": [every(read(2, "1.out", None), add(3, 2, 2.0), save(4, 2))],
    "some iterations": [
        Op(0, "py.list"),
        save(1, 0),
        every(read(2, "1.out", None), append(3, 0, 2), append(4, 0, 91), stop=2),
        Log(5, [Ref(2)]),
    ],
    "the prompt alone": [every(read(2, "1.out", None), add(3, 2, 1.0), stop=1), save(4, 2)],
    "later iterations": [
        read(0, "0.out"),
        part(1, 0, -1),
        every(read(2, "1.out", None), add(3, 2, Ref(1)), start=1),
        save(4, 1),
    ],
    "columns": [
        read(0, "1.out"),
        Op(1, "torch.tensor", [List([0, 2])]),
        put(2, 0, Tuple([Dots(), 1]), 3.0),
        part(3, 0, Tuple([Dots(), Slice(1, 3)])),
        save(4, 3),
        part(5, 0, Tuple([Slice(2, 5), Slice(), None])),
        save(6, 5),
    ],
    "a list": [
        Op(0, "py.list"),
        read(1, "0.out"),
        part(2, 1, Slice(1, 3)),
        append(3, 0, 2),
        append(4, 0, 1),
        save(5, 0),
        Op(6, "py.len", [Ref(0)]),
        save(7, 6),
    ],
    "a dict": [read(0, "0.out"), Op(1, "py.dict", [Dict([("rows", Ref(0)), ("one", 1)])]), save(2, 1)],
    "a tuple of rows": [read(0, "0.out"), part(1, 0, 4), Op(2, "py.tuple", [List([Ref(0), Ref(1)])]), save(3, 2)],
    "the largest": [
        read(0, "1.out"),
        Op(1, "tensor.topk", [Ref(0), 2]),
        Op(2, "py.attr", [Ref(1), "values"]),
        Op(3, "py.attr", [Ref(1), "indices"]),
        save(4, 2),
        save(5, 3),
    ],
    "a value of its own": [
        read(0, "1.out"),
        Op(1, "py.mul", [Ref(0), 2]),
        Op(2, "py.iadd", [Ref(1), Ref(0)]),
        Op(3, "tensor.zero_", [Ref(0)], writes="1.out"),
        save(4, 2),
    ],
    "a module": [read(0, "1.out"), Call(1, "double", [Ref(0)]), save(2, 1)],
    "a branch on the last row": [
        read(0, "1.out"),
        part(1, 0, -1),
        Op(2, "tensor.sum", [Ref(1)]),
        Op(3, "py.gt", [Ref(2), 1.0]),
        Cond(4, Ref(3), Block([add(5, 1, 5.0)], ["high"]), Block([], ["low"]), [6]),
        Save(7, "which", Ref(6)),
        save(8, 0),
    ],
    "a stop": [read(0, "1.out"), add(1, 0, 1.0), save(2, 0), Stop(3)],
    "random": [read(0, "1.out"), part(1, 0, -1), Op(2, "torch.rand", [HIDDEN]), add(3, 1, Ref(2)), save(4, 0)],
}
CUTS = [(1, PROMPT), (3, PROMPT), (6, PROMPT), (2, 4, PROMPT), (1, 2, 3, 4, 5, 6, PROMPT)]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("ends", CUTS, ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_prompt_in_pieces_gives_what_it_gives_whole(name: str, ends: tuple[int, ...], batching: bool) -> None:
    whole, cut = Long(batching=batching), Long(batching=batching)
    for toy in (whole, cut):
        toy.add("r", graph(*GRAPHS[name]), prompt=PROMPT)
    expected, found = whole.prompt(PROMPT), cut.prompt(*ends)
    assert not [delta.failure for delta in cut.received.get("r", []) if delta.failure]
    if name != "a stop":  # what comes after it isn't the graph's
        assert torch.equal(found, expected)
    assert cut.saved.get("r") == whole.saved.get("r")
    logs = [[log for delta in toy.received.get("r", []) for log in delta.logs] for toy in (whole, cut)]
    assert logs[0] == logs[1]
    assert cut.stopped == whole.stopped
    assert cut.executor.leftovers(["r"]) == []


SCHEDULE: dict[str, list[tuple[int, int]]] = {
    "a": [(3, 0), (4, 3), (1, 7), (1, 8)],
    "b": [(2, 0), (3, 2), (2, 5), (1, 7)],
    "c": [(7, 0), (1, 7), (1, 8), (1, 9)],
    "d": [(3, 0), (4, 3), (1, 7)],
    "e": [(5, 0), (2, 5), (1, 7)],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_pieces_of_several_requests_run_together_and_beside_others(name: str) -> None:
    together = Long()
    for request in SCHEDULE:
        together.add(request, graph(*GRAPHS[name]), prompt=PROMPT)
    for at in range(4):
        together.step(plain=(2, at), **{r: steps[at] for r, steps in SCHEDULE.items() if at < len(steps)})
    for request, steps in SCHEDULE.items():
        alone = Long(batching=False)
        alone.add(request, graph(*GRAPHS[name]), prompt=PROMPT)
        for step in [(PROMPT, 0), *(step for step in steps if step[1] >= PROMPT)]:
            alone.step(**{request: step})
        assert together.saved.get(request) == alone.saved.get(request)
    assert together.executor.leftovers(list(SCHEDULE)) == []


def test_edits_by_different_vectors_in_one_visit() -> None:
    toy = Long()
    files = [save_tensor({"tensor": torch.full((HIDDEN,), float(i))}) for i in range(3)]
    toy.store.put(files)
    for i, file in enumerate(files):
        key = hashlib.sha256(file).hexdigest()
        data = graph(
            read(0, "1.out"),
            Const(1, key),
            add(2, 0, Ref(1)),
            Op(3, "py.imul", [Ref(0), 1.0 + i], writes="1.out"),
            save(4, 0),
        )
        toy.add(f"r{i}", data, prompt=4)
    toy.step(r0=(2, 0), r1=(3, 0), r2=(4, 0))
    toy.step(r0=(2, 2), r1=(1, 3))
    base = [[(2 + at / 4) + (at % 2) * 2 * j for j in range(HIDDEN)] for at in range(4)]
    for i in range(3):
        assert toy.saved[f"r{i}"]["s4"] == [[(x + i) * (1.0 + i) for x in row] for row in base]


NEED_ALL: dict[str, tuple[list[Node], str]] = {
    "a mean": ([read(0, "0.out"), Op(1, "tensor.mean", [Ref(0), 0]), save(2, 1)], "mean"),
    "rows onto others": ([read(0, "0.out"), part(1, 0, 0), put(2, 0, 1, Ref(1), "0.out")], "setitem"),
    "the last row onto all": ([read(0, "0.out"), part(1, 0, -1), add(2, 0, Ref(1), "0.out")], "iadd"),
    "an assignment": ([Op(0, "torch.zeros", [HIDDEN]), Write(1, "0.mlp", Ref(0), 0)], "assigned"),
    "a log": ([read(0, "0.out"), Log(1, [Ref(0)])], "log"),
    "a branch": ([read(0, "0.out"), Cond(1, True, Block([add(2, 0, 1.0, "0.out")]), Block([]), [])], "branch"),
    "a branch on rows": ([read(0, "0.out"), Cond(1, Ref(0), Block([]), Block([]), [])], "cond"),
    "a save in a branch": ([read(0, "0.out"), Cond(1, True, Block([save(2, 0)]), Block([]), [])], "kept in a branch"),
    "rows later": ([read(0, "0.out"), read(1, "0.out", 1), Op(2, "py.add", [Ref(0), Ref(1)]), save(3, 2)], "add"),
    "rows kept later": ([read(0, "0.out"), read(1, "0.out", 1), save(2, 0)], "after the prompt"),
    "rows in a later block": ([read(0, "0.out"), every(save(2, 0), start=1)], "save"),
    "random rows": ([read(0, "0.out"), Op(1, "torch.rand_like", [Ref(0)]), add(2, 0, Ref(1), "0.out")], "rand_like"),
    "a view": ([read(0, "0.out"), Op(1, "tensor.t", [Ref(0)]), Op(2, "tensor.zero_", [Ref(1)], writes="0.out")], "t"),
    "a step": ([read(0, "0.out"), part(1, 0, Slice(None, None, 2)), save(2, 1)], "getitem"),
    "columns of the last rows": ([read(0, "0.out"), part(1, 0, Tuple([Dots(), 0, 1])), save(2, 1)], "getitem"),
    "several at once": ([read(0, "0.out"), Op(1, "tensor.topk", [Ref(0), 2]), save(2, 1)], "several"),
    "the token before": ([read(0, "0.out"), part(1, 0, -2), Op(2, "tensor.sum", [Ref(1)]), save(3, 2)], "sum"),
    "a sum of sums": ([read(0, "0.out"), Op(1, "tensor.norm", [Ref(0)], {"dim": -1}), Op(2, "tensor.sum", [Ref(1)], {"dim": -1}), save(3, 2)], "sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEED_ALL)
def test_what_needs_all_rows_fails_in_pieces_and_may_be_sent_again(name: str) -> None:
    nodes, reason = NEED_ALL[name]
    found = chunking_of(Graph(Block(nodes)), lambda site: 1, lambda digest: 1, PROMPT)
    assert isinstance(found, Unchunked) and reason in found.reason
    toy = Long()
    toy.add("r", graph(*nodes), prompt=PROMPT)
    toy.step(r=(3, 0))
    assert toy.failure() == "PreemptedError: the engine ran positions 0 to 2 of a prompt of 7 tokens in one step"
    assert toy.received["r"][0].failure and toy.received["r"][0].failure.retryable


def test_pieces_that_do_not_follow_one_another_fail() -> None:
    toy = Long()
    toy.add("r", graph(read(0, "0.out"), save(1, 0)), prompt=PROMPT)
    toy.step(r=(3, 0))
    toy.step(r=(2, 0))
    assert toy.failure().startswith("PreemptedError: the engine ran positions 0 to 1 of a prompt of 7 tokens")
    assert toy.executor.leftovers(["r"]) == []


def test_rows_that_come_from_the_cache_move_the_others_numbers() -> None:
    whole, cached = Long(), Long()
    nodes: list[Node] = [read(0, "1.out"), part(1, 0, Slice(4)), save(2, 1), put(3, 0, 5, 9.0), part(4, 0, 1), add(5, 4, 1.0), part(6, 0, -3), save(7, 6)]  # fmt: skip
    for toy in (whole, cached):
        toy.add("r", graph(*nodes), prompt=PROMPT)
    whole.prompt(PROMPT)
    cached.step(r=(1, 3))
    cached.step(r=(3, 4))
    assert cached.saved["r"] == whole.saved["r"]


def test_a_graph_never_sees_fewer_rows_than_it_asked_for() -> None:
    toy = Long()
    toy.add("r", graph(read(0, "1.out"), part(1, 0, Slice(2)), save(2, 1)), prompt=PROMPT)
    toy.step(r=(3, 4))
    assert toy.failure() == "InterventionError: rows before position 4 of the prompt weren't computed"


def test_what_is_held_of_a_prompt_is_forgotten_behind_it_and_when_it_is_dropped() -> None:
    toy = Long()
    for name in "ab":
        toy.add(name, graph(read(0, "1.out"), save(1, 0), read(2, "1.out", 3), save(3, 2)), prompt=PROMPT)
    toy.step(a=(3, 0), b=(3, 0))
    held = 3 * HIDDEN * 4
    assert toy.executor._prefill.num_held == 2 * held
    toy.executor.drop(["b"])
    assert toy.executor._prefill.num_held == held
    toy.step(a=(4, 3))
    request = toy.executor.requests["a"]
    assert toy.executor._prefill.num_held == 0 and request.progress is None
    assert not [value for value in [*request.parameters.values(), *request.env.values()] if isinstance(value, Tensor)]
    for at in range(7, 10):
        toy.step(a=(1, at))
    assert list(toy.saved["a"]) == ["s1", "s3"]
    assert toy.executor.leftovers(["a"]) == []


@pytest.mark.parametrize("limits", [Limits(request=100), Limits(engine=100)])
def test_held_rows_count_as_results_and_too_many_end_the_request_behind_its_prompt(limits: Limits) -> None:
    free, toy = Long(), Long(limits=limits)
    data = graph(read(0, "0.out"), save(1, 0), read(2, "1.out"), add(3, 2, 2.0))
    for one in (free, toy):
        one.add("r", data, prompt=9)
    expected = free.prompt(9, iterations=1)
    found = [toy.step(r=rows)["r"] for rows in [(4, 0), (3, 4), (1, 7)]]
    assert toy.executor._prefill.num_held == 0
    found.append(toy.step(r=(1, 8))["r"])
    assert torch.equal(torch.cat(found), expected)  # others may read what it left in the cache
    assert toy.failure().startswith(
        f"InterventionError: the request{'s that run' if limits.request > 100 else ''} saved 112"
    )
    assert toy.received["r"][-1].saves == []
    assert toy.executor.leftovers(["r"]) == []


def test_a_failure_in_a_piece_is_the_requests_own() -> None:
    toy = Long()
    bad = graph(Op(0, "torch.tensor", [List([1, 2])]), read(1, "0.out"), part(2, 1, Tuple([ALL, 99])), save(3, 2))
    toy.add("bad", bad, prompt=PROMPT)
    toy.add("good", graph(read(0, "2.out"), save(1, 0)), prompt=PROMPT)
    toy.step(bad=(3, 0), good=(3, 0))
    toy.step(bad=(4, 3), good=(4, 3))
    assert toy.failure("bad").startswith("IndexError: index 99 is out of bounds")
    assert toy.received["bad"][0].failure and toy.received["bad"][0].failure.node == 2
    assert len(toy.saved["good"]["s1"]) == PROMPT  # type: ignore[arg-type]
    assert toy.executor.leftovers(["bad", "good"]) == []


def test_a_site_that_the_model_skips_fails_the_request_in_its_first_piece() -> None:
    toy = Long(silent_taps=frozenset({2}))
    for name in "ab":
        toy.add(name, graph(read(0, "1.mlp"), save(1, 0)), prompt=PROMPT)
    toy.step(a=(3, 0), b=(2, 0))
    assert toy.failure("a") == toy.failure("b") == "OutOfOrderError: the model ran iteration 0 without passing 1.mlp"
    assert toy.executor.leftovers(["a", "b"]) == []


plans = st.builds(
    Plan,
    st.lists(st.sampled_from(sorted(STEPS)), max_size=4).map(tuple),
    st.lists(st.sampled_from(sorted(LOOKS)), max_size=3).map(tuple),
    st.just(None),
    st.booleans(),
)
borders = st.sets(st.integers(1, PROMPT - 1), max_size=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(plans, st.lists(borders, min_size=1, max_size=3), st.integers(0, 3), st.booleans())
def test_generated_graphs_that_may_be_cut_give_what_they_give_whole(
    plan: Plan, cuts: list[set[int]], seed: int, batching: bool
) -> None:
    whole, toy = Long(batching=batching), Long(batching=batching)
    schedules: dict[str, list[tuple[int, int]]] = {}
    for i, cut in enumerate(cuts):
        data, files = build(plan, seed + i, None)
        found = chunking_of(decode(data), lambda site: 0 if site.startswith("samples") else 1, _rank(files), PROMPT)
        assume(isinstance(found, Chunked))
        for one in (whole, toy):
            one.store.put(files)
            one.add(f"r{i}", data, prompt=PROMPT)
        ends = [0, *sorted(cut), PROMPT, PROMPT + 1, PROMPT + 2]
        schedules[f"r{i}"] = [(end - start, start) for start, end in pairwise(ends)]
    for step in range(7):
        toy.step(
            **{name: steps[step] for name, steps in schedules.items() if step < len(steps) and not over(toy, name)}
        )
    for at in [(PROMPT, 0), (1, PROMPT), (1, PROMPT + 1)]:
        whole.step(**{name: at for name in schedules if not over(whole, name)})
    for name in schedules:
        kinds = [[delta.failure.kind for delta in one.received[name] if delta.failure] for one in (whole, toy)]
        assert kinds[0] == kinds[1]
        saved, expected = toy.saved.get(name, {}), whole.saved.get(name, {})
        assert sorted(saved) == sorted(expected)
        for key in saved:
            compare(saved[key], expected[key], f"{name}.{key}")
    assert toy.executor.leftovers(list(schedules)) == []


def over(toy: Toy, name: str) -> bool:
    return any(delta.failure for delta in toy.received.get(name, []))


def _rank(files: list[bytes]) -> Callable[[str], int]:
    tensors = {hashlib.sha256(file).hexdigest(): load(file)["tensor"] for file in files}
    return lambda digest: tensors[digest].ndim


def test_most_of_the_generated_steps_may_be_cut() -> None:
    whole = set()
    for name in STEPS:
        data, files = build(Plan((name,), (), None, False), 1, None)
        if isinstance(chunking_of(decode(data), lambda site: 1, _rank(files), PROMPT), Unchunked):
            whole.add(name)
    assert whole == {"chosen columns", "cumulated", "flipped", "mean of all", "mean of rows", "transposed"}


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("ends", CUTS, ids=str)
def test_several_programs_of_a_request_run_over_its_pieces_in_their_order(
    ends: tuple[int, ...], batching: bool
) -> None:
    adds = graph(every(read(2, "1.out", None), add(3, 2, 2.0)))
    some = graph(read(0, "1.out"), part(1, 0, Slice(2, 5)), Op(2, "py.imul", [Ref(1), 3.0], writes="1.out"))
    looks = graph(read(0, "1.out"), save(1, 0), part(2, 0, -1), add(3, 2, 1.0), save(4, 0), part(5, 0, 3), save(6, 5))
    whole, cut = Long(batching=batching), Long(batching=batching)
    for toy in (whole, cut):
        toy.add("r", [adds, some, looks], prompt=PROMPT)
    assert torch.equal(cut.prompt(*ends), whole.prompt(PROMPT))
    assert cut.saved["r"] == whole.saved["r"]
    assert cut.executor.leftovers(["r"]) == []
    cut.executor.drop(["r"])
    assert cut.executor.leftovers([]) == []


def test_when_one_program_fails_in_a_piece_those_that_only_edit_go_on() -> None:
    adds = graph(every(read(2, "1.out", None), add(3, 2, 2.0)))
    bad = graph(read(0, "0.out"), part(1, 0, Tuple([ALL, 99])), save(2, 1))
    edited, failing = Long(), Long()
    edited.add("r", adds, prompt=PROMPT)
    failing.add("r", [adds, bad], prompt=PROMPT)
    assert torch.equal(failing.prompt(3, 5, PROMPT, iterations=1), edited.prompt(3, 5, PROMPT, iterations=1))
    assert failing.failure().startswith("IndexError")
    assert failing.executor.leftovers(["r"]) == []
