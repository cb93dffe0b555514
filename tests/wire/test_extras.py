"""What a request carries to the engine: one key, typed, and never a reason for the engine to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.wire.extras import KEY, RequestExtras, decode_extras, encode_extras


def params(extra_args: Any) -> Any:
    return SimpleNamespace(extra_args=extra_args)


@pytest.mark.parametrize(
    "extras",
    [
        RequestExtras(),
        RequestExtras([b"a", b"b"], is_chunkable=True, most_cached=0),
        RequestExtras([b"a"], Links("b", 2, {"k": 1}, [Need("l", 3, 4)], 1), salt=("s", 17)),
    ],
)
def test_extras_come_out_as_they_went_in(extras: RequestExtras) -> None:
    assert decode_extras(params(encode_extras(extras))) == extras


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_a_request_without_our_key_is_a_plain_one(extra_args: Any) -> None:
    assert decode_extras(params(extra_args)) is None


@pytest.mark.parametrize(
    "data", [b"", b"\xc1 evil", 5, "text", [b"a"], encode_extras(RequestExtras([b"a"]))[KEY] + b"x"]
)
def test_what_is_none_of_ours_is_a_graph_that_is_none(data: Any) -> None:
    assert decode_extras(params({KEY: data})) == RequestExtras([b""])


def test_unknown_fields_are_none_of_ours() -> None:
    data = msgspec.msgpack.encode({"graphs": [b"a"], "more": 1})
    assert decode_extras(params({KEY: data})) == RequestExtras([b""])
