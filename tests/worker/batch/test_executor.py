import hashlib

import pytest
import torch
from safetensors.torch import save
from toy import HIDDEN, VOCAB, Toy, graph

from nnsight_vllm.errors import PreemptedError
from nnsight_vllm.graph.nodes import (
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Dots,
    Iterations,
    List,
    Log,
    Loop,
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

ALL = Slice()
ONES, TWOS, THREES = [1.0] * HIDDEN, [2.0] * HIDDEN, [3.0] * HIDDEN


@pytest.fixture
def toy() -> Toy:
    return Toy()


def set_item(id: int, target: int, index: object, value: object, site: str) -> Op:
    return Op(id, "py.setitem", [Ref(target), index, value], writes=site)  # type: ignore[list-item]


def test_a_read_gives_the_requests_own_rows(toy: Toy) -> None:
    toy.add("a", graph(Read(0, "0.out", 0), Save(1, "x", Ref(0))), prompt=2)
    toy.add("b", graph(Write(0, "0.mlp", 5, 0), Read(1, "0.out", 0), Save(2, "x", Ref(1))), prompt=1)
    streams = toy.step(plain=(1, 0), a=(2, 0), b=(1, 0))
    assert toy.saved["a"]["x"] == [ONES, ONES]
    assert toy.saved["b"]["x"] == [[5.0] * HIDDEN]
    assert streams["plain"].tolist() == [THREES]
    assert streams["a"].tolist() == [THREES, THREES]
    assert streams["b"].tolist() == [[7.0] * HIDDEN]


def test_a_save_is_the_value_of_its_moment(toy: Toy) -> None:
    saved = toy.run(
        graph(
            Read(0, "1.mlp", 0),
            Save(1, "before", Ref(0)),
            set_item(2, 0, ALL, 0, "1.mlp"),
            Save(3, "after", Ref(0)),
        )
    )
    assert saved == {"before": [ONES, ONES], "after": [[0.0] * HIDDEN] * 2}


def test_views_of_views_write_through(toy: Toy) -> None:
    toy.add(
        "r",
        graph(
            Read(0, "1.out", 0),
            Op(1, "py.getitem", [Ref(0), -1]),
            Op(2, "py.getitem", [Ref(1), Slice(None, 2)]),
            Op(3, "tensor.mul_", [Ref(2), 10], writes="1.out"),
        ),
    )
    assert toy.step(r=(2, 0))["r"].tolist() == [THREES, [21.0, 21.0, 3.0, 3.0]]


def test_an_add_goes_to_the_addend_and_leaves_the_residual(toy: Toy) -> None:
    toy.add("r", graph(Read(0, "0.out", 0), Read(1, "1.out", 0), row(2, 1), add(3, 2, 4.0), Save(4, "x", Ref(1))))
    toy.step(r=(2, 0))
    hidden, residual = toy.seen[3]
    assert residual == [ONES, ONES]
    assert hidden == [ONES, [5.0] * HIDDEN]
    assert toy.saved["r"]["x"] == [TWOS, [6.0] * HIDDEN]


def test_a_subtraction_is_an_add_with_the_other_sign(toy: Toy) -> None:
    toy.add("r", graph(Read(0, "1.out", 0), Op(1, "py.isub", [Ref(0), 2], writes="1.out")))
    assert toy.step(r=(2, 0))["r"].tolist() == [ONES, ONES]


def test_assigning_a_site_broadcasts_and_earlier_reads_keep_their_value(toy: Toy) -> None:
    saved = toy.run(
        graph(
            Read(0, "2.mlp", 0),
            Save(1, "before", Ref(0)),
            Op(2, "torch.tensor", [List([1, 2, 3, 4])]),
            Write(3, "2.mlp", Ref(2), 0),
            Save(4, "kept", Ref(0)),
            Read(5, "2.mlp", 0),
            Save(6, "after", Ref(5)),
        )
    )
    assert saved["kept"] == saved["before"]
    assert saved["after"] == [[1.0, 2.0, 3.0, 4.0]] * 2


def test_a_site_may_be_assigned_a_view_of_itself(toy: Toy) -> None:
    saved = toy.run(
        graph(
            Read(0, "0.mlp", 0),
            set_item(1, 0, Tuple([0, 0]), 7, "0.mlp"),
            Op(2, "py.getitem", [Ref(0), 0]),
            Write(3, "0.mlp", Ref(2), 0),
            Read(4, "0.mlp", 0),
            Save(5, "x", Ref(4)),
        )
    )
    assert saved["x"] == [[7.0, 1.0, 1.0, 1.0]] * 2


def test_a_shape_that_does_not_fit_names_both(toy: Toy) -> None:
    toy.run(graph(Op(0, "torch.ones", [3]), Write(1, "0.mlp", Ref(0), 0)))
    assert toy.failure() == "InterventionError: a value of shape [3] doesn't fit 0.mlp of shape [2, 4]"
    (delta,) = toy.received["r"]
    assert delta.failure is not None
    assert (delta.failure.node, delta.keep_token, delta.failure.retryable) == (1, False, False)


def test_a_failure_is_the_requests_own(toy: Toy) -> None:
    toy.add("bad", graph(Read(0, "0.out", 0), Op(1, "py.getitem", [Ref(0), 99])))
    toy.add("good", graph(Read(0, "2.out", 0), Save(1, "x", Ref(0))))
    toy.step(bad=(2, 0), good=(2, 0))
    assert toy.failure("bad").startswith("IndexError: index 99 is out of bounds")
    assert toy.saved["good"]["x"] == [THREES, THREES]
    toy.step(bad=(1, 2), good=(1, 2))
    assert len(toy.received["bad"]) == 1


def test_bytes_that_are_no_graph_fail_the_request(toy: Toy) -> None:
    toy.run(b"\x81\xa4nope")
    assert toy.failure().startswith("GraphError: not an intervention graph")


def test_a_site_that_the_model_skips_fails_the_request() -> None:
    toy = Toy(silent_taps=frozenset({2}))
    toy.run(graph(Read(0, "1.mlp", 0), Save(1, "x", Ref(0))))
    assert toy.failure() == "OutOfOrderError: the model ran iteration 0 without passing 1.mlp"
    assert toy.active == {}


def test_iterations_run_once_a_step_and_the_list_grows(toy: Toy) -> None:
    body = Block([Read(2, "1.out", None), row(3, 2), item(4, 3), Op(5, "py.append", [Ref(0), Ref(4)])])
    data = graph(Op(0, "py.list"), Save(6, "all", Ref(0)), Iterations(7, 1, 4, 1, 1, body), Log(8, ["done", Ref(4)]))
    assert toy.run(data, steps=6)["all"] == [2.0, 2.0, 2.0]
    lists = [saved for delta in toy.received["r"] for saved in delta.saves]
    assert [saved.append for saved in lists] == [False, True, True, True]
    assert [delta.logs for delta in toy.received["r"]][-1] == ["done tensor(2.)"]


def test_an_unbounded_block_with_steps_runs_to_the_end(toy: Toy) -> None:
    body = Block([Op(2, "py.append", [Ref(0), Ref(1)])])
    data = graph(Op(0, "py.list"), Save(3, "seen", Ref(0)), Iterations(4, 0, None, 2, 1, body))
    assert toy.run(data, steps=6)["seen"] == [0, 2, 4]


def test_fixed_iterations_are_waited_for(toy: Toy) -> None:
    data = graph(Read(0, "0.out", 0), Read(1, "0.out", 2), Save(2, "x", Ref(1)), Save(3, "y", Ref(0)))
    toy.add("r", data)
    toy.step(r=(2, 0))
    toy.step(r=(1, 2))
    assert "r" not in toy.received
    toy.step(r=(1, 3))
    assert toy.saved["r"] == {"x": [ONES], "y": [ONES, ONES]}


@pytest.mark.parametrize(("threshold", "expected"), [(1.5, "high"), (9.0, "low")])
def test_a_branch_is_chosen_by_the_value(toy: Toy, threshold: float, expected: str) -> None:
    saved = toy.run(
        graph(
            Read(0, "1.out", 0),
            Op(1, "tensor.mean", [Ref(0)]),
            Op(2, "py.gt", [Ref(1), threshold]),
            Cond(3, Ref(2), Block([], ["high"]), Block([Read(5, "2.mlp", 0)], ["low"]), [4]),
            Save(6, "x", Ref(4)),
        )
    )
    assert saved["x"] == expected


def test_a_loop_carries_values_over_rows_and_nothing_over_none(toy: Toy) -> None:
    body = Block([Op(4, "tensor.sum", [Ref(2)]), Op(5, "py.add", [Ref(3), Ref(4)])], [Ref(5)])
    data = graph(
        Read(0, "0.out", 0),
        Loop(1, Ref(0), 2, body, [3], [0], [6]),
        Save(7, "sum", Ref(6)),
        Op(8, "py.list"),
        Loop(9, Ref(8), 10, Block([], [1]), [11], [Ref(6)], [12]),
        Save(13, "same", Ref(12)),
    )
    assert toy.run(data) == {"sum": 8.0, "same": 8.0}


def test_loops_nest_and_each_keeps_its_own_items(toy: Toy) -> None:
    inner = Loop(3, List([1, 10]), 4, Block([Op(6, "py.mul", [Ref(2), Ref(4)]), append(7, 0, 6)]))
    data = graph(Op(0, "py.list"), Loop(1, List([2, 3]), 2, Block([inner])), Save(8, "x", Ref(0)))
    assert toy.run(data)["x"] == [2, 20, 3, 30]


def test_a_place_in_a_container_is_a_copy(toy: Toy) -> None:
    saved = toy.run(
        graph(
            Read(0, "1.mlp", 0),
            Op(1, "py.list", [List([Ref(0)])]),
            Op(2, "py.getitem", [Ref(0), 0]),
            append(3, 1, 2),
            Op(4, "py.dict", [Dict([("row", Ref(2))])]),
            Op(5, "tensor.unbind", [Ref(0)]),
            append(6, 1, 5),
            set_item(7, 0, ALL, 0, "1.mlp"),
            Save(8, "list", Ref(1)),
            Save(9, "dict", Ref(4)),
        )
    )
    assert saved == {"list": [[ONES, ONES], ONES, (ONES, ONES)], "dict": {"row": ONES}}


def test_a_saved_container_is_followed_and_resent_when_it_changed_deep_inside(toy: Toy) -> None:
    inner = Block(
        [
            Op(4, "py.getitem", [Ref(1), "n"]),
            Op(5, "tensor.add_", [Ref(4), 1]),
        ]
    )
    data = graph(
        Op(0, "torch.zeros", [2]),
        Op(1, "py.dict", [Dict([("n", Ref(0))])]),
        Op(2, "py.list", [List([Ref(1)])]),
        Save(3, "x", Ref(2)),
        Iterations(6, 0, 2, 1, 7, inner),
    )
    assert toy.run(data, steps=4)["x"] == [{"n": [2.0, 2.0]}]
    assert [len(delta.saves) for delta in toy.received["r"]] == [1, 1]


def test_every_kind_of_value_comes_home(toy: Toy) -> None:
    saved = toy.run(
        graph(
            Read(0, "0.out", 0),
            Op(1, "tensor.min", [Ref(0), 1]),
            Save(2, "min", Ref(1)),
            Op(3, "py.attr", [Ref(1), "indices"]),
            Save(4, "indices", Ref(3)),
            Op(5, "py.size", [Ref(0)]),
            Save(6, "size", Ref(5)),
            Op(7, "py.dtype", [Ref(0)]),
            Save(8, "dtype", Ref(7)),
            Op(9, "tensor.bfloat16", [Ref(0)]),
            Op(10, "py.getitem", [Ref(9), Tuple([Dots(), 0, None])]),
            Save(11, "bf16", Ref(10)),
            Op(12, "tensor.sum", [Ref(0)]),
            Save(13, "scalar", Ref(12)),
            Save(14, "none", None),
            Op(15, "py.lt", [Ref(0), 0]),
            Save(16, "bools", Ref(15)),
            Op(17, "py.getitem", [Ref(0), Slice(0, 0)]),
            Save(18, "empty", Ref(17)),
        )
    )
    assert saved == {
        "min": ([1.0, 1.0], [0, 0]),
        "indices": [0, 0],
        "size": (2, HIDDEN),
        "dtype": "float32",
        "bf16": [[1.0], [1.0]],
        "scalar": 8.0,
        "none": None,
        "bools": [[False] * HIDDEN] * 2,
        "empty": [],
    }


def test_a_value_that_cannot_travel_fails_the_request(toy: Toy) -> None:
    toy.run(graph(Op(0, "py.pow", [10, 200]), Save(1, "x", Ref(0))))
    assert toy.failure() == "TypeError: a saved value can't be sent: an integer of 665 bits"


def test_constants_come_from_the_store_and_are_never_changed(toy: Toy) -> None:
    data = save({"tensor": torch.ones(HIDDEN)})
    key = hashlib.sha256(data).hexdigest()
    toy.store.put([data])
    program = graph(Const(0, key), Op(1, "tensor.mul_", [Ref(0), 3]), Save(2, "x", Ref(0)))
    assert toy.run(program)["x"] == THREES
    assert toy.store.get(key).tolist() == ONES
    assert (toy.store.info().bytes, toy.store.info().received_bytes) == (16, len(data))
    toy.store.drop([key])
    toy.add("late", program)
    toy.step(late=(2, 0))
    assert toy.failure("late") == f"GraphError: constant {key[:12]} isn't in the engine's store"


def test_random_operations_repeat_by_seed_and_leave_the_engines_generator_alone() -> None:
    program = graph(Op(0, "torch.rand", [3]), Op(1, "torch.rand", [3]), Save(2, "a", Ref(0)), Save(3, "b", Ref(1)))
    before = torch.random.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        toy = Toy()
        toy.add("r", program, seed=seed)
        toy.step(r=(2, 0))
        results.append(toy.saved["r"])
    assert results[0] == results[1] != results[2]
    assert results[0]["a"] != results[0]["b"]
    assert torch.equal(before, torch.random.get_rng_state())


def test_modules_are_called_ad_hoc(toy: Toy) -> None:
    check = graph(Read(0, "0.out", 0), Call(1, "double", [Ref(0)]), Save(2, "x", Ref(1)))
    toy.run(check)
    assert toy.failure() == "GraphError: node 1: no module 'double'"


def test_a_stop_before_the_draw_drops_the_token_and_one_after_keeps_it(toy: Toy) -> None:
    toy.add("early", graph(Read(0, "0.out", 0), Save(1, "x", 1), Stop(2), Save(3, "y", 1)))
    toy.add("late", graph(Read(0, "samples.output", 0), Stop(1)))
    toy.step(early=(2, 0), late=(2, 0))
    ((early,), (late,)) = toy.received["early"], toy.received["late"]
    assert (early.stopped, early.keep_token, toy.saved["early"]) == (True, False, {"x": 1})
    assert (late.stopped, late.keep_token) == (True, True)


def test_logits_are_edited_before_the_draw_and_samples_after(toy: Toy) -> None:
    toy.add(
        "r",
        graph(
            Read(0, "logits.output", 0),
            set_item(1, 0, Tuple([0, 5]), 99, "logits.output"),
            Read(2, "samples.output", 0),
            Save(3, "drawn", Ref(2)),
            Write(4, "samples.output", 6, 0),
        ),
    )
    toy.step(plain=(1, 0), r=(2, 0))
    assert toy.saved["r"]["drawn"] == [5]
    assert toy.tokens.flatten().tolist() == [0, 6]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        ([Write(1, "samples.output", VOCAB, 0)], "InterventionError: token 8 isn't in the vocabulary of 8 tokens"),
        ([Write(1, "samples.output", 1.5, 0)], "InterventionError: samples.output holds integers; got 1.5"),
        (
            [Op(1, "torch.ones", [2]), Write(2, "samples.output", Ref(1), 0)],
            "InterventionError: samples.output holds integers; got a float32 tensor of shape [2]",
        ),
        (
            [Op(1, "torch.tensor", [List([1, 2])]), Write(2, "samples.output", Ref(1), 0)],
            "InterventionError: a value of shape [2] doesn't fit samples.output of shape [1]",
        ),
        (
            [Read(1, "samples.output", 0), set_item(2, 1, 0, 2.5, "samples.output")],
            "InterventionError: samples.output holds integers; got 2.5",
        ),
    ],
)
def test_a_token_that_cannot_be_fails_the_request_and_the_drawn_one_stays(
    toy: Toy, write: list[Node], message: str
) -> None:
    toy.run(graph(*write))
    assert toy.failure() == message
    assert toy.tokens.tolist() == [[0]]


