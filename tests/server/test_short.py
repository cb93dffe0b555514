"""The short form against plain torch, position by position, through the executor that the engine has."""

from __future__ import annotations

import base64
import time
from typing import Any

import fake_model
import msgspec
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import HIDDEN, VOCAB, Toy, toy_catalogue

from nnsight_vllm.graph.codec import digest, encode, to_json
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
from nnsight_vllm.trace.tree import Tree

ROWS, STEPS = 3, 5
VECTOR, OTHER = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, -1.0, 2.0])
DOWN, UP = torch.stack([VECTOR, OTHER]), torch.stack([OTHER, VECTOR], 1)
TENSORS = {"v": VECTOR, "w": OTHER, "down": DOWN, "up": UP, "long": torch.ones(7), "whole": torch.ones(4).long()}
STORED = {name: safetensors.torch.save({"tensor": tensor}) for name, tensor in TENSORS.items()}
TOY, FAKE = Tree(toy_catalogue()), Tree(fake_model.catalogue())


def tensor_of(reference: str, param: str) -> tuple[str, bytes]:
    if reference not in STORED:
        raise Refused(f"no tensor {reference!r}", param)
    return digest(STORED[reference]), STORED[reference]


def lowered(tree: Tree = TOY, rows: int = ROWS, max_tokens: int | None = STEPS, **body: Any) -> Lowered:
    return lower(Intervention(**body), tree, rows, max_tokens, tensor_of)


class Rows(Toy):
    """The toy, with rows that differ."""

    def _increments(self, rows: int) -> Tensor:
        return increments(rows)


def increments(rows: int) -> Tensor:
    return torch.arange(1.0, rows * HIDDEN + 1).reshape(rows, HIDDEN) / 4


def run(sent: Lowered, rows: int = ROWS, steps: int = STEPS) -> dict[str, Any]:
    toy = Rows()
    toy.store.put(sent.tensors.values())
    saved = toy.run(encode(sent.graph), steps, rows)
    assert not [delta.failure for delta in toy.received.get("r", ()) if delta.failure]
    return saved


def unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


OPS: list[tuple[dict[str, Any], Any]] = [
    ({"op": "add", "tensor": "v", "scale": 4.0}, lambda h: h + 4 * VECTOR),
    ({"op": "add", "tensor": "v"}, lambda h: h + VECTOR),
    ({"op": "scale", "scale": -2}, lambda h: h * -2),
    ({"op": "set", "tensor": "v"}, lambda h: VECTOR.clone()),
    ({"op": "ablate"}, lambda h: h * 0),
    (
        {"op": "project_out", "tensor": "v", "scale": 0.5},
        lambda h: h - 0.5 * (h @ VECTOR) / (VECTOR @ VECTOR) * VECTOR,
    ),
    (
        {"op": "clamp", "tensor": "v", "low": 3.0, "high": 4.0},
        lambda h: h + ((h @ unit(VECTOR)).clamp(3.0, 4.0) - h @ unit(VECTOR)) * unit(VECTOR),
    ),
    (
        {"op": "clamp", "tensor": "v", "high": 1.0},
        lambda h: h + ((h @ unit(VECTOR)).clamp(max=1.0) - h @ unit(VECTOR)) * unit(VECTOR),
    ),
    ({"op": "norm_add", "tensor": "v", "scale": 2.0}, lambda h: unit(h + 2 * VECTOR) * h.norm()),
    ({"op": "low_rank", "down": "down", "up": "up", "scale": 0.5}, lambda h: h + 0.5 * UP @ (DOWN @ h)),
    (
        {"op": "sae_clamp", "encoder": "v", "decoder": "w", "bias": 0.25, "value": 2.0},
        lambda h: h + (2.0 - (VECTOR @ h + 0.25).relu()) * OTHER,
    ),
]
END = ROWS + STEPS - 1
POSITIONS: list[tuple[Any, set[int]]] = [
    ("all", set(range(END))),
    ("prompt", {0, 1, 2}),
    ("generated", set(range(ROWS, END))),
    ("last", set(range(ROWS - 1, END))),
    ([1], {1}),
    ([2, 0], {0, 2}),
    ([0, 1, 3, 4, 6], {0, 1, 3, 4, 6}),
    ([5], {5}),
    ({"start": 1}, set(range(1, END))),
    ({"step": 2}, set(range(0, END, 2))),
    ({"start": 4, "step": 2}, {4, 6}),
    ({"start": 1, "stop": 5}, {1, 2, 3, 4}),
    ({"start": 0, "stop": 3, "step": 2}, {0, 2}),
]


