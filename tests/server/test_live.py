"""A live server over plain HTTP: a request with an intervention, in one piece and streamed, and what is refused."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from live_server import BODY, LAST, SCALED, LiveServer, tensor_of, wait_until
from safetensors.torch import load, save

from nnsight_vllm.graph.codec import to_json
from nnsight_vllm.graph.nodes import Block, Graph, Op, Read, Ref, Save

NUM_ROWS = BODY["max_tokens"]  # an iteration each: the prompt's, and one for each token but the last


def test_an_edit_changes_what_is_generated_and_nobody_elses_tokens(live: LiveServer) -> None:
    plain = live.post(BODY).json()["choices"][0]
    edited = live.post({**BODY, "intervention": {"edits": [SCALED]}}).json()["choices"][0]
    again = live.post(BODY).json()["choices"][0]
    assert plain == again
    assert edited["text"] != plain["text"]
    assert "intervention" not in plain
    assert edited["intervention"] == {"saved": {}, "logs": [], "stopped": False}


def test_what_is_saved_is_the_same_in_one_piece_and_streamed(live: LiveServer) -> None:
    whole = live.post({**BODY, "intervention": {"save": [LAST]}}).json()["choices"][0]["intervention"]["saved"]["h"]
    pieces = []
    with live.stream({**BODY, "intervention": {"save": [{**LAST, "stream": True}]}}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                pieces.append(tensor_of(choice["intervention"]["saved"]["h"]))
    assert tensor_of(whole).shape[0] == NUM_ROWS
    torch.testing.assert_close(torch.cat(pieces), tensor_of(whole), rtol=2e-5, atol=2e-5)


def test_every_sample_has_its_own_values(live: LiveServer) -> None:
    asked = {**BODY, "n": 2, "temperature": 1.0, "seed": 3, "intervention": {"save": [LAST]}}
    choices = live.post(asked).json()["choices"]
    first, second = (tensor_of(choice["intervention"]["saved"]["h"]) for choice in choices)
    torch.testing.assert_close(first[0], second[0], rtol=2e-5, atol=2e-5)
    assert not torch.equal(first, second)


def test_a_wrong_site_is_a_400_that_says_where(live: LiveServer) -> None:
    edit = {"site": "model.layer.0", "op": "scale", "scale": 2.0}
    refused = live.post({**BODY, "intervention": {"edits": [edit]}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "intervention.edits[0].site"


@pytest.mark.parametrize(
    ("intervention", "param"),
    [
        ({"edits": [{"site": "model.layers.0.output[0]", "op": "explode"}]}, "intervention.edits[0].op"),
        ({"sav": []}, "intervention.sav"),
        ({"save": [{**LAST, "positions": [-1]}]}, "intervention.save[0].positions[0]"),
    ],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses", "interventions/edits"])
def test_a_field_of_another_shape_is_a_400_that_says_where(
    live: LiveServer, route: str, intervention: dict[str, Any], param: str
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]},
        "responses": {"model": "tiny", "input": "hello"},
        "interventions/edits": {"name": "calm"},
    }
    refused = live.post({**bodies.get(route, BODY), "intervention": intervention}, route)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param
    assert refused.json()["error"]["code"] == 400


@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_what_only_the_prompt_decides_is_a_400_in_a_stream_too(live: LiveServer, route: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "completions": BODY,
        "chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
        "responses": {"model": "tiny", "input": "hello", "max_output_tokens": 4},
    }
    late = {"save": [{**LAST, "positions": [5000]}]}
    refused = live.post({**bodies[route], "stream": True, "intervention": late}, route)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"].startswith("intervention.save[0]")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_one_refused_prompt_of_several_ends_the_others(live: LiveServer, is_streamed: bool) -> None:
    prompts = [[5, 17, 33, 90, 41], [7], [5, 17, 33, 90, 8]]
    save = {"save": [{"name": "h", "site": "model.layers.1.output[0]", "positions": [3]}]}
    body = {**BODY, "prompt": prompts, "max_tokens": 2, "stream": is_streamed, "intervention": save}
    refused = live.post({**body, "ignore_eos": True})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"].startswith("intervention.save[0]")
    assert live.post({**body, "prompt": [prompts[0], prompts[2]], "stream": False}).status_code == 200
    wait_until(lambda: not live.leftovers())
    assert live.leftovers() == []


def test_a_large_graph_keeps_nobody_from_being_answered(live: LiveServer) -> None:
    nodes: list[Any] = [Read(1, "model.layers.0.output")]
    nodes += [Op(i, "torch.mul", [Ref(i - 1), 1.0]) for i in range(2, 30_000)]
    graph = Graph(Block([*nodes, Save(30_000, "h", Ref(29_999))]))
    waits = []
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(live.post, {**BODY, "intervention": {"graph": json.loads(to_json(graph))}})
        while not large.done():
            began = time.monotonic()
            assert live.ask("GET", "interventions/limits").status_code == 200
            waits.append(time.monotonic() - began)
    assert large.result().status_code == 200
    assert max(waits) < (time.monotonic() - start) / 4  # its analysis alone takes longer


def test_another_field_of_another_shape_is_told_as_vllm_does(live: LiveServer) -> None:
    refused = live.post({**BODY, "temperature": "warm"})
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]["param"]


def test_a_tensor_is_its_tenants_own(live: LiveServer) -> None:
    steer = {"site": "model.layers.0.output[0]", "op": "add", "tensor": "nobodys"}
    refused = live.post({**BODY, "intervention": {"edits": [steer]}})
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == "intervention.edits[0].tensor"


def test_the_engines_own_fields_are_refused(live: LiveServer) -> None:
    refused = live.post({**BODY, "vllm_xargs": {"nnsight_vllm": "x"}})
    assert refused.status_code == 400


def test_without_a_key_nothing_is_served(live: LiveServer) -> None:
    assert httpx.post(f"{live.url}/v1/completions", json=BODY, timeout=60).status_code == 401


def test_a_response_has_its_values_too(live: LiveServer) -> None:
    body = {"model": "tiny", "input": "hello", "max_output_tokens": 4, "temperature": 0.0}
    answered = live.post({**body, "intervention": {"save": [LAST]}}, "responses")
    assert answered.status_code == 200, answered.text
    assert tensor_of(answered.json()["intervention"]["saved"]["h"]).shape[0] == NUM_ROWS


@pytest.mark.parametrize("route", ["messages", "chat/completions/batch", "completions/render"])
def test_routes_that_would_pass_over_an_intervention_refuse_it(live: LiveServer, route: str) -> None:
    refused = live.post({**BODY, "messages": [], "intervention": {"save": [LAST]}}, route)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "intervention"


def test_requests_at_once_get_their_own_edits(live: LiveServer) -> None:
    def one(scale: float) -> str:
        edits = [{**SCALED, "scale": scale}]
        return str(live.post({**BODY, "intervention": {"edits": edits}}).json()["choices"][0]["text"])

    scales = [-3.0, 1.0, 5.0, -3.0]
    alone = [one(scale) for scale in scales]
    with ThreadPoolExecutor(len(scales)) as pool:
        assert list(pool.map(one, scales)) == alone


def test_a_client_that_goes_away_in_mid_stream_leaves_the_server_as_it_was(live: LiveServer) -> None:
    for _ in range(3):
        with live.stream({**BODY, "max_tokens": 200, "ignore_eos": True, "intervention": {"save": [LAST]}}) as response:
            next(response.iter_lines())
    assert live.post({**BODY, "intervention": {"save": [LAST]}}).status_code == 200
    running = ("vllm:num_requests_running", "nnsight_running")  # by vLLM and by us
    wait_until(lambda: not any(map(live.metric, running)))
    assert [live.metric(name) for name in running] == [0, 0]


def test_another_tenants_cached_rows_are_not_used(live: LiveServer) -> None:
    prompt = [5 + i % 90 for i in range(180)]
    edits = [{**SCALED, "scale": 1.75}]
    body = {**BODY, "prompt": prompt, "intervention": {"edits": edits, "save": [LAST]}}

    def cached(tenant: str, body: dict[str, Any]) -> int:
        answer = live.post(body, tenant=tenant)
        assert answer.status_code == 200, answer.text
        details = answer.json()["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"] or 0) if details else 0

    assert cached("alice", body) == 0
    assert cached("alice", body) > 0  # her own are
    assert cached("bob", body) == 0
    assert cached("bob", body) > 0
    assert cached("alice", {**BODY, "prompt": prompt}) == 0  # nor are edited rows a plain request's


def test_a_large_result_is_fetched_once_by_its_tenant(live: LiveServer) -> None:
    whole = {"name": "all", "site": "model.layers.1.output[0]", "positions": "prompt"}
    body = {**BODY, "prompt": [5 + i % 90 for i in range(200)], "intervention": {"save": [whole]}}
    told = live.post(body).json()["choices"][0]["intervention"]["saved"]["all"]
    assert told["shape"] == [200, 128] and "data" not in told
    route = told["href"].removeprefix("/v1/")
    assert live.ask("GET", route, "bob").status_code == 404
    fetched = live.ask("GET", route)
    assert fetched.status_code == 200
    assert load(fetched.content)["tensor"].shape == (200, 128)
    assert live.ask("GET", route).status_code == 404


def test_tensors_and_edited_models_are_a_tenants_own(live: LiveServer) -> None:
    data = save({"tensor": torch.ones(128)})
    digest = hashlib.sha256(data).hexdigest()
    put = live.ask("PUT", f"interventions/tensors/{digest}", params={"name": "mine"}, content=data)
    put.raise_for_status()
    edit = {"site": "model.layers.0.output[0]", "op": "add", "tensor": "mine"}
    live.post({"name": "hers", "intervention": {"edits": [edit]}}, "interventions/edits").raise_for_status()
    try:
        for reference in ("mine", digest):
            steer = {**BODY, "intervention": {"edits": [{**edit, "tensor": reference}]}}
            assert live.post(steer).status_code == 200
            assert live.post(steer, tenant="bob").status_code == 404
        named = {**BODY, "model": "tiny:hers"}
        assert live.post(named).status_code == 200
        assert live.post(named, tenant="bob").status_code == 404
        assert live.ask("GET", "interventions/edits", "bob").json()["data"] == []
        assert live.ask("DELETE", "interventions/edits/hers", "bob").status_code == 404
        assert "tiny:hers" not in live.ask("GET", "models", "bob").text
    finally:
        live.ask("DELETE", "interventions/edits/hers")
        live.ask("DELETE", f"interventions/tensors/{digest}")
