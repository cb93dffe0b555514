"""An id that a client chose is a label: whoever chooses the same one gets its own values, and leaves others theirs."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from live_server import KEYS, LiveServer

ID = "chosen-by-a-client"
PROMPTS = {"alice": "hello there", "bob": "seven green apples"}
SAVE = {"name": "h", "site": "model.layers.1.output[0]", "positions": "last"}
NUM_TOKENS = 40


def body_of(tenant: str, route: str, **more: Any) -> dict[str, Any]:
    """Two prompts in a completion, two samples of a prompt in a chat."""
    body = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True, **more}
    body["intervention"] = {"save": [{**SAVE, "stream": True}]}
    if route == "completions":
        return {**body, "prompt": [PROMPTS[tenant], PROMPTS[tenant][::-1]]}
    return {**body, "n": 2, "temperature": 1.0, "seed": 3, "messages": [{"role": "user", "content": PROMPTS[tenant]}]}


def rows_of(live: LiveServer, tenant: str, route: str, **more: Any) -> dict[int, torch.Tensor]:
    """What a tenant's choices saved, by their numbers. The answer must be labelled with the id."""
    headers = {"Authorization": f"Bearer {KEYS[tenant]}", "X-Request-Id": ID}
    url = f"{live.url}/v1/{route}"
    answer = httpx.post(url, json=body_of(tenant, route, **more), headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    lines = answer.text.splitlines() if more.get("stream") else [f"data: {answer.text}"]
    bodies = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert {body["id"] for body in bodies} == {f"{'cmpl' if route == 'completions' else 'chatcmpl'}-{ID}"}
    pieces: dict[int, list[torch.Tensor]] = {}
    for choice in [choice for body in bodies for choice in body["choices"] if "intervention" in choice]:
        if (told := choice["intervention"]["saved"].get("h")) is not None:
            rows = torch.frombuffer(bytearray(base64.b64decode(told["data"])), dtype=getattr(torch, told["dtype"]))
            pieces.setdefault(choice["index"], []).append(rows.reshape(told["shape"]))
    return {index: torch.cat(found) for index, found in pieces.items()}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_tenants_that_choose_the_same_id_get_their_own_rows(live: LiveServer, route: str, is_streamed: bool) -> None:
    alone = {tenant: rows_of(live, tenant, route, stream=is_streamed) for tenant in PROMPTS}
    tenants = [*PROMPTS] * 3
    with ThreadPoolExecutor(len(tenants)) as pool:
        together = pool.map(lambda tenant: rows_of(live, tenant, route, stream=is_streamed), tenants)
    for tenant, found in zip(tenants, together, strict=True):
        assert {index: rows.shape[0] for index, rows in found.items()} == {0: NUM_TOKENS, 1: NUM_TOKENS}
        for index, rows in found.items():
            torch.testing.assert_close(rows, alone[tenant][index], rtol=2e-5, atol=2e-5)
    health = httpx.get(f"{live.url}/v1/interventions/integrity", headers={"Authorization": f"Bearer {KEYS['alice']}"})
    assert health.status_code == 200, health.text
