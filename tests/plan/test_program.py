import pytest

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import (
    Block,
    Cond,
    Const,
    Export,
    Graph,
    Import,
    Iterations,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Stop,
    Write,
)
from nnsight_vllm.plan.instructions import At, Run
from nnsight_vllm.plan.program import ProgramCache, compile_graph


def text(*nodes: Node) -> str:
    return str(compile_graph(Graph(Block(list(nodes)))))


def test_straight_code_waits_once_a_site_and_frees_after_the_last_use() -> None:
    program = text(
        Read(0, "a", 0),
        Read(1, "a", 0),
        Op(2, "py.add", [Ref(0), Ref(1)]),
        Save(3, "sum", Ref(2)),
        Write(4, "b", Ref(2), 0),
    )
    assert program == "\n".join(
        [
            "0  at a @0",
            "1  %0 = read a @0",
            "2  %1 = read a @0",
            "3  %2 = py.add(%0, %1)  | free %0 %1",
            "4  save sum = %2",
            "5  at b @0",
            "6  write b @0 = %2  | free %2",
            "7  end",
        ]
    )


def test_a_branch_moves_its_values_to_the_results_and_frees_its_own() -> None:
    program = text(
        Read(0, "a", 0),
        Cond(
            1,
            Ref(0),
            Block([Op(2, "tensor.neg", [Ref(0)])], [Ref(2)]),
            Block([Read(3, "b", 0)], [Ref(3)]),
            [4],
        ),
        Save(5, "x", Ref(4)),
    )
    assert program == "\n".join(
        [
            " 0  at a @0",
            " 1  %0 = read a @0",
            " 2  unless %0 jump 6",
            " 3  %2 = tensor.neg(%0)",
            " 4  %4 = %2  | free %2",
            " 5  jump 9",
            " 6  at b @0",
            " 7  %3 = read b @0",
            " 8  %4 = %3  | free %3",
            " 9  free %0",
            "10  save x = %4  | free %4",
            "11  end",
        ]
    )


def test_what_a_loop_takes_from_outside_lives_until_it_ends() -> None:
    program = text(
        Read(0, "a", 0),
        Loop(
            1,
            Ref(0),
            2,
            Block([Op(5, "py.mul", [Ref(2), Ref(0)]), Op(6, "py.add", [Ref(3), Ref(5)])], [Ref(6)]),
            [3],
            [0],
            [4],
        ),
        Save(7, "x", Ref(4)),
    )
    assert program == "\n".join(
        [
            " 0  at a @0",
            " 1  %0 = read a @0",
            " 2  loop over %0",
            " 3  %3 = 0",
            " 4  %2 = next item or jump 9",
            " 5  %5 = py.mul(%2, %0)",
            " 6  %6 = py.add(%3, %5)  | free %5",
            " 7  %3 = %6  | free %6",
            " 8  jump 4",
            " 9  %4 = %3",
            "10  free %0 %2 %3",
            "11  save x = %4  | free %4",
            "12  end",
        ]
    )


def test_an_iterations_block_waits_for_each_iteration_and_its_last_values_stay() -> None:
    program = text(Iterations(0, 1, 4, 1, 1, Block([Read(2, "a", None)])), Save(3, "x", Ref(2)))
    assert program == "\n".join(
        [
            "0  iterations 1:4:1",
            "1  %1 = next iteration or jump 6",
            "2  at the iteration",
            "3  at a",
            "4  %2 = read a",
            "5  jump 1",
            "6  free %1",
            "7  save x = %2  | free %2",
            "8  end",
        ]
    )


def test_both_branches_wait_for_a_site_that_only_one_was_at() -> None:
    program = compile_graph(
        Graph(
            Block(
                [
                    Read(0, "a", 0),
                    Cond(1, Ref(0), Block([Read(2, "b", 0)]), Block([])),
                    Read(3, "b", 0),
                ]
            )
        )
    )
    assert [i for i in program.code if isinstance(i, At)] == [At("a", 0), At("b", 0), At("b", 0)]


