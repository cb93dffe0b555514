"""The `openai` client on a live server: as it is with an intervention, and beside a stock `vllm serve` without one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from live_server import CHAT_TEMPLATE, ENGINE, ENVIRONMENT, KEYS, LAST, STOCK, LiveServer, tensor_of

SCALED = {"site": "model.layers.0.output", "op": "scale", "scale": -3.0}
CHAT: Any = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 4,
    "temperature": 0.0,
    "extra_body": {"intervention": {"edits": [SCALED], "save": [LAST]}},
}
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


@pytest.fixture
def client(live: LiveServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEYS["alice"], max_retries=0) as made:
        yield made


def told(choice: Any) -> dict[str, Any]:
    """The field that the client doesn't know, and keeps."""
    found: dict[str, Any] = choice.model_extra["intervention"]
    return found


# -- with an intervention --------------------------------------------------------------------------------------------


def test_a_chat_brings_its_values(client: Any) -> None:
    (choice,) = client.chat.completions.create(**CHAT).choices
    assert told(choice)["stopped"] is False and told(choice)["logs"] == []
    assert tensor_of(told(choice)["saved"]["h"]).shape == (4, 128)
    plain = client.chat.completions.create(**{**CHAT, "extra_body": {}}).choices[0]
    assert "intervention" not in (plain.model_extra or {})
    assert plain.message.content != choice.message.content


def test_a_stream_brings_each_value_with_its_token(client: Any) -> None:
    whole = tensor_of(told(client.chat.completions.create(**CHAT).choices[0])["saved"]["h"])
    asked = {**CHAT, "extra_body": {"intervention": {"edits": [SCALED], "save": [{**LAST, "stream": True}]}}}
    pieces, text = [], ""
    for chunk in client.chat.completions.create(**asked, stream=True, logprobs=True, top_logprobs=1):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        tokens = len(choice.logprobs.content or ()) if choice.logprobs else 0
        found = told(choice)["saved"] if "intervention" in (choice.model_extra or {}) else {}
        got = [tensor_of(found["h"])] if "h" in found else []
        assert sum(map(len, got)) == tokens  # as many rows as tokens in this chunk
        pieces += got
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=2e-5, atol=2e-5)
    assert text == client.chat.completions.create(**CHAT).choices[0].message.content


def test_samples_logprobs_and_usage_are_there_as_ever(client: Any) -> None:
    answer = client.chat.completions.create(
        **{**CHAT, "temperature": 1.0, "seed": 5}, n=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert tensor_of(told(choice)["saved"]["h"]).shape[0] == len(choice.logprobs.content)
    assert answer.usage is not None and answer.usage.completion_tokens == sum(
        len(choice.logprobs.content or ()) for choice in answer.choices if choice.logprobs
    )


def test_a_named_tool_is_called(client: Any) -> None:
    asked = {**CHAT, "max_tokens": 40, "extra_body": {"intervention": {"save": [LAST]}}}
    named = {"type": "function", "function": {"name": "look"}}
    answer = client.chat.completions.create(**asked, tools=[TOOL], tool_choice=named)
    (choice,) = answer.choices
    assert choice.message.tool_calls and choice.message.tool_calls[0].function.name == "look"
    assert answer.usage is not None
    assert tensor_of(told(choice)["saved"]["h"]).shape[0] == answer.usage.completion_tokens


def test_completions_and_responses_bring_values_too(client: Any) -> None:
    extra = {"intervention": {"save": [LAST]}}
    asked = {"model": "tiny", "temperature": 0.0, "extra_body": extra}
    completion = client.completions.create(prompt=["hello", "bye bye"], max_tokens=3, **asked)
    assert [tensor_of(told(choice)["saved"]["h"]).shape for choice in completion.choices] == [(3, 128), (3, 128)]
    response = client.responses.create(input="hello", max_output_tokens=3, **asked)
    assert tensor_of(told(response)["saved"]["h"]).shape == (3, 128)


def test_what_is_wrong_is_the_clients_own_error_with_the_place(client: Any) -> None:
    wrong = {"edits": [{**SCALED, "site": "model.layer.0.output"}]}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{**CHAT, "extra_body": {"intervention": wrong}})
    assert raised.value.param == "intervention.edits[0].site"
    assert "model.layers.0" in raised.value.message  # a near name


def test_a_wrong_key_is_the_clients_own_error(live: LiveServer) -> None:
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="nobodys", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(**CHAT)


def test_an_edited_model_is_a_model(client: Any, live: LiveServer) -> None:
    body = {"name": "client", "intervention": {"edits": [SCALED]}}
    assert live.post(body, "interventions/edits").status_code == 200
    try:
        assert "tiny:client" in [model.id for model in client.models.list()]
        plainly: Any = {**CHAT, "model": "tiny:client", "extra_body": {}}
        edited = client.chat.completions.create(**plainly)
        assert edited.model == "tiny:client"
        assert edited.choices[0].message.content == client.chat.completions.create(**CHAT).choices[0].message.content
    finally:
        live.ask("DELETE", "interventions/edits/client").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**plainly)


