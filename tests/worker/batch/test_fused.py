"""Edits by tables: programs of any structure at one site at once, their order among saves, and slots that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generated import FULL, STEPS, Builder, compare, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import HIDDEN, LAYERS, Toy

from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Block, Graph, Iterations, Read, Ref, Slice, Tuple
from nnsight_vllm.worker.batch.fused import EditPlan

ELEMENTWISE = ["add", "sub", "scale", "zero", "added with a strength", "replaced"]
PURE = [*ELEMENTWISE, "projected", "clamped along", "norm matched", "low rank", "a feature"]


def in_iterations(b: Builder) -> bytes:
    return encode(Graph(Block([Iterations(1, 0, None, 1, 2, Block(b.nodes))])))


def chain(names: list[str], seed: int, dtype: torch.dtype = torch.float32) -> tuple[bytes, list[bytes]]:
    """Edits of one site in every iteration, and nothing else there."""
    b = Builder(seed, dtype)
    h = b.read("1.out")
    for name in names:
        STEPS[name](b, h)
    b.save(b.read("2.mlp"), "later")
    return in_iterations(b), b.files


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of units that were edited at once, each time."""
    sizes: list[int] = []
    edit = EditPlan.run

    def counted(self: EditPlan, site: Any, tensors: Any) -> None:
        if self.done:
            sizes.append(len(self.done))
        edit(self, site, tensors)

    monkeypatch.setattr(EditPlan, "run", counted)
    return sizes


@pytest.mark.parametrize("constants", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_different_programs_are_edited_at_once_and_have_the_bits_of_each_alone(
    edited: list[int], dtype: str, constants: str
) -> None:
    kind: torch.dtype = getattr(torch, constants)
    chains = [ELEMENTWISE[:i] + ELEMENTWISE[-i:] for i in range(1, 6)]
    requests = [(*chain(names, 7 * i, kind), 1 + i % 3) for i, names in enumerate(chains)]
    together, alone = (run(requests, 4, batching, 1, dtype) for batching in (True, False))
    assert together.saved == alone.saved
    assert together.seen == alone.seen
    assert edited == [4, 5, 5, 5]  # one came a step later
    assert together.executor.stats().alone < alone.executor.stats().alone


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.sampled_from(PURE), min_size=1, max_size=4), min_size=2, max_size=5),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
    st.booleans(),
    st.integers(0, 2),
)
def test_any_edits_give_what_each_gives_alone(
    chains: list[list[str]], prompts: list[int], identical: bool, late: int
) -> None:
    requests = [
        (*chain(names, 0 if identical else 11 * i), prompt)
        for i, (names, prompt) in enumerate(zip(chains, prompts, strict=False))
    ]
    late = min(late, len(requests) - 1)
    together, alone = (run(requests, 3, batching, late) for batching in (True, False))
    for tap in alone.seen:
        for one, other in zip(together.seen[tap], alone.seen[tap], strict=True):
            compare(one, other, f"tap {tap}")
    assert not together.executor.leftovers(together.executor.requests)


def mixed(seed: int) -> tuple[bytes, list[bytes]]:
    """Save, add, save, clamp, save; then a program of other operations, and a save."""
    b = Builder(seed)
    h = b.read("1.out")
    for name in ("add", "clamped along"):
        b.save(b.op("tensor.clone", h), f"before {name}")
        STEPS[name](b, h)
    b.save(b.op("py.getitem", h, -1), "after")
    b.op("py.imul", h, b.op("tensor.sigmoid", h), writes="1.out")
    STEPS["projected"](b, h)
    b.save(h, "end")
    return in_iterations(b), b.files


def test_reads_saves_and_edits_keep_the_order_of_each_program() -> None:
    requests = [(*(mixed(i) if i % 2 else chain(["add", "projected"], i)), 2) for i in range(6)]
    together, alone = (run(requests, 3, batching, 0) for batching in (True, False))
    for i in range(6):
        one, other = together.saved[f"r{i}"], alone.saved[f"r{i}"]
        assert list(one) == list(other) and len(one) == (4 if i % 2 else 1)
        for key in one:
            compare(one[key], other[key], key)
    before, after = together.saved["r1"]["before add"], together.saved["r1"]["before clamped along"]
    assert before != after != together.saved["r1"]["end"]


def test_slots_are_freed_with_their_requests_and_a_table_grows() -> None:
    toy = Toy()
    for i in range(40):
        data, files = chain(["add", "projected"], i)
        toy.store.put(files)
        toy.add(f"r{i}", data)
    toy.step(**{f"r{i}": (2, 0) for i in range(40)})
    tables = toy.executor._tables
    assert (tables.num_lines, tables.num_users) == (80, 80)
    assert not toy.executor.leftovers(toy.executor.requests)
    toy.executor.drop([f"r{i}" for i in range(39)])
    assert (tables.num_lines, tables.num_users) == (2, 2)
    toy.executor.drop(["r39"])
    assert (tables.num_lines, tables.num_users) == (0, 0)
    assert not toy.executor.leftovers([])


