"""The language's tests once more, through `VLLM.connect` to a live server: each must do what it does with an engine here.

They are taken from their own files as they are. Left out are those that look inside of an engine in this process.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from live_server import KEYS, LiveServer

import nnsight_vllm as nv
from nnsight_vllm import VLLM
from nnsight_vllm.errors import AdmissionError, ConnectionFailed, InterventionError, UnauthorizedError

ENGINE_TESTS = Path(__file__).parent.parent / "engine"
KEY = KEYS["alice"]
PROMPT = [5, 17, 33, 90, 41, 7]
_INSIDE = (
    ".llm",
    "._engine",
    ".stats()",
    ".check_integrity()",
    "monkeypatch",
    "max_num_batched_tokens",
    "max_model_len",
)


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"borrowed_{name}", ENGINE_TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tests(name: str, fixture: str) -> dict[str, Callable[..., None]]:
    """The tests of a file whose engine is its fixture, and nothing else of it."""
    found = {}
    for key, test in vars(_module(name)).items():
        if not key.startswith("test_") or fixture not in inspect.signature(test).parameters:
            continue
        if not any(word in inspect.getsource(test) for word in _INSIDE):
            found[f"{key}_of_{name.removeprefix('test_')}"] = test
    return found


BORROWED = {**_tests("test_requests", "model"), **_tests("test_across", "model"), **_tests("test_documents", "vllm")}
globals().update(BORROWED)


@pytest.fixture(scope="module")
def connected(live: LiveServer) -> Iterator[VLLM]:
    with VLLM.connect(live.url, api_key=KEY) as model:
        yield model


@pytest.fixture
def model(connected: VLLM) -> VLLM:
    return connected


@pytest.fixture(scope="module")
def smollm2_server(smollm2: str) -> Iterator[LiveServer]:
    with LiveServer([smollm2, "--max-model-len", "1024", "--seed", "0"]) as server:
        yield server


@pytest.fixture
def vllm(smollm2_server: LiveServer) -> Iterator[VLLM]:
    with VLLM.connect(smollm2_server.url) as model:
        yield model


def test_the_borrowed_tests_are_most_of_their_files() -> None:
    names = list(BORROWED)
    assert sum(name.endswith("_of_documents") for name in names) == 13
    assert sum(name.endswith("_of_requests") for name in names) >= 18
    assert sum(name.endswith("_of_across") for name in names) >= 8


# -- beside an engine in this process ------------------------------------------------------------------------------------


@pytest.fixture
def local(engines: Callable[..., VLLM], tiny_checkpoint: Callable[[str], str]) -> VLLM:
    return engines(tiny_checkpoint("llama"), enforce_eager=True, max_model_len=256, max_num_seqs=32)


def _everything(model: VLLM) -> dict[str, Any]:
    with model.trace(PROMPT, temperature=0.0, max_tokens=3, logprobs=1, ignore_eos=True) as tracer:
        states = nv.list().save()
        with tracer.all():
            model.model.layers[0].output[0][:] *= 1.5
            states.append(model.model.layers[1].output[0])
        done = tracer.result.save()
    return {"states": list(states), "tokens": done.token_ids, "text": done.text, "logprobs": done.logprobs}


def test_values_and_results_are_those_of_an_engine_here(model: VLLM, local: VLLM) -> None:
    far, near = _everything(model), _everything(local)
    assert far["tokens"] == near["tokens"] and far["text"] == near["text"]
    assert len(far["states"]) == len(near["states"]) == 3
    for one, other in zip(far["states"], near["states"], strict=True):
        torch.testing.assert_close(one, other)
    for there, here in zip(far["logprobs"], near["logprobs"], strict=True):
        assert there.keys() == here.keys()
        assert all(there[id].decoded_token == here[id].decoded_token for id in here)
        assert all(abs(there[id].logprob - here[id].logprob) < 1e-4 for id in here)


def test_the_trees_and_the_tokenizers_agree(model: VLLM, local: VLLM) -> None:
    assert repr(model) == repr(local)
    assert model.tokenizer.encode("some text") == local.tokenizer.encode("some text")
    assert model.tokenizer.decode(PROMPT) == local.tokenizer.decode(PROMPT)


# -- the server's part ---------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused(live: LiveServer) -> None:
    with pytest.raises(UnauthorizedError):
        VLLM.connect(live.url, api_key="wrong")


def test_vllms_own_checks_of_sampling_come_back_with_the_line(model: VLLM) -> None:
    with pytest.raises(AdmissionError, match=r"temperature.*test_connect\.py:\d+"):
        model.trace(PROMPT, temperature=-1.0)
    with pytest.raises(AdmissionError, match="heat"):
        model.trace(PROMPT, heat=1.0)


def test_structured_outputs_pass(model: VLLM) -> None:
    with model.trace(
        "Yes or no?", temperature=0.0, max_tokens=8, structured_outputs={"choice": ["yes", "no"]}
    ) as tracer:
        done = tracer.result.save()
    assert done.text in {"yes", "no"}


def test_a_named_edit_is_a_model_that_plain_clients_name(model: VLLM, live: LiveServer) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    with model.edit("louder"):
        model.model.layers[1].output[0][:] *= -3.0
    with model.trace(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True, edits=["louder"]) as tracer:
        done = tracer.result.save()
    named, plain = live.post({**body, "model": "tiny:louder"}), live.post(body)
    assert named.json()["choices"][0]["text"] == done.text != plain.json()["choices"][0]["text"]
    del model.edits["louder"]
    names = [card["id"] for card in live.ask("GET", "models").json()["data"]]
    assert "tiny:louder" not in names


def test_large_tensors_pass(model: VLLM) -> None:
    matrix = torch.randn(128, 1024)  # more than travels with a trace
    with model.trace(PROMPT, max_tokens=1):
        product = (model.model.layers[0].output[0] @ matrix).save()
        h = model.model.layers[0].output[0].save()
    torch.testing.assert_close(product, h @ matrix, atol=1e-4, rtol=1e-4)


def test_a_client_that_stops_waiting_frees_what_it_held(live: LiveServer) -> None:
    with VLLM.connect(live.url, api_key=KEY) as patient:
        assert _one_token(patient) == 1  # the server has done each thing once, so it is quick
        with VLLM.connect(live.url, api_key=KEY, timeout=1.0) as impatient:
            with (
                pytest.raises(ConnectionFailed, match="in time"),
                impatient.trace(PROMPT, max_tokens=240, ignore_eos=True, n=64) as tracer,  # seconds of work
                tracer.all(),
            ):
                impatient.model.layers[0].output[0][:] *= 1.0
        assert _one_token(patient) == 1


def _one_token(model: VLLM) -> int:
    with model.trace(PROMPT, max_tokens=1) as tracer:
        done = tracer.result.save()
    return len(done.token_ids)


def test_a_failure_has_the_users_line(model: VLLM) -> None:
    with pytest.raises(InterventionError, match=r"IndexError.*test_connect\.py:\d+"):
        with model.trace(PROMPT, max_tokens=1):
            h = model.model.layers[0].output[0]
            h[h.argmax() + 10_000].save()
