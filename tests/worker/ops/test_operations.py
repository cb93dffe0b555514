import pytest
import torch

from nnsight_vllm.errors import GraphError
from nnsight_vllm.graph.nodes import Arg, Dict, Dots, Dtype, List, Ref, Slice, Special, Tuple
from nnsight_vllm.graph.ops import OPS, RANDOM
from nnsight_vllm.worker.ops.operations import FACTORIES, OPERATIONS, evaluate


def test_every_operation_of_the_table_can_be_called_and_nothing_else() -> None:
    assert set(OPERATIONS) == OPS
    assert all(callable(operation) for operation in OPERATIONS.values())
    assert (FACTORIES | RANDOM) <= OPS


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        (Ref(3), "three"),
        (Tuple([Slice(1, None, Ref(4)), Dots(), None]), (slice(1, None, 2), ..., None)),
        (Dict([("a", List([1.5, True])), (2, Dtype("bfloat16"))]), {"a": [1.5, True], 2: torch.bfloat16}),
        (Special("-inf"), float("-inf")),
    ],
)
def test_arguments_become_python_values(arg: Arg, value: object) -> None:
    assert evaluate(arg, {3: "three", 4: 2}) == value


@pytest.mark.parametrize(("arg", "message"), [(Ref(9), "value 9 was never computed"), (Dtype("Tensor"), "no dtype")])
def test_arguments_that_mean_nothing_are_refused(arg: Arg, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        evaluate(arg, {})


@pytest.mark.parametrize("name", ["__class__", "__init__", "data", "grad_fn", "untyped_storage"])
def test_only_listed_attributes_can_be_read(name: str) -> None:
    with pytest.raises(AttributeError, match="no attribute"):
        OPERATIONS["py.attr"](torch.ones(2), name)


def test_named_results_have_their_fields() -> None:
    top = OPERATIONS["tensor.topk"](torch.tensor([1.0, 3.0, 2.0]), 2)
    assert OPERATIONS["py.attr"](top, "indices").tolist() == [1, 2]


@pytest.mark.parametrize("name", ["py.pow", "py.ipow", "py.lshift", "py.ilshift"])
def test_integers_that_would_fill_the_memory_are_refused(name: str) -> None:
    with pytest.raises(OverflowError, match="the limit is 4096"):
        OPERATIONS[name](10, 10**9)


def test_in_place_operators_change_a_tensor_and_return_it() -> None:
    tensor = torch.tensor([2, 3])
    assert OPERATIONS["py.ipow"](tensor, 2) is tensor
    assert OPERATIONS["py.ilshift"](tensor, 1) is tensor
    assert tensor.tolist() == [8, 18]


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("py.mul", [0], 10**9),
        ("py.mul", 10**9, "ab"),
        ("py.imul", [0], 10**9),
        ("py.mul", 1 << 40_000, 1 << 40_000),
        ("py.pow", 2, 10**6),
        ("py.lshift", 1, 10**9),
        ("py.add", "a" * (1 << 20), "b"),
        ("py.mod", "%999999999d", 1),
    ],
    ids=["list", "text", "in-place", "integers", "power", "shift", "join", "format"],
)
def test_plain_values_cannot_be_blown_up(name: str, left: object, right: object) -> None:
    with pytest.raises((OverflowError, TypeError)):
        OPERATIONS[name](left, right)