def test_a_prompt_in_pieces_or_an_evicted_request_fails_and_may_be_sent_again(toy: Toy) -> None:
    data = graph(Iterations(0, 0, None, 1, 1, Block([Read(2, "0.out", None), Op(3, "tensor.mean", [Ref(2)])])))
    toy.add("cut", data, prompt=3)
    toy.add("evicted", data, prompt=2)
    toy.step(cut=(2, 0), evicted=(2, 0))
    toy.step(evicted=(3, 0))
    assert toy.failure("cut").startswith("PreemptedError: the engine ran positions 0 to 1 of a prompt of 3 tokens")
    assert toy.failure("evicted").startswith("PreemptedError: the engine evicted the request after iteration 0")
    assert all(delta.failure and delta.failure.retryable for name in ("cut", "evicted") for delta in toy.received[name])


def test_a_request_whose_program_is_over_fails_when_it_is_evicted(toy: Toy) -> None:
    toy.add("r", graph(Write(0, "0.mlp", 5, 0), Save(1, "x", 1)))
    toy.step(r=(2, 0))
    toy.executor.fail("r", PreemptedError("evicted"))
    toy.executor.fail("r", RuntimeError("too late"))
    toy.step(r=(3, 0))  # all its rows anew, without the edit
    first, last = toy.received["r"]
    assert first.failure is None
    assert toy.failure() == "PreemptedError: evicted"
    assert last.failure is not None
    assert (last.failure.retryable, last.keep_token) == (True, False)