def test_many_at_once_from_an_asynchronous_client(live: LiveServer) -> None:
    scales = [-3.0, 0.5, 1.0, 2.0] * 4

    def asked(scale: float) -> Any:
        intervention = {"edits": [{**SCALED, "scale": scale}], "save": [{**LAST, "stream": True}]}
        return {**CHAT, "extra_body": {"intervention": intervention}}

    async def one(client: openai.AsyncOpenAI, scale: float, is_streamed: bool) -> tuple[str, torch.Tensor]:
        if not is_streamed:
            (choice,) = (await client.chat.completions.create(**asked(scale))).choices
            return choice.message.content or "", tensor_of(told(choice)["saved"]["h"])
        text, rows = "", []
        async for chunk in await client.chat.completions.create(**asked(scale), stream=True):
            text += chunk.choices[0].delta.content or ""
            extra = (chunk.choices[0].model_extra or {}).get("intervention", {"saved": {}})
            rows += [tensor_of(extra["saved"]["h"])] if "h" in extra["saved"] else []
        return text, torch.cat(rows)

    async def every() -> list[tuple[str, torch.Tensor]]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEYS["alice"], max_retries=0) as client:
            return await asyncio.gather(*(one(client, scale, i % 2 == 1) for i, scale in enumerate(scales)))

    async def alone() -> dict[float, tuple[str, torch.Tensor]]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEYS["alice"], max_retries=0) as client:
            return {scale: await one(client, scale, False) for scale in set(scales)}

    wanted = asyncio.run(alone())
    for scale, (text, rows) in zip(scales, asyncio.run(every()), strict=True):
        assert text == wanted[scale][0]
        torch.testing.assert_close(rows, wanted[scale][1], rtol=1e-4, atol=1e-4)


# -- without one, beside stock ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tiny_checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    template = tmp_path_factory.mktemp("stock") / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    arguments = [tiny_checkpoint("llama"), *ENGINE, "--served-model-name", "tiny", "--chat-template", str(template)]
    arguments += ["--api-key", KEYS["alice"]]
    with LiveServer(arguments, STOCK, {**ENVIRONMENT, "VLLM_PLUGINS": ""}) as server:
        yield server


PLAIN_CHAT = {key: value for key, value in CHAT.items() if key != "extra_body"}
PLAIN = {"model": "tiny", "prompt": "hello there", "max_tokens": 4, "temperature": 0.0}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a completion": ("completions", PLAIN),
    "several prompts, samples and logprobs": (
        "completions",
        {**PLAIN, "prompt": ["a b", "c"], "n": 2, "seed": 1, "temperature": 1.0, "logprobs": 2, "echo": True},
    ),
    "a chat": ("chat/completions", PLAIN_CHAT),
    "a chat with logprobs": ("chat/completions", {**PLAIN_CHAT, "logprobs": True, "top_logprobs": 3}),
    "a named tool": (
        "chat/completions",
        {**PLAIN_CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ),
    "a response": ("responses", {"model": "tiny", "input": "hello", "max_output_tokens": 4, "temperature": 0.0}),
    "a streamed completion": (
        "completions",
        {**PLAIN, "stream": True, "stream_options": {"include_usage": True}, "logprobs": 1},
    ),
    "a streamed chat": ("chat/completions", {**PLAIN_CHAT, "stream": True}),
    "a streamed response": (
        "responses",
        {"model": "tiny", "input": "hello", "max_output_tokens": 4, "temperature": 0.0, "stream": True},
    ),
    "no such model": ("completions", {**PLAIN, "model": "nobodys"}),
    "no such edited model": ("completions", {**PLAIN, "model": "tiny:nobodys"}),
    "a field of another type": ("completions", {**PLAIN, "temperature": "warm"}),
    "a sampling that can't be": ("chat/completions", {**PLAIN_CHAT, "temperature": -1.0}),
    "too long a prompt": ("completions", {**PLAIN, "prompt": [7] * 4000}),
    "an empty body": ("chat/completions", {}),
}
# What differs from one request to the next, and what names the server's own settings.
VARIES = re.compile(r'"(id|item_id|created|created_at|completed_at|system_fingerprint)":("[^"]*"|[\d.]+)')


def answered(server: LiveServer, route: str, body: dict[str, Any]) -> tuple[int, set[str], str]:
    """Status, names of headers, and the body without what differs from request to request."""
    answer = server.post(body, route)
    if "text/event-stream" not in answer.headers["content-type"]:
        return answer.status_code, set(answer.headers), _settled(json.dumps(answer.json(), separators=(",", ":")))
    lines = [_settled(line.replace('": ', '":')) for line in answer.text.splitlines()]
    return answer.status_code, set(answer.headers), "\n".join(lines)


def _settled(text: str) -> str:
    return VARIES.sub(r'"\1":0', text)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_without_the_field_is_answered_as_by_stock(live: LiveServer, stock: LiveServer, name: str) -> None:
    for _ in range(10 if REQUESTS[name][1].get("stream") else 1):  # how many tokens share a chunk depends on the moment
        ours, theirs = (answered(server, *REQUESTS[name]) for server in (live, stock))
        if ours == theirs:
            break
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("body", [b"", b"\xfe\x9c", b"{", b"[]", b"null", b'{"model": "tiny", "prompt": "\\ud800"}'])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_what_is_no_request_is_answered_as_by_stock(
    live: LiveServer, stock: LiveServer, route: str, body: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    ours, theirs = (server.ask("POST", route, content=body, headers=headers) for server in (live, stock))
    assert (ours.status_code, _settled(ours.text)) == (theirs.status_code, _settled(theirs.text))


def test_every_route_of_stock_is_there(live: LiveServer, stock: LiveServer) -> None:
    theirs, ours = (httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"] for server in (stock, live))
    missing = [
        (path, method) for path, methods in theirs.items() for method in methods if method not in ours.get(path, {})
    ]
    assert not missing
