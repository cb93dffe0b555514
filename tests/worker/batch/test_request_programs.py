"""Several programs of one request: their order at a site, their common end, and that groups of such requests change nothing."""

from __future__ import annotations

import pytest
import torch
from generated import EDITS, LOOKS, STEPS, Builder, compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import HIDDEN, Toy, graph

from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Block, Graph, Iterations, Log, Node, Op, Read, Ref, Save, Slice, Stop, Write
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.wire.extras import MAX_PROGRAMS
from nnsight_vllm.wire.limits import Limits

FULL = Slice()
FAILS = Op(9, "py.iadd", [Ref(0), "text"], writes="1.out")


@pytest.fixture(params=[True, False], ids=["batching", "alone"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(batching=request.param)


def always(*nodes: Node, before: list[Node] | None = None) -> bytes:
    """A program that does this in every iteration."""
    return encode(Graph(Block([*(before or []), Iterations(1000, 0, None, 1, 1001, Block(list(nodes)))])))


def change(name: str, number: float, site: str = "1.out") -> bytes:
    return always(Read(0, site, None), Op(1, name, [Ref(0), number], writes=site))


def look(site: str, name: str = "x") -> bytes:
    kept: list[Node] = [Op(50, "py.list"), Save(51, name, Ref(50))]
    return always(Read(0, site, None), Op(1, "py.append", [Ref(50), Ref(0)]), before=kept)


ADD, SCALE = change("py.iadd", 3), change("py.imul", 2)


def two(toy: Toy, data: bytes | list[bytes], steps: int = 3) -> dict[str, dict[str, object]]:
    """Two equal requests of different prompts beside a plain one; what they saved."""
    toy.add("a", data, prompt=2)
    toy.add("b", data, prompt=1)
    for step in range(steps):
        streams = toy.step(a=(1, step + 1) if step else (2, 0), plain=(1, step), b=(1, step))
        assert streams["plain"].tolist() == [[3.0] * HIDDEN]
    return toy.saved


def clean(toy: Toy) -> None:
    assert not any(failure.kind == "GraphError" for name in toy.received for failure in failures(toy, name))
    forget(toy)


def forget(toy: Toy) -> None:
    assert not toy.executor.leftovers(toy.executor.requests)
    toy.executor.drop(list(toy.executor.requests))
    assert not toy.executor.leftovers([])
    executor = toy.executor
    known = executor._population
    assert not (known.requests or known.alone or known.groups or known.several or known.ended)
    assert executor._outgoing.num_saved == 0 and executor._tables.num_users == 0


@pytest.mark.parametrize(("programs", "expected"), [((ADD, SCALE), 10.0), ((SCALE, ADD), 7.0)])
def test_a_later_program_sees_what_an_earlier_one_wrote(toy: Toy, programs: tuple[bytes, ...], expected: float) -> None:
    saved = two(toy, [*programs, look("1.out")])
    assert saved["a"]["x"] == [[[expected] * HIDDEN] * rows for rows in (2, 1, 1)]
    assert saved["b"]["x"] == [[[expected] * HIDDEN]] * 3
    clean(toy)


def test_an_earlier_program_does_not_see_what_a_later_one_writes_at_the_same_site(toy: Toy) -> None:
    saved = two(toy, [look("1.out"), ADD, look("2.mlp", "y"), look("2.out", "z")])
    assert saved["a"]["x"] == [[[2.0] * HIDDEN] * rows for rows in (2, 1, 1)]
    assert saved["a"]["z"] == [[[6.0] * HIDDEN] * rows for rows in (2, 1, 1)]
    clean(toy)


@pytest.mark.parametrize("reversed_", [False, True])
def test_at_a_tap_of_several_sites_the_earlier_site_comes_first(toy: Toy, reversed_: bool) -> None:
    """The first program's later site waits for the second's earlier one."""
    programs = [change("py.imul", 5, "0.mlp.again"), change("py.iadd", 1, "0.mlp")]
    saved = two(toy, [*(reversed(programs) if reversed_ else programs), look("0.mlp.again")])
    assert saved["a"]["x"] == [[[10.0] * HIDDEN] * rows for rows in (2, 1, 1)]
    clean(toy)


def test_one_program_may_visit_both_sites_of_a_tap_with_another_between(toy: Toy) -> None:
    both = always(
        Read(0, "0.mlp", None),
        Op(1, "py.iadd", [Ref(0), 1], writes="0.mlp"),
        Read(2, "0.mlp.again", None),
        Op(3, "py.imul", [Ref(2), 3], writes="0.mlp.again"),
    )
    saved = two(toy, [both, change("py.iadd", 10, "0.mlp"), look("0.mlp.again")])
    assert saved["a"]["x"][0] == [[36.0] * HIDDEN] * 2  # type: ignore[index]
    clean(toy)


def test_two_programs_of_one_request_are_never_one_group() -> None:
    toy = Toy()
    toy.add("a", [ADD, ADD, ADD, look("1.out")], prompt=2)
    toy.add("b", [ADD, ADD, ADD, look("1.out")], prompt=2)
    toy.step(a=(2, 0), b=(2, 0))
    assert [sorted(group.ids) for group in toy.executor._population.groups] == [["a", "b"]] * 4
    assert toy.saved["a"]["x"] == [[[11.0] * HIDDEN] * 2]
    clean(toy)


def test_what_several_programs_save_comes_home(toy: Toy) -> None:
    own = graph(
        Read(0, "0.out", 0), Save(1, "kept", Ref(0)), Log(2, ["here"]), Read(3, "2.out", 1), Save(4, "k", Ref(3))
    )
    saved = two(toy, [ADD, own, look("1.out"), look("2.mlp", "y")])
    assert saved["a"]["kept"] == [[1.0] * HIDDEN] * 2
    assert saved["a"]["k"] == [[6.0] * HIDDEN]
    assert [len(saved["b"][name]) for name in ("x", "y")] == [3, 3]  # type: ignore[arg-type]
    assert [delta.logs for delta in toy.received["a"] if delta.logs] == [["here"]]
    clean(toy)


def failures(toy: Toy, name: str) -> list[Failure]:
    return [delta.failure for delta in toy.received.get(name, []) if delta.failure]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_that_fails_fails_the_request_once_and_says_which(toy: Toy, number: int) -> None:
    programs = [ADD, SCALE, look("2.out")]
    programs[number] = always(Read(0, "1.out", None), FAILS)
    two(toy, programs, 1)
    for name in ("a", "b"):
        (failure,) = failures(toy, name)
        assert (failure.kind, failure.node, failure.program) == ("TypeError", 9, number)
    toy.step(plain=(1, 1))
    clean(toy)


def test_edits_go_on_as_long_as_rows_are_computed_for_a_request_that_failed_or_stopped(toy: Toy) -> None:
    for name, early in (("a", FAILS), ("b", Stop(9))):
        toy.add(name, [change("py.iadd", 5, "2.mlp"), always(Read(0, "1.out", None), early)], prompt=1)
    for position in range(3):
        streams = toy.step(a=(1, position), plain=(1, position), b=(1, position))
        assert [streams[name].tolist() for name in ("a", "plain", "b")] == [
            [[8.0] * HIDDEN],
            [[3.0] * HIDDEN],
            [[8.0] * HIDDEN],
        ]
    assert toy.stopped == ["b"] and [f.kind for f in failures(toy, "a")] == ["TypeError"]
    clean(toy)


def test_a_stop_stops_all_and_what_comes_later_is_not_saved(toy: Toy) -> None:
    stops = always(Read(0, "1.out", None), Op(1, "py.iadd", [Ref(0), 1], writes="1.out"), Stop(9))
    saved = two(toy, [look("0.mlp", "before"), stops, look("1.mlp", "x"), look("2.mlp", "after")], 1)
    for name in ("a", "b"):
        assert [len(saved[name][key]) for key in ("before", "x", "after")] == [1, 1, 0]  # type: ignore[arg-type]
        assert not failures(toy, name)
    assert sorted(toy.stopped) == ["a", "b"]
    clean(toy)


def test_a_program_that_cannot_be_loaded_fails_the_request(toy: Toy) -> None:
    toy.add("a", [ADD, b"nonsense", look("1.out")])
    toy.add("b", [])
    toy.add("c", [look("1.out"), look("2.out")])
    toy.add("d", [ADD] * (MAX_PROGRAMS + 1))
    toy.add("e", [ADD, 7])  # type: ignore[list-item]
    toy.step(**{name: (2, 0) for name in "abcde"})
    found = {name: failures(toy, name)[0].message for name in "abcde"}
    assert "not an intervention graph" in found["a"] and "not an intervention graph" in found["b"]
    assert found["c"] == "two graphs of the request save under the name 'x'"
    assert found["d"] == f"a request carries {MAX_PROGRAMS + 1} graphs; the limit is {MAX_PROGRAMS}"
    assert {len(failures(toy, name)) for name in "abcde"} == {1}
    forget(toy)


@pytest.mark.parametrize("limit", [400, 600, 900])
def test_a_limit_counts_what_all_programs_of_a_request_send(limit: int) -> None:
    found = []
    for batching in (True, False):
        toy = Toy(batching=batching, limits=Limits(request=limit))
        data = [ADD, look("0.out"), look("1.out", "y"), look("2.out", "z")]
        for name in ("a", "b"):
            toy.add(name, data, prompt=1)
        for step in range(8):
            alive = [name for name in ("a", "b") if not failures(toy, name)]
            if alive:
                toy.step(**{name: (1, step) for name in alive})
        assert all(f"max_saved_bytes is {limit}" in toy.failure(name) for name in ("a", "b"))
        found.append(step)
        clean(toy)


def test_an_interrupted_request_fails_once_with_all_its_programs(toy: Toy) -> None:
    two(toy, [ADD, SCALE, look("1.out")], 2)
    toy.step(a=(3, 0), b=(1, 2))
    (failure,) = failures(toy, "a")
    assert failure.kind == "PreemptedError" and failure.retryable
    assert len(toy.saved["b"]["x"]) == 3  # type: ignore[arg-type]
    clean(toy)


def test_members_that_miss_a_step_go_on_alone(toy: Toy) -> None:
    data = [ADD, SCALE, look("1.out")]
    for name in ("a", "b", "c"):
        toy.add(name, data, prompt=1)
    toy.step(a=(1, 0), b=(1, 0), c=(1, 0))
    toy.step(a=(1, 1), c=(1, 1))
    toy.step(b=(1, 1))
    toy.step(c=(1, 2), b=(1, 2), a=(1, 2))
    assert all(toy.saved[name]["x"] == [[[10.0] * HIDDEN]] * 3 for name in ("a", "b", "c"))
    clean(toy)


def test_random_programs_draw_the_same_alone_and_beside_others() -> None:
    noise = always(
        Read(0, "1.out", None), Op(1, "torch.randn_like", [Ref(0)]), Op(2, "py.iadd", [Ref(0), Ref(1)], writes="1.out")
    )
    one = Toy().run([noise, look("1.out")])
    assert one == Toy().run([noise, change("py.iadd", 0), look("1.out")])
    assert Toy().run([noise, noise, look("1.out")]) != Toy().run([noise, change("py.imul", 2), look("1.out")])


def chained(steps: list[str], look_: str, seed: int, as_one: bool) -> tuple[bytes | list[bytes], list[bytes]]:
    """These steps and a look behind them: as one program, or as one after the other."""
    builders = [Builder(seed)]
    for number, name in enumerate([*steps, look_]):
        b = builders[-1]
        h = b.read("1.out")
        if number < len(steps):
            STEPS[name](b, h)
        else:
            b.save(b.op("tensor.clone", h), "after")
            b.save(LOOKS[name](b, h), "look")
        if not as_one:
            builders.append(Builder(0))
            builders[-1]._generator = b._generator
    files = [file for b in builders for file in b.files]
    programs = [always(*b.nodes) for b in builders if b.nodes]
    return (programs[0] if as_one else programs), files


def played(requests: list[tuple[bytes | list[bytes], list[bytes], int]], batching: bool, dtype: str = "float32") -> Toy:
    toy = Toy(batching=batching, dtype=dtype)
    for i, (data, files, prompt) in enumerate(requests):
        toy.store.put(files)
        toy.add(f"r{i}", data, prompt, seed=i)
    alive = list(range(len(requests)))
    for step in range(3):
        alive = [i for i in alive if not failures(toy, f"r{i}")]
        toy.step(
            plain=(1, step),
            **{f"r{i}": (requests[i][2], 0) if not step else (1, requests[i][2] + step - 1) for i in alive},
        )
    return toy


def same(one: Toy, other: Toy, name: str) -> None:
    kept, expected = one.saved.get(name, {}), other.saved.get(name, {})
    assert kept.keys() == expected.keys()  # names; in which order they travel is nobody's business
    for key, value in kept.items():
        compare(value, expected[key], f"{name}.{key}")


chains = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chains, st.sampled_from(sorted(LOOKS)), st.lists(st.integers(1, 3), min_size=2, max_size=3), st.booleans())
def test_programs_one_after_the_other_give_what_one_program_of_all_gives(
    steps: list[str], look_: str, prompts: list[int], batching: bool
) -> None:
    found = []
    for as_one in (True, False):
        requests = [(*chained(steps, look_, 7 * i, as_one), prompt) for i, prompt in enumerate(prompts)]
        found.append(played(requests, batching))
    by_hand, apart = found
    for i in range(len(prompts)):
        kinds = [[failure.kind for failure in failures(toy, f"r{i}")] for toy in found]
        assert kinds[0] == kinds[1]
        if not kinds[0] and batching:
            same(apart, by_hand, f"r{i}")
        elif not kinds[0]:
            assert repr(unsigned(apart.saved[f"r{i}"])) == repr(unsigned(by_hand.saved[f"r{i}"]))
    clean(apart)


def unsigned(value: object) -> object:
    """Zeros without a sign: a stream is the sum of two tensors, so what the next program reads of -0.0 is 0.0."""
    match value:
        case float():
            return value + 0.0
        case list() | tuple():
            return type(value)(map(unsigned, value))
        case dict():
            return {key: unsigned(item) for key, item in value.items()}
        case _:
            return value


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(chains, min_size=1, max_size=2), st.lists(st.integers(1, 3), min_size=2, max_size=5), st.integers(0, 3))
def test_groups_of_requests_with_several_programs_give_what_each_gives_alone(
    kinds: list[list[str]], prompts: list[int], seed: int
) -> None:
    requests = [
        (*chained(kinds[i % len(kinds)], "all", seed + 5 * i, False), prompt) for i, prompt in enumerate(prompts)
    ]
    grouped, alone = played(requests, True), played(requests, False)
    for i in range(len(prompts)):
        assert [f.kind for f in failures(grouped, f"r{i}")] == [f.kind for f in failures(alone, f"r{i}")]
        same(grouped, alone, f"r{i}")
    for tap in alone.seen:
        compare(grouped.seen[tap], alone.seen[tap], f"tap {tap}")
    clean(grouped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edits_with_kernels_of_several_programs_go_in_order(dtype: str) -> None:
    """Programs of different structure visit a site together: those of one request still one after the other."""
    names = [name for name in sorted(EDITS) if name != "a direction of the run"]
    requests = []
    for i in range(6):
        steps = [names[i % len(names)], names[(i + 3) % len(names)], names[(2 * i + 1) % len(names)]]
        requests.append((*chained(steps, "all", i, False), 1 + i % 2))
    grouped, alone = played(requests, True, dtype), played(requests, False, dtype)
    for i in range(6):
        one, other = (torch.tensor(toy.collected[f"r{i}"].sample.values["after"].tolist()) for toy in (grouped, alone))  # type: ignore[attr-defined]
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5)
    clean(grouped)