def test_results_wait_for_a_step_that_emits(toy: Toy) -> None:
    toy.add("r", graph(Save(0, "x", 1)))
    toy.step()
    assert not toy.executor.end_step([])
    toy.executor.fail("r", RuntimeError("no"))
    assert list(toy.executor.end_step(["r"]).single) == ["r"]


def test_nothing_is_left_after_a_step_and_a_drop(toy: Toy) -> None:
    toy.add("r", graph(Read(0, "0.out", 0), Read(1, "1.out", 7)))
    toy.step(r=(2, 0))
    assert toy.executor.leftovers(["r"]) == []
    assert toy.executor.leftovers([]) == ["state of request r, which the engine doesn't know"]
    toy.executor.drop(["r"])
    assert toy.executor.leftovers([]) == []


def test_an_interrupt_comes_out_after_the_step(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(
        __import__("nnsight_vllm.worker.ops.operations", fromlist=["x"]).OPERATIONS, "py.len", interrupt
    )
    toy.add("r", graph(Read(0, "0.out", 0), Op(1, "py.len", [Ref(0)])))
    with pytest.raises(KeyboardInterrupt):
        toy.step(r=(2, 0))
    assert toy.executor.leftovers(["r"]) == []


def row(id: int, target: int) -> Op:
    return Op(id, "py.getitem", [Ref(target), -1])


def item(id: int, target: int) -> Op:
    return Op(id, "py.getitem", [Ref(target), 0])


def add(id: int, target: int, value: float) -> Op:
    return Op(id, "py.iadd", [Ref(target), value], writes="1.out")


def append(id: int, target: int, value: int) -> Op:
    return Op(id, "py.append", [Ref(target), Ref(value)])