def test_a_program_knows_what_it_needs() -> None:
    read: list[Node] = [Const(0, "f" * 64), Read(1, "samples.output", 0)]
    program = compile_graph(Graph(Block([*read, Op(2, "py.add", [Ref(0), Ref(1)])])))
    assert (program.copied, program.writes_samples) == (frozenset(), False)
    edit = Op(2, "py.setitem", [Ref(1), Slice(), 3], writes="samples.output")
    program = compile_graph(Graph(Block([*read, edit])))
    assert (program.copied, program.writes_samples) == (frozenset(), True)
    program = compile_graph(Graph(Block([*read, Op(2, "tensor.add_", [Ref(0), 1])])))
    assert (program.copied, program.writes_samples) == (frozenset({0}), False)


def test_constants_are_copied_where_a_change_may_reach_them() -> None:
    def copied(*nodes: Node) -> frozenset[int]:
        return compile_graph(Graph(Block([Const(0, "f" * 64), Read(1, "a", 0), *nodes]))).copied

    change = Op(9, "tensor.zero_", [Ref(1)], writes="a")
    assert copied(Op(2, "py.iadd", [Ref(1), Ref(0)], writes="a")) == frozenset()
    assert copied(Op(2, "py.matmul", [Ref(1), Ref(0)]), change) == frozenset()
    assert copied(Op(2, "tensor.view", [Ref(0), -1]), change) == {0}
    assert copied(Op(2, "py.list", [Ref(0)]), change) == {0}
    assert copied(Cond(2, Ref(1), Block([], [Ref(0)]), Block([], [Ref(1)]), [3]), change) == {0}
    assert copied(Op(2, "nn.relu", [Ref(0), True])) == {0}


def test_graphs_of_one_structure_share_a_program_and_the_oldest_leave() -> None:
    checked: list[Graph] = []
    cache = ProgramCache(checked.append, max_programs=2)
    one, two, three = (encode(Graph(Block([Stop(id)]))) for id in range(3))
    assert cache.get(one)[0] is cache.get(one)[0]
    cache.get(two)
    cache.get(three)
    assert (len(cache), len(checked)) == (2, 3)
    cache.get(one)
    assert (cache.hits, cache.misses) == (1, 4)


def test_bytes_that_are_no_graph_are_refused_and_not_kept() -> None:
    cache = ProgramCache(lambda graph: None)
    with pytest.raises(GraphError):
        cache.get(b"\x00nonsense")
    assert len(cache) == 0


def test_run_instructions_hold_the_nodes_themselves() -> None:
    node = Read(0, "a", 0)
    program = compile_graph(Graph(Block([node])))
    assert program.code[1] == Run(node, (0,))


def test_a_value_of_another_request_is_waited_for_only_where_its_iteration_may_not_have_begun() -> None:
    program = text(
        Import(0, "k", 0),
        Read(1, "a", 1),
        Import(2, "l", 1),
        Op(3, "py.add", [Ref(2), Ref(1)]),
        Import(4, "m", 2),
        Op(5, "py.add", [Ref(3), Ref(4)]),
        Export(6, "n", Ref(5)),
    )
    assert program == "\n".join(
        [
            " 0  at the iteration @0",
            " 1  %0 = import k @0  | free %0",
            " 2  at a @1",
            " 3  %1 = read a @1",
            " 4  %2 = import l @1",
            " 5  %3 = py.add(%2, %1)  | free %1 %2",
            " 6  at the iteration @2",
            " 7  %4 = import m @2",
            " 8  %5 = py.add(%3, %4)  | free %3 %4",
            " 9  export n = %5  | free %5",
            "10  end",
        ]
    )


def test_a_site_that_is_edited_again_behind_an_import_is_not_fused() -> None:
    edit = Op(1, "tensor.zero_", [Ref(0)], writes="a")
    again = Op(5, "tensor.zero_", [Ref(4)], writes="a")
    alone = compile_graph(Graph(Block([Read(0, "a", 0), edit])))
    behind = compile_graph(Graph(Block([Read(0, "a", 0), edit, Import(3, "k", 0), Read(4, "a", 0), again])))
    assert alone.fused and not behind.fused
