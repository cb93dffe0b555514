"""Graphs as data: round trips, legality, printing. Neither torch nor vLLM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fake_model import catalogue

from nnsight_vllm.errors import GraphError, OutOfOrderError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import decode, encode, from_json, to_json
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Dots,
    Dtype,
    Export,
    Graph,
    Import,
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
    Special,
    Stop,
    Tuple,
    Write,
)
from nnsight_vllm.graph.ops import OPS, RANDOM, is_inplace
from nnsight_vllm.graph.text import render
from nnsight_vllm.graph.walk import constants_of, iteration_after, nodes_of, sites_written

MLP = "model.layers.0.mlp.output"
EVERYTHING = Graph(
    Block(
        [
            Read(0, MLP),
            Const(1, "ab" * 32),
            Op(2, "py.getitem", [Ref(0), Tuple([Slice(1, None, 2), Dots(), None])]),
            Op(3, "py.setitem", [Ref(0), List([0, True]), Special("-inf")], writes=MLP),
            Op(4, "tensor.sum", [Ref(2)], {"dim": -1, "dtype": Dtype("float32")}),
            Call(5, "model.norm", [Ref(0)]),
            Op(6, "py.dict", [Dict([("a", Ref(1)), (2, 0.5)])]),
            Cond(7, Ref(4), Block([Op(8, "py.add", [Ref(4), 1])], [Ref(8)]), Block([], [Ref(4)]), [9]),
            Loop(10, Ref(2), 11, Block([Op(13, "py.add", [Ref(12), Ref(11)])], [Ref(13)]), [12], [Ref(9)], [14]),
            Write(15, "model.layers.1.mlp.output", Ref(0)),
            Save(16, "s0", Ref(14)),
            Log(17, ["x", Ref(14)]),
            Iterations(18, 1, 4, 1, 19, Block([Read(20, MLP, None), Stop(21)])),
        ]
    )
)
GOLDEN = f"""\
%0 = read {MLP} @0
%1 = const abababababab
%2 = py.getitem(%0, (1::2, ..., None))
%3 = py.setitem(%0, [0, True], -inf) writes {MLP}
%4 = tensor.sum(%2, dim=-1, dtype=float32)
%5 = call model.norm(%0)
%6 = py.dict({{'a': %1, 2: 0.5}})
%9 = cond %4
  %8 = py.add(%4, 1)
  yield %8
else
  yield %4
%14 = loop %11 in %2 carrying %12 = %9
  %13 = py.add(%12, %11)
  yield %13
