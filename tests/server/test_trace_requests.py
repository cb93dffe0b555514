"""Traces of strangers: what isn't legal is refused with a path into the body, before the engine hears of it."""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import graph
from toy_server import ToyEngine, ToyLimits

from nnsight_vllm.graph.codec import digest
from nnsight_vllm.graph.links import Links, Need
from nnsight_vllm.graph.nodes import Block, Cond, Const, Export, Import, Iterations, Node, Op, Read, Ref, Save
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.trace_requests import MissingTensors, TraceReader
from nnsight_vllm.wire.trace import Asked, SentRequest, SentTrace

VECTOR = safetensors.torch.save({"tensor": torch.ones(4)})


def reader(**limits: Any) -> TraceReader:
    engine: Any = ToyEngine()
    bounds: Any = ToyLimits(**limits)
    return TraceReader(engine, bounds, "alice", lambda name: None)


def body(*requests: SentRequest, **more: Any) -> bytes:
    return msgspec.msgpack.encode(SentTrace(list(requests), **{"samplings": [{}], **more}))


def request(*nodes: Node, links: Links | None = None, **more: Any) -> SentRequest:
    return SentRequest([1, 2], 0, graph=graph(*nodes) if nodes else None, links=links, **more)


def refused(data: bytes, **limits: Any) -> Refused:
    with pytest.raises(Refused) as error:
        reader(**limits).trace(data)
    assert 400 <= int(error.value.status) < 500
    return error.value


def test_a_legal_trace_becomes_requests() -> None:
    name = digest(VECTOR)
    sent = request(Const(0, name), Save(1, "s", Ref(0)), edits=[graph(Read(0, "0.mlp"))], cache_salt="mine")
    (one,), tensors = reader().trace(body(sent, tensors={name: VECTOR}))
    assert (one.prompt.rows, one.constants, one.tenant) == (2, frozenset({name}), "secret:alice")
    assert one.prompt.engine == {"prompt_token_ids": [1, 2], "cache_salt": "mine"}
    assert len(one.graphs) == 2 and tensors == {name: VECTOR}


READ = Read(0, "0.mlp")


def nested(depth: int) -> Node:
    node: Node = Save(0, "s", 1)
    for id in range(1, depth):
        node = Cond(id, True, Block([node]), Block([]))
    return node


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        (b"\xc1", None, "invalid"),
        (b"", None, "truncated"),
        (b"\x91" * 100_000, None, ""),
        (msgspec.msgpack.encode({"requests": [], "samplings": [], "evil": 1}), None, "unknown field `evil`"),
        (body(), "requests", "at least one"),
        (body(SentRequest([1, 99], 0)), "requests[0].token_ids", "vocabulary"),
        (body(SentRequest([], 0)), "requests[0].token_ids", "empty"),
        (body(SentRequest([1], 1)), "requests[0].sampling", "no number 1"),
        (body(SentRequest([1], -1)), "requests[0].sampling", "no number -1"),
        (body(request(), samplings=[{"heat": 1}]), "samplings[0]", "heat"),
        (body(request(), samplings=[{"_fields": 1}]), "samplings[0]", "sets '_fields' itself"),
        (body(request(), samplings=[{"skip_clone": True}]), "samplings[0]", "sets 'skip_clone' itself"),
        (
            body(request(), samplings=[{"extra_args": {"nnsight_vllm": b""}}]),
            "samplings[0]",
            "sets 'nnsight_vllm' itself",
        ),
        (body(request(), samplings=[{"n": 65}]), "requests", "65 samples; the limit is 64"),
        (body(*[request()] * 65), "requests", "65 requests; the limit is 64"),
        (
            body(request(READ), SentRequest([1], 0, edits=[b"\xc1"])),
            "requests[1].edits[0]",
            "not an intervention graph",
        ),
        (body(SentRequest([1], 0, after=[graph(Read(0, "9.mlp"))])), "requests[0].after[0]", "no site '9.mlp'"),
        (
            body(request(*[Read(i, "0.mlp") for i in range(201)])),
            "requests[0].graph",
            "201 nodes in a graph; the limit is 200",
        ),
        (body(request(nested(100))), "requests[0].graph", "nested more than 64 deep"),
        (body(SentRequest([1] * 40, 0, graph=graph(READ))), "requests[0]", "must fit into one step"),
        (body(request(READ), tensors={"ab" * 32: b""}), f"tensors['{'ab' * 32}']", "no graph of the trace names it"),
        (body(request(Const(0, "ab" * 32)), tensors={"ab" * 32: b"x"}), f"tensors['{'ab' * 32}']", "sha256"),
        (
            body(request(Const(0, digest(b"x"))), tensors={digest(b"x"): b"x"}),
            f"tensors['{digest(b'x')}']",
            "not safetensors",
        ),
    ],
)
def test_what_is_not_legal_is_refused_with_its_place(data: bytes, param: str | None, message: str) -> None:
    error = refused(data)
    assert error.param == param
    assert message in error.message


def test_tensors_that_nobody_has_are_named() -> None:
    error = refused(body(request(Const(0, "ab" * 32))))
    assert isinstance(error, MissingTensors) and error.digests == ["ab" * 32] and int(error.status) == 409


def test_a_tensor_by_another_name_is_refused() -> None:
    data = safetensors.torch.save({"other": torch.ones(2)})
    error = refused(body(request(Const(0, digest(data))), tensors={digest(data): data}))
    assert "one tensor named 'tensor' is expected; got ['other']" in error.message


def test_too_many_bytes_of_constants_are_refused() -> None:
    name = digest(VECTOR)
    sent = body(request(Const(0, name)), tensors={name: VECTOR})
    assert f"{len(VECTOR)} bytes of constants; the limit is 10" in refused(sent, constant_bytes=10).message


