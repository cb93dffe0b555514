"""A long mixed load on a server over HTTP: plain, edited, saving, streaming, leaving and malformed requests of two tenants.

    python tests/soak.py [--seconds 600]          # `make soak`

Every answer is judged: the status that its kind asks for, and values equal to those of the same request when it ran alone at the
start. At the end nothing runs, the server's integrity check is clean, and no process of it has grown.

Growth is judged by medians: a process may have at the most 3 % and 24 MB more in the last third of the time than in the third before,
since the first third fills what is kept (programs, tables, the C library's own pages). Runs below eight minutes don't judge it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from live_server import KEYS, LAST, LiveServer, key_of, serve_tiny, tensor_of
from safetensors.torch import load, save
from torch import Tensor

from nnsight_vllm import VLLM

NUM_WORKERS = 48  # the server has 32 seats
HIDDEN_SITE = "model.layers.0.output[0]"
WHOLE = {"name": "all", "site": "model.layers.1.output[0]", "positions": "prompt"}
PROMPTS = [
    " ".join(f"{word}{number}" for number in range(3 + 5 * i)) for i, word in enumerate(("ab", "cd", "ef", "gh"))
]
SCALES = (-3.0, 0.5, 2.0)
TOLERANCE = 1e-4  # float32; batches of other sizes add up in another order
GROWTH = (1.03, 24)  # factor and MB
SAMPLE_SECONDS = 2.0
SETTLING_SECONDS = 480  # what is kept has been filled in a third of this
MALFORMED: list[tuple[dict[str, Any], str, int]] = [
    ({"edits": [{"site": "model.layer.0", "op": "ablate"}]}, "intervention.edits[0].site", 400),
    ({"edits": [{"site": HIDDEN_SITE, "op": "explode"}]}, "intervention.edits[0].op", 400),
    ({"edits": [{"site": HIDDEN_SITE, "op": "add", "tensor": "nobodys"}]}, "intervention.edits[0].tensor", 404),
    ({"save": [{**LAST, "positions": [3, -3]}]}, "intervention.save[0].positions[1]", 400),
    ({"graph": {"version": 0}}, "intervention.graph", 400),
    ({"sav": []}, "intervention.sav", 400),
]

JSON = dict[str, Any]


class Unexpected(AssertionError):
    """An answer that nobody asked for."""


@dataclass
class Report:
    """What was done by kind, and resident MB of each process over time."""

    done: Counter[str] = field(default_factory=Counter)
    memory: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    def growth(self) -> dict[str, tuple[float, float]]:
        """By process: the median of the second third and of the last, in MB."""
        found = {}
        for name, points in self.memory.items():
            third = len(points) // 3
            found[name] = (median(points[third : 2 * third]), median(points[2 * third :]))
        return found

    def check(self, is_settled: bool) -> None:
        """Raise if a kind never came up, or a process grew after it had settled."""
        missing = [name for name in KINDS if not self.done[name]]
        if missing:
            raise Unexpected(f"never done: {missing}")
        for name, (before, after) in self.growth().items() if is_settled else ():
            if after > before * GROWTH[0] + GROWTH[1]:
                raise Unexpected(f"{name} grew from {before} to {after} MB: {self.memory[name]}")

    def __str__(self) -> str:
        lines = [f"{sum(self.done.values())} requests in {self.seconds:.0f} s: {dict(sorted(self.done.items()))}"]
        lines += [
            f"{name}: {points[0]} MB at first; medians {before:.0f} MB in the second third, {after:.0f} MB in the last"
            for (name, points), (before, after) in zip(self.memory.items(), self.growth().values(), strict=True)
        ]
        return "\n".join(lines)


class Soak:
    """A load on one server. `alone`: what each request gets that the answers are compared with."""

    def __init__(self, server: LiveServer, seed: int) -> None:
        self.server = server
        self.draw = random.Random(seed)
        self.report = Report()
        self.alone: dict[str, JSON] = {}
        self.client = httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=None))
        self.hidden = 0
        self._number = 0
        self._until = 0.0

    async def run(self, seconds: float) -> Report:
        """Load the server, then look at what is left. Raises `Unexpected`."""
        begin = time.monotonic()
        await self._learn()
        self._until = time.monotonic() + seconds
        watch = asyncio.ensure_future(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(NUM_WORKERS):
                    group.create_task(self._work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            watch.cancel()
        await self._settle()
        await self.client.aclose()
        self.report.seconds = time.monotonic() - begin
        return self.report

    async def _learn(self) -> None:
        told = (await self.ask("GET", "/v1/interventions/model")).json()
        self.hidden = _hidden_of(told)
        for prompt in PROMPTS:
            for edits in [[], *([_scaled(scale)] for scale in SCALES)]:
                answer = await self.ask("POST", "/v1/completions", body_of(prompt, edits, [LAST, WHOLE]))
                self.alone[_key(prompt, edits)] = saved_of(answer.json()["choices"][0])

    async def _work(self) -> None:
        while time.monotonic() < self._until:
            name = self.draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
            try:
                await KINDS[name].do(self)
            except Unexpected as error:
                raise Unexpected(f"{name}: {error}") from error
            self.report.done[name] += 1

    async def _watch(self) -> None:
        while True:
            for name, megabytes in resident(self.server.pid).items():
                self.report.memory.setdefault(name, []).append(megabytes)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _settle(self) -> None:
        """Those who left are gone soon; then nothing is left of anybody."""
        deadline = time.monotonic() + 30
        while (left := await self._running()) != (0, 0):
            if time.monotonic() > deadline:
                raise Unexpected(f"still running, by vLLM and by us: {left}")
            await asyncio.sleep(0.2)
        leftovers = (await self.ask("GET", "/v1/interventions/integrity")).json()["leftovers"]
        if leftovers:
            raise Unexpected(f"left over: {leftovers}")

    async def _running(self) -> tuple[float, float]:
        text = (await self.client.get("/metrics")).text
        found = [
            re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)
            for name in ("vllm:num_requests_running", "nnsight_running")
        ]
        vllms, ours = (float(match[1]) if match is not None else -1.0 for match in found)
        return vllms, ours

    async def ask(
        self, method: str, path: str, body: JSON | None = None, tenant: str = "alice", status: int = 200, **more: Any
    ) -> httpx.Response:
        """One request, whose answer must have this status."""
        answer = await self.client.request(method, path, json=body, headers=key_of(tenant), **more)
        if answer.status_code != status:
            raise Unexpected(f"{method} {path} {json.dumps(body)[:400]}: {answer.status_code} {answer.text[:400]}")
        return answer

    async def gone(self, path: str) -> None:
        """A result is forgotten when all of it has been sent, which is a moment after it has come."""
        for _ in range(50):
            if (await self.client.get(path, headers=key_of("alice"))).status_code == 404:
                return
            await asyncio.sleep(0.1)
        raise Unexpected(f"{path} is still there")

    def pick(self) -> tuple[str, list[JSON]]:
        """A prompt, and no edit or one of those whose results are known."""
        return self.draw.choice(PROMPTS), self.draw.choice([[], *([_scaled(scale)] for scale in SCALES)])

    def judge(self, prompt: str, edits: list[JSON], saved: dict[str, Tensor]) -> None:
        """The prompt's rows are as they were alone; generated ones may differ where two tokens are as good."""
        alone = self.alone[_key(prompt, edits)]
        for name, value in saved.items():
            known = alone[name]
            mine = value[:1] if name == "h" else value
            try:
                torch.testing.assert_close(mine, known[: len(mine)], rtol=TOLERANCE, atol=TOLERANCE)
            except AssertionError as error:
                raise Unexpected(f"{prompt!r} {edits}: {name}: {error}") from None

    def name(self) -> str:
        """One that nobody has used."""
        self._number += 1
        return f"soak-{self._number}"

    def vector(self) -> Tensor:
        return torch.randn(self.hidden, generator=torch.manual_seed(self.draw.getrandbits(31)))