@pytest.mark.parametrize("limit", ["MAX_LINE", "MAX_TABLE"])
def test_an_edit_without_room_in_a_table_runs_without_one(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(f"nnsight_vllm.worker.batch.tables.{limit}", 1)
    requests = [(*chain(["add", "projected"], i), 2) for i in range(3)]
    together, alone = (run(requests, 2, batching, 0) for batching in (True, False))
    for tap in alone.seen:
        for one, other in zip(together.seen[tap], alone.seen[tap], strict=True):
            compare(one, other, f"tap {tap}")
    assert together.executor._tables.num_lines <= 2


def test_equal_edits_share_a_line() -> None:
    toy = Toy()
    data, files = chain(["add"], 0)
    toy.store.put(files)
    for name in ("a", "b", "c"):
        toy.add(name, data)
    assert (toy.executor._tables.num_lines, toy.executor._tables.num_users) == (1, 3)


@pytest.mark.parametrize("shape", [(HIDDEN + 1,), (2, HIDDEN), ()])
def test_a_vector_that_does_not_fit_fails_its_request_alone(edited: list[int], shape: tuple[int, ...]) -> None:
    toy = Toy()
    b = Builder(0)
    h = b.read("1.out")
    b.op("edit.project_out_", h, b.const(*shape), 1.0, writes="1.out")
    toy.store.put(b.files)
    toy.add("bad", in_iterations(b))
    for i in range(3):
        data, files = chain(["projected"] if i < 2 else ["scale"], i)
        toy.store.put(files)
        toy.add(f"good{i}", data)
    toy.step(bad=(2, 0), good0=(2, 0), good1=(2, 0), good2=(2, 0))
    assert "project_out: expected directions [4]" in toy.failure("bad")
    assert edited == [2]
    assert not [delta.failure for name in ("good0", "good1", "good2") for delta in toy.received[name] if delta.failure]


def test_an_edit_that_fails_in_the_kernel_fails_who_took_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(EditPlan, "run", broken)
    toy = Toy()
    for i, names in enumerate((["add"], ["scale"])):
        data, files = chain(names, i)
        toy.store.put(files)
        toy.add(f"r{i}", data)
    b = Builder(0)
    b.save(b.op("py.getitem", b.read("1.out"), -1), "last")
    toy.add("other", in_iterations(b))
    toy.step(r0=(2, 0), r1=(2, 0), other=(2, 0))
    assert [toy.failure(name) for name in ("r0", "r1")] == ["RuntimeError: no kernel"] * 2
    assert toy.saved["other"]["last"]


def test_a_site_where_more_happens_is_not_fused() -> None:
    from nnsight_vllm.plan.program import compile_graph
    from nnsight_vllm.plan.template import split

    def fused(body: Any) -> int:
        b = Builder(0)
        body(b)
        return len(compile_graph(split(Graph(Block([Iterations(1, 0, None, 1, 2, Block(b.nodes))]))).graph).fused)

    def saved(b: Builder) -> None:
        h = b.read("1.out")
        STEPS["add"](b, h)
        b.save(h, "h")

    def used_later(b: Builder) -> None:
        h = b.read("1.out")
        STEPS["add"](b, h)
        b.op("py.iadd", b.read("2.mlp"), h, writes="2.mlp")

    def part(b: Builder) -> None:
        b.op("py.iadd", b.op("py.getitem", b.read("1.out"), Slice(1, None)), b.const(HIDDEN), writes="1.out")

    def columns(b: Builder) -> None:
        b.op("py.setitem", b.read("1.out"), Tuple([FULL, 1]), 0.0, writes="1.out")

    def computed(b: Builder) -> None:
        h = b.read("1.out")
        b.op("py.iadd", h, b.op("tensor.relu", Ref(h.id)), writes="1.out")

    def picked(b: Builder) -> None:
        h = b.read("1.out")
        STEPS["add"](b, h)
        b.op("py.getitem", h, -3)  # there may be no such row

    def twice(b: Builder) -> None:
        STEPS["add"](b, b.read("1.out"))
        STEPS["scale"](b, b.read("1.out"))

    assert [fused(body) for body in (saved, used_later, part, columns, computed, picked)] == [0, 0, 0, 0, 0, 0]
    assert fused(twice) == 1


def by_iteration(name: str, seed: int) -> tuple[bytes, list[bytes], int]:
    """Another edit of one site in each of two iterations."""
    b = Builder(seed)
    for iteration in (1, 2):
        for site in ("1.out", "2.mlp"):
            b.nodes.append(Read(b.id(), site, iteration))
            if site == "1.out":
                b.op(name, Ref(b.nodes[-1].id), b.const(HIDDEN), writes=site)
            else:
                b.save(Ref(b.nodes[-1].id), f"{iteration}")
    return encode(Graph(Block(b.nodes))), b.files, 2


def test_each_iteration_has_its_own_edits_though_the_same_rows_come() -> None:
    requests = [by_iteration("py.iadd", 1), by_iteration("tensor.sub_", 2)]
    for steps in (2, 3):
        together, alone = (run(requests, steps, batching, 0) for batching in (True, False))
        assert together.seen == alone.seen


def test_sites_whose_rows_have_the_same_lines_share_what_is_planned_until_others_come() -> None:
    toy = Toy()
    b = Builder(0)
    vector = b.const(HIDDEN)
    for layer in range(LAYERS):
        b.op("py.iadd", b.read(f"{layer}.out"), vector, writes=f"{layer}.out")
    toy.store.put(b.files)
    rows: dict[str, tuple[int, int]] = {}
    maps = toy.executor._fused._maps
    for number in range(4):  # nobody ends
        toy.add(f"r{number}", in_iterations(b))
        rows = {name: (1, position + count) for name, (count, position) in rows.items()} | {f"r{number}": (2, 0)}
        toy.step(**rows)
        assert len(maps) <= 1
    rows = {name: (1, position + count) for name, (count, position) in rows.items()}
    toy.step(**rows)
    (shared,) = maps.values()
    assert shared.added is not None and shared.added.shape == (1, HIDDEN)
    del shared
    toy.executor.drop(["r0"])
    assert not maps