# -- links ---------------------------------------------------------------------------------------------------------------


def maker(key: str = "k", **links: Any) -> SentRequest:
    return request(READ, Export(1, key, Ref(0)), links=Links(**{"makes": {key: 1}, **links}))


def taker(key: str = "k", iteration: int = 1, **links: Any) -> SentRequest:
    needs = [Need(key, iteration, 0)]
    return request(Import(0, key, iteration), links=Links(**{"needs": needs, **links}))


def test_honest_links_pass() -> None:
    requests, _ = reader().trace(body(maker(), taker()))
    assert [one.links is not None for one in requests] == [True, True]


def both(makes: str, needs: str, iteration: int, export_at: int) -> SentRequest:
    nodes: list[Node] = [Import(0, needs, iteration), Read(1, "0.mlp", export_at), Export(2, makes, Ref(1))]
    return request(*nodes, links=Links(makes={makes: 1}, needs=[Need(needs, iteration, 0)]))


def test_two_that_need_each_other_pass_where_nobody_waits_for_himself() -> None:
    first = request(
        READ,
        Export(1, "a", Ref(0)),
        Import(2, "b", 2),
        links=Links(makes={"a": 1}, needs=[Need("b", 2, 2)]),
    )
    requests, _ = reader().trace(body(first, both("b", "a", 1, 1)))
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        ([maker(bundle="another's")], "requests[0].links.bundle", "which bundle"),
        ([maker(size=7)], "requests[0].links.bundle", "which bundle"),
        ([maker(program=1)], "requests[0].links.program", "no number 1"),
        ([maker(makes={})], "requests[0].links.makes", "exports ['k']"),
        ([maker(makes={"k": 1, "more": 1})], "requests[0].links.makes", "make ['k', 'more']"),
        ([maker(), taker(needs=[])], "requests[1].links.needs", "other values"),
        ([maker(), taker(needs=[Need("k", 0, 0)])], "requests[1].links.needs", "other values"),
        ([maker(), taker(needs=[Need("k", 1, 9)])], "requests[1].links.needs", "other values"),
        ([taker()], "requests[0].links.needs", "no request of the trace makes 'k'"),
        ([maker(), maker()], "requests[1].links.makes", "requests 0 and 1 both make 'k'"),
        ([request(READ, Export(1, "k", Ref(0)))], "requests[0].links", "don't name"),
        ([request(links=Links(makes={"k": 1}))], "requests[0].links", "without graphs"),
        (
            [request(READ, Export(1, "k", Ref(0)), Export(2, "k", Ref(0)), links=Links(makes={"k": 1}))],
            "requests[0].links",
            "each key once",
        ),
        ([both("a", "b", 1, 1), both("b", "a", 1, 1)], "requests[0].links", "wait for each other"),
        ([both("a", "a", 1, 1)], "requests[0].links", "wait for each other"),
        (
            [
                request(
                    Iterations(0, 0, None, 1, 1, Block([Read(2, "0.mlp", None)])),
                    Op(3, "py.add", [1, 1]),
                    Export(4, "k", Ref(3)),
                    links=Links(makes={"k": 1}),
                )
            ],
            "requests[0].graph",
            "no end",
        ),
    ],
)
def test_links_that_the_graphs_do_not_bear_out_are_refused(sent: list[SentRequest], param: str, message: str) -> None:
    error = refused(body(*sent))
    assert error.param == param
    assert message in error.message


def test_a_maker_with_several_samples_is_refused() -> None:
    assert "n=2" in refused(body(maker(), taker(), samplings=[{"n": 2}])).message


def test_many_needs_are_looked_at_in_a_moment() -> None:
    def nodes(own: str, other: str) -> list[Node]:
        exports: list[Node] = [READ, *(Export(1 + i, f"{own}{i}", Ref(0)) for i in range(4000))]
        return exports + [Import(5000 + i, f"{other}{i}", 1 + i) for i in range(4000)]

    def sent(own: str, other: str) -> SentRequest:
        needs = [Need(f"{other}{i}", 1 + i, 5000 + i) for i in range(4000)]
        return request(*nodes(own, other), links=Links(makes={f"{own}{i}": 1 for i in range(4000)}, needs=needs))

    data = body(sent("a", "b"), sent("b", "a"))
    start = time.process_time()
    requests, _ = reader(graph_nodes=10_000, trace_nodes=20_000).trace(data)
    assert len(requests) == 2 and time.process_time() - start < 5


def test_a_long_chain_of_requests_is_walked_without_recursion() -> None:
    chain = [maker("k0"), *(both(f"k{i + 1}", f"k{i}", i + 1, i + 1) for i in range(60))]
    assert len(reader().trace(body(*chain))[0]) == 61


# -- noise ---------------------------------------------------------------------------------------------------------------


def _trace_body() -> bytes:
    name = digest(VECTOR)
    return body(maker(), taker(), request(Const(0, name), Save(1, "s", Ref(0))), tensors={name: VECTOR})


def _damaged(data: bytes, seed: int) -> bytes:
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed))
        changed[place : place + draw.choice([0, 1, 5])] = draw.randbytes(draw.choice([0, 1, 5]))
    return bytes(changed)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_traces_are_refused_or_legal(seed: int) -> None:
    try:
        assert reader().trace(_damaged(_trace_body(), seed))
    except Refused as error:
        assert 400 <= int(error.status) < 500


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_questions_are_refused_or_answered(seed: int) -> None:
    data = msgspec.json.encode(Asked(["some text"], [{"max_tokens": 3, "n": 2}]))
    assert reader().prepared(data).samplings[0].n == 2
    try:
        assert reader().prepared(_damaged(data, seed))
    except Refused as error:
        assert 400 <= int(error.status) < 500