def test_a_plain_graph_and_an_edit_of_the_same_structure_are_one_group() -> None:
    toy = Toy()
    toy.add("a", ADD, prompt=1)
    toy.add("b", [ADD, look("1.out")], prompt=1)
    toy.step(a=(1, 0), b=(1, 0))
    assert [group.ids for group in toy.executor._population.groups] == [["a", "b"]]
    toy.executor.drop(["a"])
    toy.step(b=(1, 1))
    assert toy.saved["b"]["x"] == [[[5.0] * HIDDEN]] * 2
    clean(toy)


def test_an_assignment_is_seen_by_the_programs_after_it(toy: Toy) -> None:
    assign = always(Write(0, "0.mlp", 7.0, None))
    saved = two(toy, [assign, look("0.mlp"), look("0.out", "y")], 1)
    assert saved["a"]["x"] == saved["a"]["y"] == [[[7.0] * HIDDEN] * 2]
    clean(toy)


@pytest.mark.parametrize("pieces", [[4], [2, 2], [1, 3], [1, 1, 1, 1]], ids=str)
def test_prompts_in_pieces_run_all_programs_in_order(toy: Toy, pieces: list[int]) -> None:
    last = encode(Graph(Block([Read(0, "2.out", 0), Op(1, "py.getitem", [Ref(0), -1]), Save(2, "last", Ref(1))])))
    data = [ADD, change("py.iadd", 1, "0.mlp"), SCALE, look("1.out"), last]
    for name in ("a", "b"):
        toy.add(name, data, prompt=4)
    start = 0
    for count in pieces:
        toy.step(a=(count, start), plain=(1, start), b=(count, start))
        start += count
    toy.step(b=(1, 4), a=(1, 4))
    for name in ("a", "b"):
        assert toy.saved[name]["x"] == [[[12.0] * HIDDEN] * 4, [[12.0] * HIDDEN]]
        assert toy.saved[name]["last"] == [13.0] * HIDDEN
    clean(toy)


def test_edits_go_on_in_later_pieces_of_a_prompt_whose_request_failed(toy: Toy) -> None:
    fails = always(Read(0, "1.out", None), FAILS)
    for name in ("a", "b"):
        toy.add(name, [ADD, change("py.iadd", 5, "2.mlp"), look("2.out"), fails], prompt=4)
    for start in (0, 2, 4):
        rows = 2 if start < 4 else 1
        streams = toy.step(a=(rows, start), plain=(1, start), b=(rows, start))
        assert streams["a"].tolist() == streams["b"].tolist() == [[11.0] * HIDDEN] * rows
    assert [len(failures(toy, name)) for name in ("a", "b")] == [1, 1]
    assert failures(toy, "a")[0].program == 3
    clean(toy)
