"""What a stranger's graph may make the engine do: each bomb here is one request's failure, at once, and nobody else's bits change."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from toy import Toy, graph

from nnsight_vllm.errors import EngineSettingError, InterventionError
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Dict,
    Dtype,
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
    Tuple,
)
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.wire.limits import Limits, limits_of
from nnsight_vllm.worker.ops.containers import printed
from nnsight_vllm.worker.ops.cost import Cost, Unforeseeable, cost_of
from nnsight_vllm.worker.ops.guard import Guard
from nnsight_vllm.worker.ops.operations import OPERATIONS

HUGE = 10**12
SMALL = Limits(value_bytes=1 << 20, held_bytes=1 << 22, held_bytes_in_all=1 << 23, work=1 << 30, seconds=5.0)
VECTOR: list[Node] = [Op(0, "torch.arange", [50_000], {"dtype": Dtype("float32")})]
SQUARE: list[Node] = [Op(0, "torch.ones", [300, 300])]


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """As the worker does: what torch loads at first isn't a request's time."""
    Guard(Limits()).warm_up()


def bomb(*nodes: Node) -> bytes:
    """The nodes, then a save of the last value."""
    return graph(*nodes, Save(999, "x", Ref(nodes[-1].id)))


def after(before: list[Node], name: str, *args: Arg, **kwargs: Arg) -> bytes:
    return bomb(*before, Op(90, name, list(args), dict(kwargs)))


def doubled(levels: int) -> list[Node]:
    """A list that holds another one twice, and that one a third one twice, and so on."""
    return [Op(0, "py.list", []), *(Op(i, "py.list", [List([Ref(i - 1), Ref(i - 1)])]) for i in range(1, levels + 1))]


BOMBS: dict[str, bytes] = {
    "zeros": after([], "torch.zeros", HUGE),
    "full": after([], "torch.full", List([10**6, 10**6]), 1.0),
    "arange": after([], "torch.arange", HUGE),
    "linspace": after([], "torch.linspace", 0, 1, HUGE),
    "rand": after([], "torch.rand", HUGE),
    "randperm": after([], "torch.randperm", HUGE),
    "eye": after([], "torch.eye", 10**7),
    "expand and clone": bomb(*VECTOR, Op(1, "tensor.expand", [Ref(0), 10**7, 50_000]), Op(2, "tensor.clone", [Ref(1)])),
    "repeat": after(VECTOR, "tensor.repeat", Ref(0), 10**7),
    "tile": after(VECTOR, "tensor.tile", Ref(0), 10**7),
    "pad": after(VECTOR, "nn.pad", Ref(0), Tuple([0, HUGE])),
    "one_hot": bomb(Op(0, "torch.tensor", [List([10**11])]), Op(1, "nn.one_hot", [Ref(0)])),
    "one_hot of many": bomb(Op(0, "torch.tensor", [List([1, 2])]), Op(1, "nn.one_hot", [Ref(0), HUGE])),
    "bincount": bomb(Op(0, "torch.tensor", [List([10**11])]), Op(1, "torch.bincount", [Ref(0)])),
    "repeat_interleave": after(VECTOR, "torch.repeat_interleave", Ref(0), 10**7),
    "repeat_interleave by a tensor": bomb(Op(0, "torch.tensor", [List([10**12])]), Op(1, "torch.repeat_interleave", [Ref(0)])),
    "an outer product": after(VECTOR, "torch.outer", Ref(0), Ref(0)),
    "broadcasting": bomb(*VECTOR, Op(1, "py.getitem", [Ref(0), Tuple([Slice(), None])]), Op(2, "py.add", [Ref(0), Ref(1)])),
    "comparing": bomb(*VECTOR, Op(1, "tensor.unsqueeze", [Ref(0), 1]), Op(2, "py.lt", [Ref(0), Ref(1)])),
    "cat of many": bomb(*VECTOR, Op(1, "py.mul", [List([Ref(0)]), 10_000]), Op(2, "torch.cat", [Ref(1)])),
    "stack of many": bomb(*VECTOR, Op(1, "py.mul", [List([Ref(0)]), 10_000]), Op(2, "torch.stack", [Ref(1)])),
    "meshgrid": bomb(*VECTOR, Op(1, "torch.meshgrid", [List([Ref(0)] * 3)], {"indexing": "ij"})),
    "cartesian_prod": after(VECTOR, "torch.cartesian_prod", Ref(0), Ref(0)),
    "combinations": after(VECTOR, "torch.combinations", Ref(0), 3),
    "a diagonal far out": after(VECTOR, "torch.diag", Ref(0), 10**9),
    "diag_embed": after(VECTOR, "torch.diag_embed", Ref(0)),
    "block_diag": after(SQUARE, "torch.block_diag", Ref(0), Ref(0)),
    "vander": after(VECTOR, "linalg.vander", Ref(0), N=10**9),
    "kron": after(VECTOR, "torch.kron", Ref(0), Ref(0)),
    "interpolate": bomb(*SQUARE, Op(1, "tensor.unsqueeze", [Ref(0), 0]), Op(2, "nn.interpolate", [Ref(1)], {"scale_factor": 1e9})),
    "einsum": after(VECTOR, "torch.einsum", "i,j,k->ijk", Ref(0), Ref(0), Ref(0)),
    "unfold": after(VECTOR, "tensor.unfold", Ref(0), 0, 25_000, 1),
    "windows of a pool": bomb(*VECTOR, Op(1, "tensor.unsqueeze", [Ref(0), 0]), Op(2, "nn.avg_pool1d", [Ref(1), 25_000, 1])),
    "padding of a convolution": bomb(
        Op(0, "torch.ones", [1, 1, 9]), Op(1, "nn.conv1d", [Ref(0), Ref(0)], {"padding": 10**9})
    ),
    "an index of many": bomb(
        *SQUARE, Op(1, "torch.zeros", [60_000], {"dtype": Dtype("int64")}), Op(2, "py.getitem", [Ref(0), Ref(1)])
    ),
    "differences": after(VECTOR, "torch.diff", Ref(0), 40_000),
    "cdist": bomb(*VECTOR, Op(1, "tensor.unsqueeze", [Ref(0), 1]), Op(2, "torch.cdist", [Ref(1), Ref(1)])),
    "a power of a matrix": after(SQUARE, "linalg.matrix_power", Ref(0), 2**62),
    "a decomposition": bomb(Op(0, "torch.ones", [500, 500]), Op(1, "linalg.svd", [Ref(0)])),
    "views of each element": after(VECTOR, "tensor.unbind", Ref(0)),
    "a split into single elements": after(VECTOR, "tensor.split", Ref(0), 1),
    "a cast": bomb(Op(0, "torch.ones", [10**6], {"dtype": Dtype("int8")}), Op(1, "tensor.to", [Ref(0), Dtype("complex128")])),
    "a list doubled": bomb(Op(0, "py.list", [List([1] * 1024)]), *(Op(i, "py.iadd", [Ref(0), Ref(0)]) for i in range(1, 40))),
    "a list doubled by extending": bomb(Op(0, "py.list", [List([1] * 1024)]), *(Op(i, "py.extend", [Ref(0), Ref(0)]) for i in range(1, 40))),
    "a list doubled by slices": bomb(
        Op(0, "py.list", [List([1] * 1024)]), *(Op(i, "py.setitem", [Ref(0), Slice(0, 0), Ref(0)]) for i in range(1, 40))
    ),
    "lists in lists": bomb(*doubled(40)),
    "text of lists in lists": after(doubled(15), "py.str", Ref(15)),
    "a tensor of lists in lists": after(doubled(22), "torch.tensor", Ref(22)),
    "digits": after([], "py.round", 5, -(10**9)),
    "powers of a power": bomb(Op(0, "py.pow", [3, 4096]), *(Op(i, "py.pow", [Ref(i - 1), 4096]) for i in range(1, 4))),
    "shifts": bomb(Op(0, "py.lshift", [1, 4096]), *(Op(i, "py.lshift", [Ref(i - 1), 4096]) for i in range(1, 40))),
    "a sum of lists": bomb(Op(0, "py.mul", [List([List([1])]), 10**5]), Op(1, "py.sum", [Ref(0), List([])])),
    "rows of a view": bomb(Op(0, "torch.zeros", [1]), Op(1, "tensor.expand", [Ref(0), 100_000]), Op(2, "py.list", [Ref(1)]), *(Op(i, "py.iadd", [Ref(2), Ref(2)]) for i in range(3, 20))),
    "sorted tensors": bomb(*VECTOR, Op(1, "tensor.unsqueeze", [Ref(0), 1]), Op(2, "py.max", [List([Ref(0), Ref(1)])])),
    "compared lists": bomb(*VECTOR, Op(1, "tensor.unsqueeze", [Ref(0), 1]), Op(2, "py.eq", [List([Ref(0)]), List([Ref(1)])])),
    "values held": bomb(*(Op(i, "torch.ones", [200_000]) for i in range(60)), Op(70, "py.list", [List([Ref(i) for i in range(60)])])),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_fails_its_own_request_at_once(name: str) -> None:
    toy, alone = Toy(limits=SMALL), Toy()
    plain = graph(Read(0, "1.out", 0), Op(1, "torch.softmax", [Ref(0), -1]), Save(2, "x", Ref(1)))
    alone.add("plain", plain)
    expected = alone.step(plain=(2, 0))["plain"]
    toy.add("plain", plain)
    toy.add("bomb", BOMBS[name])
    start = time.perf_counter()
    streams = toy.step(plain=(2, 0), bomb=(2, 0))
    assert time.perf_counter() - start < 20  # minutes or the whole memory, were it let run
    assert toy.failure("bomb").split(":")[0] in {"InterventionError", "OverflowError", "RuntimeError", "TypeError"}
    assert toy.saved["plain"] == alone.saved["plain"]
    assert torch.equal(streams["plain"], expected)
    toy.executor.drop(["plain", "bomb"])
    assert toy.executor.leftovers([]) == []


@pytest.mark.parametrize("batching", [True, False])
def test_of_a_group_only_who_makes_too_much_fails(batching: bool) -> None:
    toy = Toy(limits=SMALL, batching=batching)
    for name, size in {"a": 3, "b": HUGE, "c": 5}.items():
        body: list[Node] = [
            Read(1, "1.out", None),
            Op(2, "torch.ones", [size]),
            Op(3, "tensor.sum", [Ref(2)]),
            Save(4, "x", Ref(3)),
        ]
        toy.add(name, graph(Iterations(5, 0, None, 1, 6, Block(list(body)))))
    toy.step(a=(2, 0), b=(2, 0), c=(2, 0))
    assert toy.failure("b") == (
        "InterventionError: torch.ones would make values of 4000000000000 bytes or more; the limit `value_bytes` is 1048576"
    )
    assert (toy.saved["a"]["x"], toy.saved["c"]["x"]) == (3.0, 5.0)


@pytest.mark.parametrize("num", [1, 3])
def test_lists_that_grow_with_every_iteration_are_bounded(num: int) -> None:
    toy = Toy(limits=Limits(held_bytes=1 << 20, held_bytes_in_all=1 << 30))
    body: list[Node] = [
        Op(3, "torch.zeros", [50_000]),
        Op(4, "py.append", [Ref(0), Ref(3)]),
        Op(5, "py.len", [Ref(0)]),
        Save(6, "n", Ref(5)),
    ]
    for i in range(num):
        toy.add(f"r{i}", graph(Op(0, "py.list"), Iterations(1, 0, None, 1, 2, Block(body))))
    for step in range(12):
        toy.step(**{f"r{i}": (2, 0) if step == 0 else (1, 1 + step) for i in range(num)})
    for i in range(num):
        assert toy.failure(f"r{i}").startswith("InterventionError: the request holds values of ")
        assert toy.failure(f"r{i}").endswith("the limit `held_bytes` is 1048576")
        assert isinstance(toy.saved[f"r{i}"]["n"], int)


def test_what_all_hold_together_is_bounded_and_who_makes_more_fails() -> None:
    toy = Toy(limits=Limits(held_bytes_in_all=1 << 20), batching=False)
    for name in "abcd":
        keeps: list[Node] = [Op(i, "torch.zeros", [80_000]) for i in range(1, 2)]
        toy.add(name, graph(*keeps, Read(8, "0.out", 3), Save(9, "x", Ref(1))))
    for step in range(3):
        toy.step(**{name: (2, 0) if step == 0 else (1, 1 + step) for name in "abcd"})
    failed = [name for name in "abcd" if any(delta.failure for delta in toy.received.get(name, []))]
    assert failed == ["d"]
    assert "`held_bytes_in_all` is 1048576" in toy.failure("d")


def looping(trips: int, depth: int) -> bytes:
    """Loops in one another; the innermost does one operation."""
    block = Block([Op(1, "py.add", [1, 1])])
    for level in range(depth):
        block = Block([Loop(10 + level, Ref(0), 30 + level, block)])
    return graph(Read(2, "0.out", 0), Op(0, "py.list", [List([1] * trips)]), *block.nodes, Save(3, "x", 1))


@pytest.mark.parametrize("num", [1, 3])
def test_trips_of_loops_in_loops_are_bounded_together(num: int) -> None:
    toy = Toy(limits=Limits(trips=1000))
    for i in range(num):
        toy.add(f"many{i}", looping(40, 2))
    toy.add("few", looping(30, 2))
    toy.step(**{f"many{i}": (2, 0) for i in range(num)}, few=(2, 0))
    for i in range(num):
        assert (
            toy.failure(f"many{i}")
            == "InterventionError: the request's loops made 1001 trips in one step; the limit `trips` is 1000"
        )
    assert toy.saved["few"]["x"] == 1


def test_trips_start_again_with_every_step() -> None:
    toy = Toy(limits=Limits(trips=50))
    body = Block([Loop(3, List([1] * 40), 4, Block([Op(5, "py.add", [1, 1])])), Save(6, "x", Ref(2))])
    assert toy.run(graph(Iterations(1, 0, None, 1, 2, body)), steps=3)["x"] == 2


@pytest.mark.parametrize("num", [1, 3])
def test_a_program_over_its_time_is_ended_and_the_others_go_on(num: int) -> None:
    toy = Toy(limits=Limits(seconds=0.05))
    slow = Loop(3, Ref(0), 4, Block([Loop(5, Ref(0), 6, Block([Op(7, "py.add", [1, 1])]))]))
    for i in range(num):
        toy.add(f"slow{i}", graph(Read(1, "0.out", 0), Op(0, "py.list", [List([1] * 250)]), slow, Save(8, "x", 1)))
    toy.add("plain", graph(Read(0, "2.out", 0), Save(1, "x", Ref(0))))
    streams = toy.step(**{f"slow{i}": (2, 0) for i in range(num)}, plain=(2, 0))
    for i in range(num):
        assert "the limit `seconds` is 0.05" in toy.failure(f"slow{i}")
    assert toy.saved["plain"]["x"] == streams["plain"].tolist()


def test_a_member_of_a_group_is_charged_with_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation runs request by request, and is slow for one of them."""
    ones = torch.ones

    def slow(size: int, **kwargs: Any) -> torch.Tensor:
        if size == 2 and not kwargs:
            time.sleep(0.15)
        return ones(size, **kwargs)

    monkeypatch.setitem(OPERATIONS, "torch.ones", slow)
    toy = Toy(limits=Limits(seconds=0.1))
    for name, size in {"a": 1, "b": 2, "c": 3}.items():
        toy.add(
            name, graph(Read(0, "1.out", 0), Op(1, "torch.ones", [size]), Save(2, "x", Ref(1)), Read(3, "2.out", 0))
        )
    toy.step(a=(2, 0), b=(2, 0), c=(2, 0))
    assert "the limit `seconds` is 0.1" in toy.failure("b")
    assert (toy.saved["a"]["x"], toy.saved["c"]["x"]) == ([1.0], [1.0] * 3)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("kind", ["values", "a list", "a followed list", "appended rows"])
