"""What a group, or a request by itself, does at a fused site is what its operations do, one by one; on a toy model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save
from toy import HIDDEN, LAYERS, Toy, graph

from nnsight_vllm.graph.codec import digest
from nnsight_vllm.graph.nodes import Arg, Block, Const, Iterations, Node, Op, Read, Ref, Save, Slice
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.executor import Executor

STEPS = 3
PROMPTS = {"a": 3, "b": 2, "c": 4}
Done = list[str]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """The sites that were done with in one go."""
    found: Done = []
    leave = Executor._leave_site

    def noted(self: Executor, unit: Any, error: Any) -> None:
        found.append(unit.program.fused[unit.pc].site)
        leave(self, unit, error)

    monkeypatch.setattr(Executor, "_leave_site", noted)
    return found


def everywhere(*lists: Node, body: list[Node]) -> bytes:
    return graph(*lists, Iterations(900, 0, None, 1, 901, Block(body)))


def collecting(*keys: Arg, site: str = "1.out") -> bytes:
    """Appends `site[key]` to a list of its own for each key, in every iteration; the whole site for a full slice."""
    lists: list[Node] = []
    body: list[Node] = [Read(500, site, None)]
    for i, key in enumerate(keys):
        lists += [Op(10 * i, "py.list"), Save(10 * i + 1, f"s{i}", Ref(10 * i))]
        body += [Op(600 + i, "py.getitem", [Ref(500), key]), Op(700 + i, "py.append", [Ref(10 * i), Ref(600 + i)])]
    return everywhere(*lists, body=body)


def run(graphs: dict[str, bytes], batching: bool, tensors: list[bytes] = []) -> dict[str, Any]:  # noqa: B006 (only read)
    """What requests save, and the streams of the last step."""
    toy = Toy(batching=batching)
    toy.store.put(tensors)
    for name, data in graphs.items():
        toy.add(name, data, PROMPTS[name])
    streams: dict[str, Any] = {}
    for step in range(STEPS):
        rows = {name: (n, 0) if step == 0 else (1, n + step - 1) for name, n in PROMPTS.items() if name in graphs}
        streams = {name: stream.tolist() for name, stream in toy.step(**rows).items()}
    assert not toy.executor.leftovers(list(graphs))
    return {
        "saved": toy.saved,
        "streams": streams,
        "failures": {n: [d.failure for d in r] for n, r in toy.received.items()},
    }


@pytest.mark.parametrize(
    ("keys", "sites"),
    [
        ([-1], STEPS),
        ([0, -1], STEPS),
        ([-2], 1),  # later steps have one row each: every request fails by itself
        ([Slice()], STEPS - 1),  # prompts of different lengths can't be stacked
        ([-1, Slice()], STEPS - 1),
    ],
)
def test_collected_rows_are_those_of_each_request_by_itself(done: Done, keys: list[Arg], sites: int) -> None:
    graphs = dict.fromkeys(PROMPTS, collecting(*keys))
    found = run(graphs, True)
    assert done == ["1.out"] * sites
    assert found == run(graphs, False)


@pytest.mark.parametrize(("keys", "sites"), [([-1], STEPS), ([0, -1], STEPS), ([-2], 1), ([Slice(), -1], STEPS)])
def test_a_request_by_itself_collects_its_rows(done: Done, keys: list[Arg], sites: int) -> None:
    graphs = {"a": collecting(*keys)}
    found = run(graphs, True)
    assert done == ["1.out"] * sites
    assert found == run(graphs, False)


def test_one_that_collects_too_much_fails_at_the_operation_that_did() -> None:
    failures = []
    for batching in (True, False):
        toy = Toy(batching=batching, limits=Limits(saved_per_step=40))
        toy.run(collecting(-1, -1, -1))
        failures.append(toy.received["r"][-1].failure)
    assert failures[0] is not None and failures[0].node == 702
    assert failures[0] == failures[1]


def test_a_group_with_other_rows_in_between_collects_its_own(done: Done) -> None:
    graphs = {"a": collecting(-1), "b": collecting(-1, site="0.out"), "c": collecting(-1)}
    found = run(graphs, True)
    assert done.count("1.out") == STEPS
    assert found == run(graphs, False)


def test_each_request_gets_its_own_vector_at_every_site(done: Done) -> None:
    files = [save({"tensor": torch.arange(HIDDEN, dtype=torch.float32) + number}) for number in range(len(PROMPTS))]
    graphs = {}
    for name, data in zip(PROMPTS, files, strict=True):
        body: list[Node] = [Const(1, digest(data))]
        for layer in range(LAYERS):
            read, whole, site = 10 * layer + 2, 10 * layer + 3, f"{layer}.out"
            body += [Read(read, site, None), Op(whole, "py.getitem", [Ref(read), Slice()])]
            name_of_add = "py.isub" if layer == 1 else "py.iadd"
            body.append(Op(10 * layer + 4, name_of_add, [Ref(whole), Ref(1)], {}, site))
        graphs[name] = everywhere(body=body)
    found = run(graphs, True, files)
    assert done == [f"{layer}.out" for layer in range(LAYERS)] * STEPS
    assert found == run(graphs, False, files)
    assert found["streams"]["a"] != found["streams"]["b"]


def test_reading_more_of_a_site_than_collecting_runs_the_operations(done: Done) -> None:
    body: list[Node] = [
        Read(2, "1.out", None),
        Op(3, "py.getitem", [Ref(2), -1]),
        Op(4, "py.mul", [Ref(3), 2.0]),
        Op(5, "py.append", [Ref(0), Ref(4)]),
    ]
    graphs = dict.fromkeys(PROMPTS, everywhere(Op(0, "py.list"), Save(1, "s", Ref(0)), body=body))
    found = run(graphs, True)
    assert not done
    assert found == run(graphs, False)
