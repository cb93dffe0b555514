"""Edited models: made, found again after a restart, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import HIDDEN
from store_app import client_of, interventions, packed

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.server.edited import EditedModels
from nnsight_vllm.server.limits import ServerLimits

PATH = "/v1/interventions/edits"
SITE = "model.layers.1.output[0]"
SCALED = {"edits": [{"site": SITE, "op": "scale", "scale": 2.0}]}
PUSHED = {"edits": [{"site": SITE, "op": "add", "tensor": "happy"}]}
NAME, DATA = packed(torch.ones(HIDDEN))


def body(intervention: Any, name: str = "calm") -> dict[str, Any]:
    return {"name": name, "intervention": intervention}


def test_a_model_is_told_with_what_clients_call_it() -> None:
    client = client_of(interventions())
    told = {"name": "calm", "model": "toy:calm", "tensors": []}
    assert client.post(PATH, json=body(SCALED)).json() == told
    assert client.get(PATH).json() == {"data": [told]}
    assert client.get(f"{PATH}/calm").json() == {**told, "intervention": SCALED}
    assert client.delete(f"{PATH}/calm").status_code == 200
    assert client.get(f"{PATH}/calm").status_code == 404


def test_its_tensors_are_those_of_when_it_was_made() -> None:
    state = interventions()
    state.tensors.put("", NAME, DATA, "happy")
    assert client_of(state).post(PATH, json=body(PUSHED)).json()["tensors"] == [NAME]
    state.tensors.delete("", NAME)
    model = state.edited.known("", "calm")
    assert model.tensor_of("happy", "p") == model.tensor_of(NAME, "p") == (NAME, DATA)


def test_a_restart_keeps_it(tmp_path: Path) -> None:
    state = interventions(directory=tmp_path / "edits")
    state.tensors.put("a", NAME, DATA, "happy")
    client = client_of(state)
    for name in ("calm", "gone"):
        assert client.post(PATH, json=body(PUSHED, name), headers={"who": "a"}).status_code == 200
    client.delete(f"{PATH}/gone", headers={"who": "a"})
    again = EditedModels(tmp_path / "edits")
    assert again.list("a") == state.edited.list("a") != []
    assert again.list("") == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed"])
def test_a_damaged_file_stops_the_start(tmp_path: Path, damage: str) -> None:
    state = interventions(directory=tmp_path)
    state.tensors.put("", NAME, DATA, "happy")
    client_of(state).post(PATH, json=body(PUSHED))
    (file,) = tmp_path.glob("*.msgpack")
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flipped":
        file.write_bytes(data.replace(DATA[-8:], b"\0" * 8))
    else:
        file = file.rename(file.with_name("other.msgpack"))
    with pytest.raises(EngineSettingError, match=file.name):
        EditedModels(tmp_path)


def test_a_write_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = interventions(directory=tmp_path)
    client = client_of(state)
    client.post(PATH, json=body(SCALED))
    model = state.edited.known("", "calm")

    def fail(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no room"):
            state.edited.put("", model)
    assert len(list(tmp_path.iterdir())) == 1
    assert EditedModels(tmp_path).list("") == [model]


def test_another_tenant_has_none_of_it() -> None:
    client = client_of(interventions())
    client.post(PATH, json=body(SCALED), headers={"who": "a"})
    for answer in (
        client.get(f"{PATH}/calm", headers={"who": "b"}),
        client.delete(f"{PATH}/calm", headers={"who": "b"}),
    ):
        assert answer.status_code == 404 and "nearest" not in answer.text
    assert client.get(PATH, headers={"who": "b"}).json() == {"data": []}
    near = client.get(f"{PATH}/calmer", headers={"who": "a"}).json()["error"]
    assert (near["message"], near["type"]) == ("no edited model 'calmer' (nearest: calm)", "UnknownEditError")


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        (body(SCALED, "a b"), "name", "a name has 1 to 64"),
        (body(SCALED, "a\n"), "name", "a name has 1 to 64"),
        (body({"save": [{"name": "h", "site": SITE}]}), "intervention.save", "saves nothing"),
        (body({"edits": [{"site": SITE, "op": "scale"}]}), "intervention.edits[0].scale", "missing"),
        (body(PUSHED), "intervention.edits[0].tensor", "no tensor 'happy'"),
        (body({"edits": [{"site": "no.output", "op": "ablate"}]}), "intervention.edits[0].site", "no"),
        ({"name": "calm"}, "intervention", "missing"),
        ({**body(SCALED), "more": 1}, "more", "no such field"),
    ],
)
def test_what_can_not_be_a_model_is_refused(sent: Any, param: str, message: str) -> None:
    state = interventions()
    answer = client_of(state).post(PATH, json=sent)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
    assert state.edited.list("") == []


def test_what_is_no_json_is_refused() -> None:
    assert client_of(interventions()).post(PATH, content=b"{").status_code == 400


def test_there_are_at_most_so_many() -> None:
    client = client_of(interventions(ServerLimits(edited_models=1)))
    assert client.post(PATH, json=body(SCALED)).status_code == 200
    assert client.post(PATH, json=body(SCALED)).status_code == 200  # in its own place
    refused = client.post(PATH, json=body(SCALED, "more"))
    assert refused.status_code == 400 and "the limit is 1" in refused.text
    assert client.post(PATH, json=body(SCALED, "more"), headers={"who": "b"}).status_code == 200


def test_cards_are_like_the_bases() -> None:
    state = interventions()
    client_of(state).post(PATH, json=body(SCALED))
    base = {"id": "toy", "object": "model", "max_model_len": 8, "parent": None}
    assert state.edited.cards("", ["toy"], [base]) == [base, {**base, "id": "toy:calm", "parent": "toy"}]
    assert state.edited.cards("b", ["toy"], [base]) == [base]