def test_what_a_request_saves_in_one_step_is_bounded(num: int, kind: str) -> None:
    toy = Toy(limits=Limits(saved_per_step=1000))
    value = Op(1, "torch.zeros", [100])
    kinds: dict[str, list[Node]] = {
        "values": [value, Save(2, "a", Ref(1)), Save(3, "b", Ref(1)), Save(4, "c", Ref(1))],
        "a list": [value, Save(2, "a", Tuple([Ref(1)] * 3))],
        "a followed list": [value, Op(2, "py.list", [List([Ref(1)] * 3)]), Save(3, "a", Ref(2))],
        "appended rows": [
            Op(2, "py.list"), Save(3, "a", Ref(2)), Read(4, "0.out", 0), value, *(Op(5 + i, "py.append", [Ref(2), Ref(1)]) for i in range(3))
        ],
    }  # fmt: skip
    nodes = kinds[kind]
    for i in range(num):
        toy.add(f"r{i}", graph(Read(0, "0.out", 0), *nodes) if kind != "appended rows" else graph(*nodes))
    toy.add("plain", graph(Read(0, "0.out", 0), Save(1, "x", Ref(0))))
    toy.step(**{f"r{i}": (2, 0) for i in range(num)}, plain=(2, 0))
    for i in range(num):
        assert toy.failure(f"r{i}").endswith(
            "the request saved 1200 bytes in one step; the limit `saved_per_step` is 1000"
        )
        assert toy.failure(f"r{i}").startswith("InterventionError")
    assert toy.saved["plain"]["x"] == [[1.0] * 4] * 2