def chunks(steps: int = STEPS) -> list[list[int]]:
    """Positions by iteration."""
    return [list(range(ROWS)), *([ROWS + i] for i in range(steps - 1))]


def expected(edit: Any, chosen: set[int]) -> list[Tensor]:
    """`2.output` at each iteration, where `1.output` was edited."""
    found = []
    for positions in chunks():
        rows = 2 * increments(len(positions))
        edited = [edit(row) if p in chosen else row for p, row in zip(positions, rows, strict=True)]
        found.append(torch.stack(edited) + increments(len(positions)))
    return found


@pytest.mark.parametrize(("positions", "chosen"), POSITIONS)
@pytest.mark.parametrize(("edit", "formula"), OPS, ids=[str(edit["op"]) for edit, _ in OPS])
def test_an_edit_changes_its_positions_only(edit: Any, formula: Any, positions: Any, chosen: set[int]) -> None:
    save = {"name": "x", "site": "2.output"}
    sent = lowered(edits=[{"site": "1.output", "positions": positions, **edit}], save=[save])
    assert sent.names == {"x": SaveForm(over_iterations=True, stream=False)}
    for got, wanted in zip(run(sent)["x"], expected(formula, chosen), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted)


@pytest.mark.parametrize(("positions", "chosen"), POSITIONS)
def test_a_save_holds_its_positions_only(positions: Any, chosen: set[int]) -> None:
    sent = lowered(save=[{"name": "x", "site": "2.output", "positions": positions, "stream": True}])
    saved, over_iterations = run(sent)["x"], max(chosen) >= ROWS
    assert sent.names == {"x": SaveForm(over_iterations, stream=True)}
    wanted = [
        torch.stack([row for p, row in zip(ps, 3 * increments(len(ps)), strict=True) if p in chosen])
        for ps in chunks()
        if chosen & set(ps)
    ]
    is_single = positions == "last" or min(chosen) >= ROWS
    if not over_iterations:
        assert torch.equal(torch.tensor(saved), wanted[0])
    else:
        got = [torch.tensor(item) for item in saved]
        assert [item.shape for item in got] == [item.shape[1:] if is_single else item.shape for item in wanted]
        assert all(torch.equal(a, b.squeeze(0) if is_single else b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("positions", "iterations"),
    [
        ("all", range(5)),
        ("last", range(5)),
        ("generated", range(1, 5)),
        ([2, 4], [0, 2]),
        ({"step": 2}, [0, 2, 4]),
        ({"start": 1, "stop": 4}, [0, 1]),
    ],
)
def test_logits_have_one_row_an_iteration(positions: Any, iterations: Any) -> None:
    """A row of logits is that of the iteration's last position."""
    edit = {"site": "logits", "op": "scale", "scale": 3.0, "positions": positions}
    sent = lowered(edits=[edit], save=[{"name": "x", "site": "logits"}, {"name": "t", "site": "samples"}])
    saved = run(sent)
    plain = [(3 * increments(len(ps)))[-1].repeat(VOCAB // HIDDEN) for ps in chunks()]
    wanted = [row * 3 if i in iterations else row for i, row in enumerate(plain)]
    assert [list(row) for row in saved["x"]] == [row.tolist() for row in wanted]
    assert saved["t"] == [int(row.argmax()) for row in wanted]


def test_the_logits_of_the_prompt_are_one_row_and_no_list() -> None:
    sent = lowered(save=[{"name": "x", "site": "logits", "positions": "prompt"}])
    assert not sent.names["x"].over_iterations
    assert torch.tensor(run(sent)["x"]).shape == (1, VOCAB)


def test_edits_apply_in_their_order_and_saves_see_the_site_after_all() -> None:
    body: dict[str, Any] = {
        "save": [{"name": "x", "site": "1.output", "positions": [0]}],
        "edits": [
            {"site": "1.output", "op": "scale", "scale": 0.0},
            {"site": "0.output", "op": "ablate"},
            {"site": "1.output", "op": "add", "tensor": "v"},
        ],
    }
    assert run(lowered(**body))["x"] == [VECTOR.tolist()]
    body["edits"].reverse()
    assert run(lowered(**body))["x"] == [[0.0] * HIDDEN]


def test_positions_of_every_kind_go_together() -> None:
    chosen = [(positions, where) for positions, where in POSITIONS]
    edits = [{"site": "1.output", "op": "add", "tensor": "v", "positions": positions} for positions, _ in chosen]
    sent = lowered(edits=edits, save=[{"name": "x", "site": "1.output"}])
    for ps, got in zip(chunks(), run(sent)["x"], strict=True):
        times = torch.tensor([[float(sum(p in where for _, where in chosen))] for p in ps])
        torch.testing.assert_close(torch.tensor(got), 2 * increments(len(ps)) + times * VECTOR)


@st.composite
def asked(draw: st.DrawFn, last: int) -> tuple[Any, set[int]]:
    """Positions, and which they are of those up to `last`."""
    if draw(st.booleans()):
        some = draw(st.lists(st.integers(0, last), min_size=1, max_size=5))
        return some, set(some)
    start, step = draw(st.integers(0, last)), draw(st.integers(1, 4))
    stop = draw(st.none() | st.integers(start + 1, last + 9))
    return {"start": start, "step": step, "stop": stop}, set(
        range(start, min(last + 1, last + 1 if stop is None else stop), step)
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_any_positions_mean_what_they_say(data: st.DataObject, rows: int, steps: int) -> None:
    last = rows + steps - 2
    wanted = [data.draw(asked(last)) for _ in range(data.draw(st.integers(0, 4)))]
    saves = [data.draw(asked(last)) for _ in range(2)]
    sent = lowered(
        rows=rows,
        max_tokens=steps,
        edits=[{"site": "1.output", "op": "add", "tensor": "v", "positions": one} for one, _ in wanted],
        save=[{"name": str(i), "site": "1.output", "positions": one} for i, (one, _) in enumerate(saves)],
    )
    saved = run(sent, rows, steps)
    for i, (_, where) in enumerate(saves):
        value = saved[str(i)] if sent.names[str(i)].over_iterations else [saved[str(i)]]
        got = [row for item in value for row in torch.tensor(item).reshape(-1, HIDDEN)]
        plain = {p: row for p, row in enumerate(2 * increments(rows))}
        plain.update({p: 2 * increments(1)[0] for p in range(rows, last + 1)})
        due = [plain[p] + sum(p in edited for _, edited in wanted) * VECTOR for p in sorted(where)]
        torch.testing.assert_close(got, due)


def test_what_begins_after_the_last_token_is_left_out() -> None:
    edits = [{"site": "1.output", "op": "ablate", "positions": "generated"}]
    sent = lowered(
        max_tokens=1,
        edits=edits,
        save=[{"name": "x", "site": "1.output"}, {"name": "p", "site": "0.output", "positions": "prompt"}],
    )
    assert not [node for node in sent.graph.body.nodes if isinstance(node, Iterations)]
    assert len(run(sent, steps=1)["x"]) == 1


@pytest.mark.parametrize("late", [[1, 4, 6, 7, 100], {"start": 1, "step": 3, "stop": 90}])
def test_edits_that_come_too_late_do_not_happen(late: Any) -> None:
    edit = {"site": "1.output", "op": "add", "tensor": "v"}
    chosen = {1, 4, 6} if isinstance(late, list) else {1, 4}
    sent = lowered(edits=[{**edit, "positions": late}], save=[{"name": "x", "site": "2.output"}])
    for got, wanted in zip(run(sent)["x"], expected(lambda h: h + VECTOR, chosen), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted)


@pytest.mark.parametrize("late", [[7], [100, 7], {"start": 7}])
def test_where_no_edit_happens_there_is_no_graph_and_no_tensor(late: Any) -> None:
    sent = lowered(edits=[{"site": "1.output", "op": "add", "tensor": "v", "positions": late}])
    assert not sent.graph.body.nodes and not sent.tensors
    assert lowered(max_tokens=6, edits=[{"site": "1.output", "op": "ablate", "positions": [7]}]).graph.body.nodes


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", [0, 1], {"start": 1, "stop": 2}])
def test_prompts_of_any_length_have_one_graph_where_it_does_not_depend_on_it(positions: Any) -> None:
    edits = [{"site": "1.output", "op": "add", "tensor": "v", "positions": positions}]
    graphs = {encode(lowered(rows=r, max_tokens=m, edits=edits, save=sent_save("last")).graph) for r, m in ANY}
    assert len(graphs) == 1


ANY = [(3, 5), (40, 5), (7, 100), (7, None)]


def test_a_run_of_unknown_length_is_fine() -> None:
    sent = lowered(max_tokens=None, save=[{"name": "x", "site": "1.output", "positions": [100]}])
    assert [node.start for node in sent.graph.body.nodes if isinstance(node, Iterations)] == [98]


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


def sent_save(positions: Any) -> list[dict[str, Any]]:
    return [{"name": "h", "site": "2.output", "positions": positions}]


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
