"""What graphs share when they differ in constants only, and what may be sent home as it's appended."""

from __future__ import annotations

import pytest

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.check import Checker
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Cond,
    Const,
    Dtype,
    Graph,
    Iterations,
    List,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Special,
    Tuple,
)
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.plan import effects
from nnsight_vllm.plan.program import ProgramCache, compile_graph
from nnsight_vllm.plan.rows import RULES, Kind, is_fresh, rule_of
from nnsight_vllm.plan.template import Digest, parameter_of, split


def steer(vector: str, strength: float, row: int, bounds: Slice, start: int, stop: int | None) -> Graph:
    body: list[Node] = [
        Read(2, "a", None),
        Op(3, "py.getitem", [Ref(2), row]),
        Op(4, "py.getitem", [Ref(2), Tuple([bounds, None])]),
        Const(5, vector),
        Op(6, "py.mul", [Ref(5), strength]),
        Op(7, "py.iadd", [Ref(3), Ref(6)], writes="a"),
    ]
    return Graph(Block([Iterations(0, start, stop, 1, 1, Block(body))]))


def cache() -> ProgramCache:
    return ProgramCache(lambda graph: None)


def test_tensors_numbers_rows_slices_and_bounds_are_outside_of_the_structure() -> None:
    programs = cache()
    one = programs.get(encode(steer("a" * 64, 1.0, -1, Slice(0, 3), 0, None)))
    other = programs.get(encode(steer("b" * 64, -2.5, 4, Slice(1, 9), 2, None)))
    assert one[0] is other[0]
    assert (programs.hits, programs.misses, len(programs)) == (1, 1, 1)
    assert one[1] == [0, 1, -1, 0, 3, Digest("a" * 64), 1.0]
    assert other[1] == [2, 1, 4, 1, 9, Digest("b" * 64), -2.5]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([Ref(0), True], [Ref(0), False]),
        ([Ref(0), 1], [Ref(0), None]),
        ([Ref(0), Dtype("float32")], [Ref(0), Dtype("float64")]),
        ([Ref(0), Slice(1)], [Ref(0), Slice(None, 1)]),
        ([Ref(0), Tuple([1])], [Ref(0), List([1])]),
        ([Ref(0), "a"], [Ref(0), "b"]),
    ],
)
def test_flags_types_and_shapes_of_arguments_are_structure(one: list[Arg], other: list[Arg]) -> None:
    programs = cache()
    graphs = [Graph(Block([Read(0, "a"), Op(1, "tensor.sum", args)])) for args in (one, other)]
    assert programs.get(encode(graphs[0]))[0] is not programs.get(encode(graphs[1]))[0]


def test_infinity_is_a_number_like_others_and_parameters_have_negative_ids() -> None:
    template = split(Graph(Block([Read(0, "a"), Op(1, "py.mul", [Ref(0), Special("-inf")])])))
    assert template.parameters == [float("-inf")]
    (_, op) = template.graph.body.nodes
    assert isinstance(op, Op) and op.args == [Ref(0), Ref(parameter_of(0))]
    assert [parameter_of(parameter_of(k)) for k in range(3)] == [0, 1, 2]


def test_a_graph_from_outside_cannot_name_a_parameter() -> None:
    from fake_model import catalogue

    for graph in (Graph(Block([Op(-1, "torch.zeros", [1])])), Graph(Block([Save(0, "x", Ref(-1))]))):
        with pytest.raises(GraphError):
            Checker(catalogue()).run(graph)


def test_legality_is_asked_once_a_structure_and_bounds() -> None:
    asked: list[Graph] = []
    programs = ProgramCache(asked.append)
    for vector, start in (("a", 0), ("b", 0), ("a", 1)):
        programs.get(encode(steer(vector * 64, 1.0, 0, Slice(), start, None)))
    assert len(asked) == 2