# -- kinds ---------------------------------------------------------------------------------------------------------------


async def plain(soak: Soak) -> None:
    prompt, _ = soak.pick()
    answer = await soak.ask("POST", "/v1/completions", body_of(prompt), tenant=soak.draw.choice(list(KEYS)))
    if "intervention" in answer.json()["choices"][0]:
        raise Unexpected(f"an intervention that nobody asked for: {answer.text}")


async def chat(soak: Soak) -> None:
    prompt, edits = soak.pick()
    body = body_of(prompt, edits, [LAST])
    body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    choice = (await soak.ask("POST", "/v1/chat/completions", body)).json()["choices"][0]
    if not choice["intervention"]["saved"]["h"]["shape"][0]:
        raise Unexpected(f"no rows: {choice}")


async def saving(soak: Soak) -> None:
    prompt, edits = soak.pick()
    tenant = soak.draw.choice(list(KEYS))
    answer = await soak.ask("POST", "/v1/completions", body_of(prompt, edits, [LAST, WHOLE]), tenant)
    soak.judge(prompt, edits, saved_of(answer.json()["choices"][0]))


async def streaming(soak: Soak) -> None:
    prompt, edits = soak.pick()
    body = {**body_of(prompt, edits, [{**LAST, "stream": True}]), "stream": True}
    rows = []
    async with soak.client.stream("POST", "/v1/completions", json=body, headers=key_of("bob")) as response:
        if response.status_code != 200:
            raise Unexpected(f"{response.status_code}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                told = json.loads(line.removeprefix("data: "))
                if "error" in told:
                    raise Unexpected(line)
                rows += [saved_of(choice)["h"] for choice in told["choices"] if "intervention" in choice]
    soak.judge(prompt, edits, {"h": torch.cat(rows)})


async def leaving(soak: Soak) -> None:
    prompt, edits = soak.pick()
    body = {**body_of(prompt, edits, [LAST]), "stream": True, "max_tokens": 150, "ignore_eos": True}
    async with soak.client.stream("POST", "/v1/completions", json=body, headers=key_of("alice")) as response:
        async for _ in response.aiter_lines():
            break


async def malformed(soak: Soak) -> None:
    intervention, param, status = soak.draw.choice(MALFORMED)
    body = {**body_of(PROMPTS[0]), "intervention": intervention}
    answer = await soak.ask("POST", "/v1/completions", body, status=status)
    got = answer.json()["error"]["param"]
    if not str(got).startswith(param):
        raise Unexpected(f"{intervention}: param is {got}, not {param}")


async def by_link(soak: Soak) -> None:
    """Some samples of a long prompt: above what comes inline."""
    prompt = " ".join(f"x{number}" for number in range(40))
    sites = [{"name": f"s{i}", "site": f"model.layers.{i % 2}.output[0]", "positions": "prompt"} for i in range(2)]
    saved = (await soak.ask("POST", "/v1/completions", body_of(prompt, [], sites))).json()["choices"][0][
        "intervention"
    ]["saved"]
    for told in saved.values():
        if "href" in told:
            await soak.ask("GET", told["href"], tenant="bob", status=404)
            data = (await soak.ask("GET", told["href"])).content
            if list(load(data)["tensor"].shape) != told["shape"]:
                raise Unexpected(f"another shape behind the link: {told}")
            await soak.gone(told["href"])


async def uploaded(soak: Soak) -> None:
    """A vector of one tenant's, which the other one hasn't got."""
    name, data = soak.name(), save({"tensor": soak.vector()})
    path = f"/v1/interventions/tensors/{hashlib.sha256(data).hexdigest()}"
    await soak.ask("PUT", path, params={"name": name}, content=data)
    edits = [{"site": HIDDEN_SITE, "op": "add", "tensor": name, "scale": 0.5}]
    await soak.ask("POST", "/v1/completions", body_of(PROMPTS[1], edits, [LAST]))
    refused = await soak.ask("POST", "/v1/completions", body_of(PROMPTS[1], edits), tenant="bob", status=404)
    if refused.json()["error"]["param"] != "intervention.edits[0].tensor":
        raise Unexpected(refused.text)
    await soak.ask("DELETE", path)


async def edited_model(soak: Soak) -> None:
    name, scale = soak.name(), soak.draw.choice(SCALES)
    intervention = {"edits": [_scaled(scale)]}
    await soak.ask("POST", "/v1/interventions/edits", {"name": name, "intervention": intervention})
    prompt = soak.draw.choice(PROMPTS)
    answer = await soak.ask("POST", "/v1/completions", {**body_of(prompt, [], [LAST]), "model": f"tiny:{name}"})
    soak.judge(prompt, [_scaled(scale)], saved_of(answer.json()["choices"][0]))
    await soak.ask("DELETE", f"/v1/interventions/edits/{name}")


async def traced(soak: Soak) -> None:
    """The language, from Python: two requests, of which one uses a value of the other."""
    prompt, scale = soak.draw.choice(PROMPTS), soak.draw.choice(SCALES)
    await asyncio.to_thread(_trace, soak.server.url, prompt, scale)


def _trace(url: str, prompt: str, scale: float) -> None:
    model = VLLM.connect(url, api_key=KEYS["bob"])
    try:
        with model.trace(temperature=0.0, max_tokens=4) as tracer:
            with tracer.invoke(prompt):
                state = model.model.layers[0].output[0][-1, :]
            with tracer.invoke(prompt):
                model.model.layers[0].output[0][-1, :] = state * scale
                after = model.model.layers[0].output[0][-1, :].save()
            with tracer.invoke(prompt):
                model.model.layers[0].output[0][-1, :] *= scale
                same = model.model.layers[0].output[0][-1, :].save()
        torch.testing.assert_close(after, same, rtol=TOLERANCE, atol=TOLERANCE)
    finally:
        model.close()


@dataclass(frozen=True)
class Kind:
    """A kind of request, and how often it comes."""

    do: Callable[[Soak], Awaitable[None]]
    weight: int


KINDS = {
    "plain": Kind(plain, 6),
    "chat": Kind(chat, 3),
    "saving": Kind(saving, 8),
    "streaming": Kind(streaming, 4),
    "leaving": Kind(leaving, 3),
    "malformed": Kind(malformed, 4),
    "by link": Kind(by_link, 2),
    "uploaded": Kind(uploaded, 2),
    "edited model": Kind(edited_model, 2),
    "traced": Kind(traced, 1),
}


# -- bodies and answers --------------------------------------------------------------------------------------------------


def body_of(prompt: str, edits: list[JSON] | None = None, saves: list[JSON] | None = None) -> JSON:
    """A greedy request of a few tokens."""
    body: JSON = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0.0}
    if edits or saves:
        body["intervention"] = {"edits": edits or [], "save": saves or []}
    return body