def test_rows_that_a_group_collects_at_sites_count_as_saved() -> None:
    toy = Toy(limits=Limits(saved_per_step=40))
    nodes: list[Node] = []
    for layer in range(3):
        nodes += [Op(10 * layer, "py.list"), Save(10 * layer + 1, f"s{layer}", Ref(10 * layer))]
    body: list[Node] = []
    for layer in range(3):
        body += [
            Read(40 + 10 * layer, f"{layer}.out", None),
            Op(41 + 10 * layer, "py.getitem", [Ref(40 + 10 * layer), -1]),
        ]
        body += [Op(42 + 10 * layer, "py.append", [Ref(10 * layer), Ref(41 + 10 * layer)])]
    for name in "ab":
        toy.add(name, graph(*nodes, Iterations(90, 0, None, 1, 91, Block(body))))
    toy.step(a=(2, 0), b=(2, 0))
    for name in "ab":
        assert "the limit `saved_per_step` is 40" in toy.failure(name)


@pytest.mark.parametrize("num", [1, 2])
def test_lines_of_logs_are_bounded_in_number_and_length(num: int) -> None:
    toy = Toy(limits=Limits(log_lines=10))
    text = Op(0, "py.mul", ["x", 200_000])
    for i in range(num):
        toy.add(f"long{i}", graph(text, Read(1, "0.out", 0), Log(2, [Ref(0)])))
        loop = Loop(2, List([1] * 11), 3, Block([Log(4, [Ref(3)])]))
        toy.add(f"many{i}", graph(Read(1, "0.out", 0), loop))
    toy.step(**{f"{kind}{i}": (2, 0) for i in range(num) for kind in ("long", "many")})
    for i in range(num):
        (delta,) = toy.received[f"long{i}"]
        assert len(delta.logs[0]) < 70_000 and delta.logs[0].endswith("(200000 characters)")
        assert toy.failure(f"many{i}") == "InterventionError: the request logged 11 lines; the limit `log_lines` is 10"


