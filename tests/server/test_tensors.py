"""Uploading tensors, and finding them again."""

from __future__ import annotations

import pytest
import torch
from prometheus_client import REGISTRY
from store_app import client_of, interventions, packed

from nnsight_vllm.graph.codec import digest
from nnsight_vllm.server.limits import ServerLimits

PATH = "/v1/interventions/tensors"
NAME, DATA = packed(torch.arange(4.0))


def test_a_tensor_is_found_by_digest_and_by_name() -> None:
    state = interventions()
    told = client_of(state).put(f"{PATH}/{NAME}", params={"name": "happy"}, content=DATA)
    assert told.json() == {"digest": NAME, "name": "happy", "bytes": len(DATA), "dtype": "F32", "shape": [4]}
    assert state.tensors.get("", NAME) == state.tensors.get("", "happy") == (NAME, DATA)


def test_a_list_tells_them_with_their_names() -> None:
    client = client_of(interventions())
    for name in ("b", "a"):
        client.put(f"{PATH}/{NAME}", params={"name": name}, content=DATA)
    (told,) = client.get(PATH).json()["data"]
    assert told == {"digest": NAME, "names": ["a", "b"], "bytes": len(DATA), "dtype": "F32", "shape": [4]}


def test_a_name_moves_to_its_new_tensor() -> None:
    state = interventions()
    other, data = packed(torch.zeros(2, dtype=torch.bfloat16))
    state.tensors.put("", NAME, DATA, "v")
    state.tensors.put("", other, data, "v")
    assert state.tensors.get("", "v") == (other, data)
    assert state.tensors.get("", NAME) == (NAME, DATA)


def test_a_deleted_tensor_takes_its_names_along() -> None:
    client = client_of(interventions())
    client.put(f"{PATH}/{NAME}", params={"name": "happy"}, content=DATA)
    assert client.delete(f"{PATH}/happy").status_code == 200
    assert client.delete(f"{PATH}/{NAME}").status_code == 404
    assert client.delete(f"{PATH}/happy").status_code == 404


def test_another_tenant_has_none_of_it() -> None:
    client = client_of(interventions())
    client.put(f"{PATH}/{NAME}", params={"name": "happy"}, content=DATA, headers={"who": "a"})
    assert client.get(PATH, headers={"who": "b"}).json() == {"data": []}
    refused = client.delete(f"{PATH}/happy", headers={"who": "b"})
    assert refused.status_code == 404 and "nearest" not in refused.text
    assert client.delete(f"{PATH}/{NAME}", headers={"who": "b"}).status_code == 404


def test_near_names_are_told() -> None:
    client = client_of(interventions())
    client.put(f"{PATH}/{NAME}", params={"name": "happy"}, content=DATA)
    assert client.delete(f"{PATH}/hapy").json()["error"]["message"] == "no tensor 'hapy' (nearest: happy)"


@pytest.mark.parametrize(
    ("sha256", "name", "data", "message"),
    [
        ("0" * 64, None, DATA, f"bytes is {NAME}"),
        (NAME[:-1], None, DATA, "64 hexadecimal digits"),
        (NAME.upper(), None, DATA, "64 hexadecimal digits"),
        (NAME, "a b", DATA, "a name has 1 to 64"),
        (NAME, NAME, DATA, "is no sha256"),
        (digest(b"nonsense"), None, b"nonsense", "not safetensors bytes"),
        (digest(b""), None, b"", "not safetensors bytes"),
        (*packed(torch.ones(1), "other")[:1], None, packed(torch.ones(1), "other")[1], "one tensor named 'tensor'"),
        (
            *packed(torch.ones(1, dtype=torch.complex64))[:1],
            None,
            packed(torch.ones(1, dtype=torch.complex64))[1],
            "C64",
        ),
    ],
)
def test_what_is_not_such_a_tensor_is_refused(sha256: str, name: str | None, data: bytes, message: str) -> None:
    state = interventions()
    answer = client_of(state).put(f"{PATH}/{sha256}", params={"name": name} if name else {}, content=data)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert state.tensors.list("") == []


@pytest.mark.parametrize("is_told", [True, False])
def test_a_long_body_is_given_up(is_told: bool) -> None:
    parts = [DATA[:50], DATA[50:]]
    content = DATA if is_told else iter(parts)
    answer = client_of(interventions(ServerLimits(constant_bytes=60))).put(f"{PATH}/{NAME}", content=content)
    assert answer.status_code == 413
    assert "the limit is 60" in answer.json()["error"]["message"]


def test_a_full_store_tells_its_numbers() -> None:
    client = client_of(interventions(ServerLimits(stored_bytes=len(DATA) + 10)))
    assert client.put(f"{PATH}/{NAME}", content=DATA).status_code == 200
    assert client.put(f"{PATH}/{NAME}", content=DATA).status_code == 200  # it's there
    other, data = packed(torch.ones(2))
    answer = client.put(f"{PATH}/{other}", content=data)
    assert answer.status_code == 413
    assert f"{len(DATA)} bytes of tensors are stored, {len(data)} more don't fit" in answer.json()["error"]["message"]
    assert client.put(f"{PATH}/{NAME}", params={"name": "n" * 11}, content=DATA).status_code == 413
    assert client.put(f"{PATH}/{other}", content=data, headers={"who": "b"}).status_code == 200
    client.delete(f"{PATH}/{NAME}")
    assert client.put(f"{PATH}/{other}", content=data).status_code == 200


def test_what_is_refused_is_counted() -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("nnsight_rejected_total", {"reason": "NotFoundError"}) or 0

    before = count()
    client_of(interventions()).delete(f"{PATH}/none")
    assert count() == before + 1