def collecting(*body: Node, before: tuple[Node, ...] = (), after: tuple[Node, ...] = ()) -> dict[int, str]:
    made: list[Node] = [Op(0, "py.list"), Save(1, "x", Ref(0)), *before]
    graph = Graph(Block([*made, Iterations(2, 0, None, 1, 3, Block([Read(4, "a", None), *body])), *after]))
    return effects.streams(graph)


APPEND = Op(9, "py.append", [Ref(0), Ref(5)])


def test_a_list_that_only_collects_is_a_stream() -> None:
    fresh = Op(5, "py.mul", [Ref(4), 2.0])
    assert collecting(fresh, APPEND) == {0: "x"}
    assert collecting(Op(5, "py.getitem", [Ref(4), -1]), APPEND) == {0: "x"}
    assert collecting(fresh, Op(6, "py.iadd", [Ref(4), 1.0], writes="a"), APPEND) == {0: "x"}


def test_a_list_that_is_read_or_whose_items_change_is_none() -> None:
    fresh = Op(5, "py.mul", [Ref(4), 2.0])
    assert collecting(fresh, APPEND, Op(10, "py.len", [Ref(0)])) == {}
    assert collecting(fresh, APPEND, Op(10, "tensor.add_", [Ref(5), 1.0])) == {}
    assert collecting(fresh, Op(6, "py.getitem", [Ref(5), 0]), APPEND, Op(10, "tensor.add_", [Ref(6), 1.0])) == {}
    assert collecting(fresh, APPEND, after=(Save(11, "y", Ref(0)),)) == {}
    assert collecting(fresh, APPEND, after=(Save(11, "x", 1),)) == {}
    assert collecting(fresh, Op(9, "py.append", [Ref(0), Ref(0)])) == {}
    appended = (Op(5, "torch.zeros", [1]), APPEND)
    late: list[Node] = [Op(0, "py.list"), *appended, Save(1, "x", Ref(0))]
    assert effects.streams(Graph(Block(late))) == {}


def test_branches_and_loops_hide_what_shares_memory() -> None:
    fresh = Op(5, "py.mul", [Ref(4), 2.0])
    branch = Cond(6, Ref(4), Block([], [Ref(5)]), Block([], [Ref(5)]), [7])
    assert collecting(fresh, branch, APPEND, Op(10, "tensor.add_", [Ref(7), 1.0])) == {}
    loop = Loop(6, Ref(5), 7, Block([Op(8, "tensor.add_", [Ref(7), 1.0])]))
    assert collecting(fresh, loop, APPEND) == {}


def test_what_must_stay_together_runs_alone() -> None:
    def kept(*nodes: Node) -> bool:
        return compile_graph(Graph(Block([Read(0, "a"), *nodes]))).keeps_together

    branch = Cond(20, Ref(0), Block([]), Block([]))
    assert not kept(Op(1, "py.iadd", [Ref(0), 1.0], writes="a"), branch)
    assert not kept(Op(1, "py.getitem", [Ref(0), -1]), branch, Op(2, "py.iadd", [Ref(1), 1.0], writes="a"))
    assert kept(Op(1, "tensor.t", [Ref(0)]), branch, Op(2, "py.iadd", [Ref(1), 1.0], writes="a"))
    assert kept(Op(1, "tensor.clone", [Ref(0)]), Op(2, "py.iadd", [Ref(1), 1.0]), branch)
    assert not kept(Op(1, "tensor.clone", [Ref(0)]), Op(2, "py.iadd", [Ref(1), 1.0]))


def test_rules_are_for_operations_that_exist() -> None:
    assert set(RULES) <= OPS
    assert rule_of("tensor.topk").default == -1
    assert rule_of("tensor.svd").kind is Kind.OPAQUE
    assert is_fresh("py.add") and is_fresh("tensor.topk")
    assert not any(map(is_fresh, ("py.getitem", "tensor.add_", "py.iadd", "tensor.to", "tensor.view", "py.list")))