def test_a_huge_value_is_logged_by_its_size() -> None:
    assert printed([1] * 5000) == "<list with 5000 items>"
    assert len(printed(torch.zeros(1000, 1000))) < 1000
    assert printed([torch.tensor(1.0), {"a": (2, "b")}]) == "[tensor(1.), {'a': (2, 'b')}]"


def test_a_limit_is_set_by_name_and_checked() -> None:
    assert limits_of({"seconds": 0.5, "trips": 7}).trips == 7
    assert limits_of({}, is_accelerator=True).work == 64 * Limits().work
    wrong: list[tuple[dict[str, object], str]] = [
        ({"second": 1}, "no 'second'"),
        ({"trips": 1.5}, "whole"),
        ({"seconds": 0}, "positive"),
    ]
    for given, message in wrong:
        with pytest.raises(EngineSettingError, match=message):
            limits_of(given)


# -- what can be foreseen ------------------------------------------------------------------------------------------------

X = torch.rand(4, 4) + 3 * torch.eye(4)
V, B, AT, M = torch.rand(4), torch.rand(2, 4, 4), torch.tensor([0, 1]), torch.ones(4, 4) > 0
N = torch.tensor([1, 2, 3, 4])
TRIED: list[tuple[Any, ...]] = [
    (X,), (X, X), (V, V), (V,), (B,), (B, B), (X, V), (X, X, X), (X, B, B), (B, B, B), (X, V, V), (V, X, V), (X, 2), (X, 0, AT),
    (X, 0, AT, X[:2]), (X, 0, N.repeat(4, 1) - 1, X), (X, 1, 1), (X, M), (X, M, X), (X, M, 1.0), ([X, X],), (X, [2, 2]), (X, (1, 1)),
    (N,), (N, N), (3,), ([2, 3],), (0, 1, 5), (0, 10, [2]), ([2, 3], 1.0), (X, [1]), (X, 0), (V, 2), (B, 2), (B, X),
    ("ij,jk->ik", X, X), (X, [4], V, V), (X, 0, 1), (B, torch.rand(3, 4, 2)), (N, torch.rand(5, 4)), (X, N - 1), (X, 1.0, 2.0),
    (M, X, X), (B, 2, V), (X, torch.float32), (X, 2, 0, 1.0), (X, (AT,), torch.rand(2, 4)), (B[None], (2, 2)), (X, 0, AT, X[:2], "amax"),
    (X, 0, N.repeat(4, 1) - 1, X, "sum"), (V, V, B), (V, AT, V[:2]), (X @ X.T,), (X, 0, X[0]), (X, X[0], 0, 0), (B, (4,)), (1, 5, 4),
    (X, 0, N.repeat(4, 1) - 1), (X, 0, 0, 2), (X[:, :3], X[:, :3]), (X, 0, (2, 2)), (X, 0, 2, 1), (X, 0.5, False), (2, X), (X, 0, AT, 1.0),
    (X, (4, 4)), (B, (1, 0, 2)), (X, (16,)), (X, [4]),
]  # fmt: skip
SPECIAL: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "tensor.new_full": ((X, (2, 2), 1.0), {}),
    "tensor.float_power_": ((X.double(), 2), {}),
    "linalg.solve_triangular": ((X, X), {"upper": True}),
    "torch.unflatten": ((X, 0, (2, 2)), {}),
    "torch.cross": ((X[:, :3], X[:, :3]), {"dim": 1}),
    "tensor.item": ((torch.tensor(1.0),), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(name for name in OPS if not name.startswith(("py.", "edit."))))
