"""What a short form becomes: a graph whose edits the kernels' tables know, with the tensors that it names, or a refusal with its place."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from short_form import FAKE, OPS, ROWS, STEPS, STORED, TOY, VECTOR, lowered, run, sent_save, tensor_of
from torch import Tensor

from nnsight_vllm.graph.codec import digest, to_json
from nnsight_vllm.graph.nodes import Block, Const, Graph, Iterations
from nnsight_vllm.graph.walk import nodes_of
from nnsight_vllm.plan.caching import Salt, caching_of
from nnsight_vllm.plan.program import Program, compile_graph
from nnsight_vllm.plan.template import split
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.full import Lowered, SaveForm
from nnsight_vllm.server.schema import Intervention
from nnsight_vllm.server.short import lower
from nnsight_vllm.trace.encode import Constants
from nnsight_vllm.trace.record import record

# -- what the engine makes of it -----------------------------------------------------------------------------------------


def program(sent: Lowered) -> Program:
    return compile_graph(split(sent.graph).graph)


BLOCK, VALUES = "model.layers.1.output[0]", {"tensor": "v8", "down": "d8", "up": "u8", "encoder": "v8", "decoder": "v8"}
TABLE = {"set": "replace", "norm_add": "norm_matched_add"}


@pytest.mark.parametrize("edit", [edit for edit, _ in OPS], ids=[str(edit["op"]) for edit, _ in OPS])
def test_edits_of_all_rows_are_the_tables(edit: dict[str, Any]) -> None:
    STORED.update(
        v8=safetensors.torch.save({"tensor": torch.ones(8)}),
        d8=safetensors.torch.save({"tensor": torch.ones(2, 8)}),
        u8=safetensors.torch.save({"tensor": torch.ones(8, 2)}),
    )
    own = {name: VALUES.get(name, value) for name, value in edit.items()}
    sites = ["model.layers.2.output", BLOCK, "model.layers.0.mlp.output"]
    found = program(lowered(FAKE, edits=[{"site": site, **own} for site in sites]))
    assert [fused.site for fused in found.fused.values()] == [
        "model.layers.0.mlp.output",
        "model.layers.1.output",
        "model.layers.2.output",
    ]
    assert {found.edits[id].operation for fused in found.fused.values() for id in fused.edits} == {
        TABLE.get(edit["op"], edit["op"])
    }


def test_all_and_last_share_one_block_and_a_save_is_a_fused_site() -> None:
    edits = [{"site": "1.output", "op": "add", "tensor": "v", "scale": 4.0}]
    sent = lowered(edits=edits, save=[{"name": "h", "site": "2.output", "positions": "last"}])
    (block,) = [node for node in sent.graph.body.nodes if isinstance(node, Iterations)]
    assert (block.start, block.stop, block.step) == (0, None, 1)
    found = program(sent)
    assert [fused.site for fused in found.fused.values() if fused.saves] == ["2.out"]
    other = lowered(edits=[{**edits[0], "scale": 1.0, "tensor": "w"}], save=sent_save("last"))
    assert split(other.graph).graph == split(sent.graph).graph  # so they run as one group


@pytest.mark.parametrize(
    ("positions", "salt"),
    [
        ("all", Salt.GRAPH),
        ([1], Salt.GRAPH),
        ({"start": 0, "stop": 2}, Salt.GRAPH),
        ("last", Salt.LENGTH),
        ("prompt", Salt.LENGTH),
    ],
)
def test_edited_rows_are_cached_as_those_of_a_recorded_block(positions: Any, salt: Salt) -> None:
    sent = lowered(edits=[{"site": "1.output", "op": "add", "tensor": "v", "positions": positions}])
    assert caching_of(sent.graph, lambda site: 1, lambda digest: 1, ROWS).salt is salt


def test_a_site_that_others_share_is_assigned() -> None:
    edit = {"site": "model.layers.0.self_attn.q_proj.input", "op": "scale", "scale": 2.0, "positions": [0, 1, 3]}
    sent = lowered(FAKE, rows=4, edits=[edit])
    assert "write" in [type(node).__name__.lower() for node in nodes_of(sent.graph.body)]


# -- tensors -------------------------------------------------------------------------------------------------------------


def inline(tensor: Tensor) -> dict[str, Any]:
    data = base64.b64encode(tensor.contiguous().view(torch.uint8).numpy().tobytes()).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_inline_tensor_has_the_digest_of_a_clients_own(dtype: torch.dtype) -> None:
    vector = VECTOR.to(dtype)
    edit = {"site": "1.output", "op": "set", "tensor": inline(vector)}
    sent = lowered(edits=[edit], save=[{"name": "x", "site": "1.output", "positions": [0]}])
    own = Constants()
    assert sent.tensors.keys() == {own.add(vector)} and sent.tensors == own.data
    assert run(sent)["x"] == [vector.float().tolist()]


def test_a_tensor_may_come_by_its_digest_in_the_body() -> None:
    name = digest(STORED["v"])
    sent = lowered(
        edits=[{"site": "1.output", "op": "add", "tensor": name}],
        tensors={name: base64.b64encode(STORED["v"]).decode()},
    )
    assert sent.tensors == {name: STORED["v"]}


# -- the full form -------------------------------------------------------------------------------------------------------


def full(**more: Any) -> dict[str, Any]:
    def fn(root: Any, tracer: Any) -> dict[str, Any]:
        import nnsight_vllm as nv

        states = nv.list().save()
        root.model.layers[0].output[0][:] += torch.ones(8)
        first = root.model.layers[0].output[0].save()
        with tracer.all():
            states.append(root.model.layers[1].output[0][-1])
            last = root.model.layers[2].output[0].save()
        return {"states": states, "first": first, "last": last}

    recorded = record(FAKE, fn)
    tensors = {name: base64.b64encode(data).decode() for name, data in recorded.tensors.items()}
    return {"graph": msgspec.json.decode(recorded.to_json()), "tensors": tensors, **more}


def test_a_whole_graph_is_read_and_its_names_are_told() -> None:
    body = full(stream=["states"])
    sent = lowered(FAKE, **body)
    assert msgspec.json.decode(to_json(sent.graph)) == body["graph"]
    assert sent.tensors.keys() == {node.digest for node in nodes_of(sent.graph.body) if isinstance(node, Const)}
    assert sent.names == {
        "states": SaveForm(True, True),
        "first": SaveForm(False, False),
        "last": SaveForm(True, False),
    }


# -- what is refused -----------------------------------------------------------------------------------------------------

ADD: dict[str, Any] = {"site": BLOCK, "op": "add", "tensor": "v"}
SAVE = {"name": "h", "site": BLOCK}
EMPTY: dict[str, Any] = msgspec.json.decode(to_json(Graph(Block([]))))
OTHERS = base64.b64encode(STORED["w"]).decode()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"edits": [ADD]}, "edits[0].tensor", "expected a tensor of shape [8]; got [4]"),
        ({"edits": [{**ADD, "tensor": "sad"}]}, "edits[0].tensor", "no tensor 'sad'"),
        ({"edits": [{**ADD, "tensor": "whole"}]}, "edits[0].tensor", "got I64"),
        (
            {"edits": [{"site": BLOCK, "op": "low_rank", "down": "down", "up": "up"}]},
            "edits[0].down",
            "expected a tensor of shape [2, 8]; got [2, 4]",
        ),
        ({"edits": [{"site": BLOCK, "op": "low_rank", "down": "v", "up": "up"}]}, "edits[0].down", "[rank, 8]"),
        (
            {"edits": [{**ADD, "tensor": {"dtype": "float32", "shape": [8], "data": "AAAA"}}]},
            "edits[0].tensor.data",
            "expected 32 bytes for float32 [8]; got 3",
        ),
        (
            {"edits": [{**ADD, "tensor": {"dtype": "float32", "shape": [8], "data": "é"}}]},
            "edits[0].tensor.data",
            "not base64",
        ),
        (
            {"edits": [{**ADD, "tensor": {"dtype": "float32", "shape": [0], "data": ""}}]},
            "edits[0].tensor.shape",
            "without elements",
        ),
        ({"save": [SAVE, {**SAVE, "site": "model.layers.9.output[0]"}]}, "save[1].name", "save[0]"),
        (
            {"save": [{**SAVE, "site": "model.layers.9.output[0]"}]},
            "save[0].site",
            "model.layers has no module '9' (nearest: model.layers.",
        ),
        ({"save": [{**SAVE, "site": "model.layers.1"}]}, "save[0].site", "nearest: model.layers.1."),
        ({"save": [{**SAVE, "site": "model.layers.output"}]}, "save[0].site", "can't be read or set"),
        ({"save": [{**SAVE, "site": "model.layers.1.mlp.output[0]"}]}, "save[0].site", "leave out the [0]"),
        ({"save": [{**SAVE, "site": "model.layers.1.input[0]"}]}, "save[0].site", "a site is"),
        ({"save": [{**SAVE, "site": "logit"}]}, "save[0].site", "nearest: logits"),
        ({"edits": [{"site": "samples", "op": "ablate"}]}, "edits[0].site", "samples are token ids"),
        ({"save": [{**SAVE, "positions": [4, 7]}]}, "save[0].positions", None),
        (
            {"save": [{**SAVE, "positions": [8]}]},
            "save[0].positions",
            "position 8 never comes: with this prompt and max_tokens the last is 6",
        ),
        ({"save": [{**SAVE, "positions": {"start": 7}}]}, "save[0].positions", "position 7 never comes"),
        (
            {"save": [{**SAVE, "site": "logits", "positions": [1]}]},
            "save[0].positions",
            "the first at position 2; got 1",
        ),
        (
            {"save": [{**SAVE, "site": "logits", "positions": {"stop": 2}}]},
            "save[0].positions",
            "the first at position 2",
        ),
        ({"graph": {"type": "graph"}}, "graph", "not an intervention graph"),
        ({"graph": {"a": 2**70}}, "graph", "not an intervention graph"),
        ({"graph": {"a": "\ud800"}}, "graph", "not an intervention graph"),
        ({"graph": EMPTY, "stream": ["h"]}, "stream[0]", "saves no 'h'"),
        (
            {"graph": EMPTY, "tensors": {digest(STORED["w"]): OTHERS}},
            f"tensors['{digest(STORED['w'])}']",
            "nothing in the intervention names it",
        ),
        ({"graph": EMPTY, "tensors": {"ab": OTHERS}}, "tensors['ab']", "the sha256 of its"),
        ({"graph": EMPTY, "tensors": {"ab": "!"}}, "tensors['ab']", "not base64"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(body: dict[str, Any], param: str, message: str | None) -> None:
    with pytest.raises(Refused) as error:
        lowered(FAKE, **body)
    assert error.value.param == f"intervention.{param}"
    assert (message or "position 7") in error.value.message
    assert "/" not in error.value.message and "in the request" not in error.value.message


def test_a_graph_of_a_stranger_is_checked_and_counted() -> None:
    graph = full()["graph"]
    with pytest.raises(Refused, match="no site") as error:
        lowered(TOY, graph=graph)
    assert error.value.param == "intervention.graph" and error.value.kind == "GraphError"
    with pytest.raises(Refused, match="the limit is 3"):
        lower(Intervention(graph=graph), FAKE, ROWS, STEPS, tensor_of, max_nodes=3)
    edits = [{**ADD, "tensor": "v8", "positions": [i, i + 4]} for i in range(3)] * 4
    with pytest.raises(Refused, match="the limit is 9"):
        lower(Intervention.model_validate({"edits": edits}), FAKE, ROWS, None, tensor_of, max_nodes=9)


def test_many_positions_of_many_edits_are_refused_soon() -> None:
    positions = [2 * i for i in range(1024)]
    body = {"edits": [{"site": "1.output", "op": "ablate", "positions": positions}] * 300}
    start = time.process_time()
    with pytest.raises(Refused, match="the limit is 5000") as error:
        lower(Intervention.model_validate(body), TOY, ROWS, None, tensor_of, max_nodes=5000)
    assert error.value.param == "intervention"
    assert time.process_time() - start < 2.0  # far less than to record them


def test_a_failure_leaves_nothing_open() -> None:
    with pytest.raises(Refused):
        lowered(FAKE, edits=[ADD])
    assert lowered(save=sent_save("all")).names
