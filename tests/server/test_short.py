"""The short form against plain torch, position by position, through the executor that the engine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from short_form import OPS, ROWS, STEPS, VECTOR, increments, lowered, run, sent_save
from torch import Tensor
from toy import HIDDEN, VOCAB

from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Iterations
from nnsight_vllm.server.full import SaveForm

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