def test_every_operation_can_be_foreseen(name: str) -> None:
    """For arguments that it takes, its cost is known before it runs, and isn't less than what it makes."""
    tries = [SPECIAL[name]] if name in SPECIAL else [(args, {}) for args in TRIED]
    for args, kwargs in tries:
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        try:
            result = OPERATIONS[name](*copies, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # the next ones may fit
            continue
        try:
            cost = cost_of(name, OPERATIONS[name], list(args), kwargs, Cost(1 << 30, 1 << 40))
        except Unforeseeable:
            pytest.fail(f"{name} of {args}")
        if isinstance(result, torch.Tensor) and result._base is None and result.data_ptr() not in [
            copy.data_ptr() for copy in copies if isinstance(copy, torch.Tensor)
        ]:  # fmt: skip
            assert cost.bytes >= result.nbytes or name == "tensor.cpu"
        return
    pytest.fail(f"no arguments were found for {name}")


def test_what_is_known_of_some_shapes_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(Limits())
    guard.allow("torch.zeros", [5, 5], {})
    monkeypatch.setattr("nnsight_vllm.worker.ops.guard.cost_of", None)
    guard.allow("torch.zeros", [5, 5], {})
    guard.allow("py.add", [X, V], {})
    guard.allow("py.getitem", [X, (slice(None), 1)], {})
    with pytest.raises(TypeError):
        guard.allow("torch.zeros", [5, 6], {})


def test_masks_and_lists_as_an_index_are_foreseen() -> None:
    guard = Guard(Limits(value_bytes=1000))
    for key in (M, torch.tensor([True, False, True, False]), [0, 1], (M[0], 1), (slice(None), [0, 1]), AT, Ellipsis):
        guard.allow("py.getitem", [X, key], {})
    with pytest.raises(InterventionError, match="value_bytes"):
        guard.allow("py.getitem", [X, torch.zeros(1000, dtype=torch.int64)], {})


def test_numbers_that_are_tensors_are_taken_as_numbers() -> None:
    """An index or a size may be a value of the run; what is known of one of them isn't known of the next."""
    guard, two = Guard(Limits(value_bytes=10_000)), torch.tensor(2)
    for key in (two, (slice(None), two), (two, torch.tensor([0, 1])), (two > 1, two)):
        guard.allow("py.getitem", [X, key], {})
    given: dict[str, list[Any]] = {
        "tensor.narrow": [X, 0, 0, two], "tensor.repeat": [X, two, 1], "torch.zeros": [two, 3], "torch.topk": [X, two], "torch.roll": [X, two],
    }  # fmt: skip
    for name, args in given.items():
        OPERATIONS[name](*args)
        guard.allow(name, args, {})
    with pytest.raises(InterventionError, match="value_bytes"):
        guard.allow("torch.zeros", [torch.tensor(10**9), 3], {})
    with pytest.raises(InterventionError, match="value_bytes"):
        guard.allow("tensor.repeat", [X, torch.tensor(10**9), 1], {})


def test_pythons_functions_still_take_tensors() -> None:
    guard, one, two = Guard(Limits()), torch.tensor(1.0), torch.tensor(2.0)
    given: list[tuple[str, list[Any]]] = [
        ("py.max", [[one, two]]), ("py.min", [one, two]), ("py.sorted", [[two, one]]), ("py.max", [V]), ("py.sum", [[one, two]]), ("py.sum", [V]),
        ("py.eq", [[one], [two]]), ("py.lt", [one, 3]), ("py.eq", [V, V]), ("py.round", [one]), ("py.iadd", [[one], [two]]), ("py.mul", [[one], 3]),
    ]  # fmt: skip
    for name, args in given:
        guard.allow(name, args, {})
        OPERATIONS[name](*args)


def test_a_tensor_as_an_index_fails_with_torchs_own_words() -> None:
    toy = Toy()
    row: list[Node] = [
        Read(0, "0.out", 0),
        Op(1, "tensor.argmax", [Ref(0)]),
        Op(2, "py.getitem", [Ref(0), Ref(1)]),
        Save(3, "x", Ref(2)),
    ]
    assert toy.run(graph(*row))["x"] == [1.0] * 4
    toy = Toy()
    toy.run(
        graph(
            Read(0, "0.out", 0),
            Op(1, "tensor.argmax", [Ref(0)]),
            Op(2, "py.add", [Ref(1), 99]),
            Op(3, "py.getitem", [Ref(0), Ref(2)]),
        )
    )
    assert toy.failure().startswith("IndexError: index 99 is out of bounds")


def test_a_call_of_the_toys_module_still_works_under_limits() -> None:
    toy = Toy(limits=SMALL, modules=("double",))
    assert (
        toy.run(graph(Read(0, "0.out", 0), Call(1, "double", [Ref(0)]), Save(2, "x", Ref(1))))["x"] == [[2.0] * 4] * 2
    )


def test_a_dict_in_the_graph_is_walked_once() -> None:
    assert Toy().run(graph(Op(0, "py.dict", [Dict([(1, List([2]))])]), Save(1, "x", Ref(0))))["x"] == {1: [2]}