def saved_of(choice: JSON) -> dict[str, Tensor]:
    """The tensors in an answer."""
    return {name: tensor_of(told) for name, told in choice["intervention"]["saved"].items() if "data" in told}


def resident(session: int) -> dict[str, int]:
    """MB of each process of the server, which is a session of its own."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == session:
                title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                name = title if title.startswith("VLLM::") else "API server" if int(folder.name) == session else ""
                if name:
                    found[name] = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


def _scaled(scale: float) -> JSON:
    return {"site": HIDDEN_SITE, "op": "scale", "scale": scale}


def _key(prompt: str, edits: list[JSON]) -> str:
    return json.dumps([prompt, edits])


def _hidden_of(told: JSON) -> int:
    """The width of the model, from a block's site."""
    found = re.search(r'"model\.layers\.0\.output[^}]*?"shape":\s*\[[^\]]*?(\d+)\]', json.dumps(told))
    if found is None:
        raise Unexpected(f"no shape of a block: {json.dumps(told)[:2000]}")
    return int(found[1])


def soak(server: LiveServer, seconds: float, seed: int) -> Report:
    """Load a server that `serve_tiny` started. Raises `Unexpected`."""

    async def run() -> Report:
        return await Soak(server, seed).run(seconds)

    report = asyncio.run(run())
    report.check(is_settled=seconds >= SETTLING_SECONDS)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFF)
    options = parser.parse_args()
    from checkpoints import tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve_tiny(tiny("llama", folder), folder) as server:
            print(f"seed {options.seed}")
            print(soak(server, options.seconds, options.seed))


if __name__ == "__main__":
    main()