write model.layers.1.mlp.output @0 = %0
save s0 = %14
log('x', %14)
iterations %19 in 1:4
  %20 = read {MLP}
  stop"""


def graph(*nodes: Node) -> Graph:
    return Graph(Block(list(nodes)))


def test_a_graph_survives_msgpack_and_json() -> None:
    assert decode(encode(EVERYTHING)) == EVERYTHING
    assert from_json(to_json(EVERYTHING)) == EVERYTHING
    assert json.loads(to_json(EVERYTHING))["version"] == 1


def test_a_graph_prints_one_line_a_node() -> None:
    assert render(EVERYTHING) == GOLDEN


def test_a_legal_graph_passes_the_check() -> None:
    check(EVERYTHING, catalogue())


def test_walking_finds_nodes_constants_and_written_sites_inside_blocks() -> None:
    assert len(list(nodes_of(EVERYTHING.body))) == 17
    assert constants_of(EVERYTHING.body) == {"ab" * 32}
    assert sites_written(EVERYTHING.body) == {MLP, "model.layers.1.mlp.output"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Read(0, "nowhere.output")], "no site 'nowhere.output'"),
        ([Read(0, MLP), Read(0, MLP)], "defined twice"),
        ([Save(0, "s", Ref(7))], "value 7 isn't defined"),
        ([Op(0, "os.system", ["true"])], "no operation 'os.system'"),
        ([Op(0, "tensor.__class__", [1])], "no operation"),
        ([Op(0, "py.attr.__globals__", [1])], "no operation"),
        ([Const(0, "../../etc/passwd")], "64 hex digits"),
        ([Call(0, "model.layers.0", [1])], "passes a residual"),
        ([Call(0, "nowhere", [1])], "no module"),
        ([Read(0, MLP), Op(1, "py.add", [Ref(0), 1], writes=MLP)], "doesn't work in place"),
        (
            [
                Read(0, "model.layers.0.self_attn.q_proj.input"),
                Op(1, "tensor.zero_", [Ref(0)], writes="model.layers.0.self_attn.q_proj.input"),
            ],
            "assign by value",
        ),
        ([Op(0, "tensor.to", [1, Dtype("__import__")])], "no dtype"),
        ([Op(0, "py.add", [1, Special("os")])], "no special float"),
        ([Cond(0, True, Block([Read(1, MLP)]), Block([])), Save(2, "s", Ref(1))], "value 1 isn't defined"),
        ([Cond(0, True, Block([], [1]), Block([]), [3])], "differ in number"),
        ([Loop(0, List([1]), 1, Block([], [])), Save(2, "s", Ref(1))], "value 1 isn't defined"),
        (
            [Read(0, MLP), Op(1, "py.getitem", [Ref(0)])],
            "py.getitem takes 2 arguments by position, got 1 and 0 by name",
        ),
    ],
)
def test_an_illegal_graph_says_what_is_wrong(nodes: list[Node], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check(graph(*nodes), catalogue())


@pytest.mark.parametrize(
    "nodes",
    [
        [Read(0, "model.layers.1.mlp.output"), Read(1, MLP)],
        [Read(0, MLP, 1), Read(1, "model.layers.1.mlp.output", 0)],
        [Read(0, MLP), Read(1, "model.layers.1.mlp.output"), Op(2, "tensor.zero_", [Ref(0)], writes=MLP)],
        [Read(0, "samples.output"), Read(1, "logits.output")],
        [Read(0, MLP, None)],
        [Iterations(0, 0, None, 1, 1, Block([])), Read(2, MLP, 3)],
        [Iterations(0, 2, 2, 1, 1, Block([]))],
        [Iterations(0, 0, 2, 1, 1, Block([Iterations(2, 0, 2, 1, 3, Block([]))]))],
        [Loop(0, List([1]), 1, Block([Read(2, MLP), Read(3, "model.layers.1.mlp.output")]))],
        [Cond(0, True, Block([Read(1, "model.layers.1.mlp.output")]), Block([])), Read(2, MLP)],
    ],
)
def test_a_graph_against_the_models_order_is_refused(nodes: list[Node]) -> None:
    with pytest.raises(OutOfOrderError):
        check(graph(*nodes), catalogue())


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", b"{}", encode(EVERYTHING)[:-3], b"\x81\xa4type\xa4evil"])
def test_bytes_that_are_no_graph_raise_one_error(data: bytes) -> None:
    with pytest.raises(GraphError):
        decode(data)
    with pytest.raises(GraphError):
        from_json(data)


def test_unknown_fields_and_other_versions_are_refused() -> None:
    text = to_json(EVERYTHING)
    with pytest.raises(GraphError, match="unknown field"):
        from_json(text.replace('"version":1', '"version":1,"code":"print()"'))
    with pytest.raises(GraphError, match="version 7"):
        from_json(text.replace('"version":1', '"version":7'))


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    block = Block([])
    for i in range(100):
        block = Block([Cond(i, True, block, Block([]))])
    with pytest.raises(GraphError, match="deep"):
        check(Graph(block), catalogue())
    arg: Arg = 1
    for _ in range(100_000):
        arg = List([arg])
    with pytest.raises((GraphError, RecursionError)):
        decode(encode(graph(Log(0, [arg]))))


def test_operations_that_leave_the_tensor_world_do_not_exist() -> None:
    for name in (
        "numpy",
        "data_ptr",
        "storage",
        "untyped_storage",
        "resize_",
        "set_",
        "share_memory_",
        "as_strided",
        "apply_",
    ):
        assert f"tensor.{name}" not in OPS
    for name in ("load", "save", "from_file", "empty", "empty_like", "compile", "set_default_device", "hub"):
        assert f"torch.{name}" not in OPS
    assert RANDOM <= OPS


@pytest.mark.parametrize("name", ["py.int", "py.invert", "py.insert", "py.items", "tensor.isnan", "py.attr"])
def test_names_that_look_in_place_but_are_not(name: str) -> None:
    assert not is_inplace(name)


def test_graphs_need_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, nnsight_vllm.graph.check, nnsight_vllm.graph.codec, nnsight_vllm.graph.text;"
        "sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ACROSS = Graph(
    Block(
        [
            Import(0, "0.1", 1),
            Read(1, MLP, 1),
            Op(2, "py.add", [Ref(0), Ref(1)]),
            Export(3, "1.0", Ref(2)),
        ]
    )
)


def test_values_of_other_requests_print_travel_and_pass_the_check() -> None:
    check(ACROSS, catalogue())
    assert decode(encode(ACROSS)) == from_json(to_json(ACROSS)) == ACROSS
    assert render(ACROSS).splitlines() == [
        "%0 = import 0.1 @1",
        f"%1 = read {MLP} @1",
        "%2 = py.add(%0, %1)",
        "export 1.0 = %2",
    ]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Iterations(0, 0, 2, 1, 1, Block([Import(2, "k", 0)]))], "node 2: an import stands at the top level"),
        ([Cond(0, True, Block([Export(1, "k", 5)]), Block([]))], "node 1: an export stands at the top level"),
        ([Import(0, "", 0)], "1 to 64 characters, got 0"),
        ([Export(0, "k" * 65, 1)], "1 to 64 characters, got 65"),
        ([Import(0, "k", -1)], "count from 0, got -1"),
        ([Export(0, "k", Ref(7))], "value 7 isn't defined"),
        ([Iterations(0, 0, None, 1, 1, Block([])), Import(2, "k", 3)], "after an unbounded iteration block"),
        ([Import(0, "k", 2), Read(1, MLP, 1)], "at iteration 1 has passed"),
    ],
)
def test_what_passes_between_requests_has_its_place(nodes: list[Node], message: str) -> None:
    with pytest.raises((GraphError, OutOfOrderError), match=message):
        check(Graph(Block(nodes)), catalogue())


def test_where_a_program_stands_behind_its_nodes() -> None:
    nodes: list[Node] = [
        Read(0, MLP, 0),
        Op(1, "py.add", [Ref(0), 1]),
        Iterations(2, 1, 6, 2, 3, Block([Read(4, MLP, None)])),
        Op(5, "py.add", [Ref(4), 1]),
        Iterations(6, 7, None, 1, 7, Block([])),
    ]
    assert [iteration_after(nodes[:i]) for i in range(6)] == [0, 0, 0, 5, 5, None]
