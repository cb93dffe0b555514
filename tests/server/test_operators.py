"""What an operator sees and does: metrics, the journal, a tenant at its limit, the integrity check, and SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import BODY, KEYS, LAST, SCALED, LiveServer, key_of, serve_tiny, wait_until

READS = {**BODY, "intervention": {"save": [LAST]}}
STRICT = ("--max-concurrent-requests", "1", "--max-body-bytes", "100000")
LONG = {**READS, "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def strict(tiny_checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that lets a tenant have one request with an intervention at a time, and writes its journal."""
    folder = tmp_path_factory.mktemp("strict")
    with serve_tiny(tiny_checkpoint("llama"), folder, *STRICT, log_level="INFO") as server:
        yield server


def test_metrics_tell_what_ran(strict: LiveServer) -> None:
    names = [
        "nnsight_requests_with_graphs_total",
        "nnsight_graphs_total",
        "nnsight_graph_nodes_total",
        "nnsight_operations_total",
        "nnsight_saved_bytes_total",
        "nnsight_program_seconds_sum",
    ]
    assert strict.post({**READS, "intervention": {"edits": [SCALED], "save": [LAST]}}).status_code == 200
    before = {name: strict.metric(name) for name in names}
    steps = strict.metric("nnsight_program_seconds_count")
    assert strict.post({**READS, "intervention": {"edits": [SCALED], "save": [LAST]}}).status_code == 200
    after = {name: strict.metric(name) for name in names}
    assert all(after[name] > before[name] for name in names), (before, after)
    assert after["nnsight_saved_bytes_total"] - before["nnsight_saved_bytes_total"] >= 4 * 128 * 4
    assert strict.metric("nnsight_program_seconds_count") == steps + 4  # one for each forward
    assert strict.metric("nnsight_program_seconds_bucket") >= steps + 4
    assert strict.metric("nnsight_program_hits_total") >= 1
    assert strict.metric("nnsight_table_lines") >= 0
    assert strict.metric("nnsight_table_bytes") > 0
    refused = strict.metric("nnsight_rejected_total", default=0)
    assert strict.post({**BODY, "intervention": {"edits": [{**SCALED, "site": "nowhere"}]}}).status_code == 400
    assert strict.metric("nnsight_rejected_total") == refused + 1


def test_metrics_are_there_while_the_engine_is_busy(strict: LiveServer) -> None:
    with ThreadPoolExecutor(9) as pool:
        running = pool.submit(strict.post, LONG)
        looks = [pool.submit(strict.metrics) for _ in range(8)]
        assert all("nnsight_program_seconds_count" in look.result() for look in looks)
        assert running.result().status_code == 200


def test_a_failure_is_counted_as_one_also_in_a_stream(strict: LiveServer) -> None:
    graph = _too_much(strict)
    before = strict.metric("nnsight_failed_total", default=0)
    answer = strict.post({**BODY, "intervention": {"graph": graph}})
    assert answer.status_code == 400 and "the graph failed" in answer.json()["error"]["message"]
    streamed = strict.post({**BODY, "stream": True, "intervention": {"graph": graph}})
    assert "the graph failed" in streamed.text
    assert strict.metric("nnsight_failed_total", default=0) == before + 2
    assert strict.post(READS).status_code == 200


def _too_much(server: LiveServer) -> dict[str, Any]:
    """A graph that takes a row that isn't there, which shows only when it runs."""
    import nnsight_vllm as nv

    with nv.VLLM.connect(server.url, api_key=KEYS["alice"]) as model:

        def read(root: Any) -> dict[str, Any]:
            row = root.model.layers[0].output[0][-1]
            return {"h": row[row.argmax() + 5000].save()}

        found: dict[str, Any] = json.loads(nv.record(model, read).to_json())
        return found


def test_the_journal_has_a_line_for_each_request(strict: LiveServer) -> None:
    strict.post(READS, **{"X-Request-Id": "mine-1"})
    strict.post({**BODY, "intervention": {"edits": [{**SCALED, "site": "nowhere"}]}}, **{"X-Request-Id": "its"})
    strict.post(BODY, **{"X-Request-Id": "plain-1"})
    wait_until(lambda: "mine-1" in strict.log and "id=its " in strict.log)
    lines = [line for line in strict.log.splitlines() if "intervention id=" in line]
    answered = next(line for line in lines if "mine-1" in line)
    assert "route=/v1/completions" in answered and "tenant=alice" in answered and "outcome=answered" in answered
    assert re.search(r"seconds=\d", answered)
    (refused,) = [line for line in lines if "id=its " in line]  # other tests' are in the log, too
    assert "param=intervention.edits[0].site" in refused
    assert "status=400" in refused and "outcome=BadRequestError" in refused
    assert len([line for line in lines if "mine-1" in line or "id=its " in line]) == 2
    assert not any("plain-1" in line for line in lines)
    assert not any(key in strict.log for key in KEYS.values())


def test_a_tenant_at_its_limit_is_told_to_wait_and_another_is_served(strict: LiveServer) -> None:
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:  # one client: to make one takes a while

        def ask(body: dict[str, Any], tenant: str = "alice") -> httpx.Response:
            return client.post(f"{strict.url}/v1/completions", json=body, headers=key_of(tenant))

        ask(BODY)
        hers = [pool.submit(ask, {**LONG, "n": 8, "temperature": 1.0}) for _ in range(6)]
        others = [pool.submit(ask, READS, "bob"), pool.submit(ask, BODY)]
        answers = [one.result() for one in hers]
        assert [one.result().status_code for one in others] == [200, 200]  # a plain request has no such limit
    busy = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(busy) < len(answers)
    for answer in busy:
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["type"] == "RateLimitError"
    assert strict.post(READS).status_code == 200


def test_a_body_that_is_too_long_is_given_up(strict: LiveServer) -> None:
    long = {**BODY, "intervention": {"edits": [{**SCALED, "tensor": "x" * 200_000}]}}

    def in_parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    json_type = {"Content-Type": "application/json"}
    for sent in (strict.post(long), strict.ask("POST", "completions", content=in_parts(), headers=json_type)):
        assert sent.status_code == 413
        assert "100000" in sent.json()["error"]["message"]
    assert strict.post(READS).status_code == 200


def test_the_integrity_check_is_a_route(strict: LiveServer) -> None:
    assert httpx.get(f"{strict.url}/v1/interventions/integrity", timeout=60).status_code == 401
    assert strict.ask("GET", "interventions/integrity").json() == {"leftovers": []}


@pytest.mark.timeout(300)
def test_sigterm_lets_what_runs_end(tiny_checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    with serve_tiny(tiny_checkpoint("llama"), tmp_path) as server:
        server.post(READS)
        lines: list[str] = []
        begun = threading.Event()

        def listen() -> None:
            with server.stream(LONG) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        with ThreadPoolExecutor(1) as pool:
            listening = pool.submit(listen)
            assert begun.wait(60)
            children = _descendants(server.pid)
            server.signal(signal.SIGTERM)
            listening.result(60)
        assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
        last = next(json.loads(line.removeprefix("data: ")) for line in reversed(lines) if line.startswith("data: {"))
        assert last["choices"][0]["finish_reason"] == "length"
        assert "h" in last["choices"][0]["intervention"]["saved"]
        assert server.wait(60) == 0
        assert wait_until(lambda: not [pid for pid in children if os.path.exists(f"/proc/{pid}")], 20)


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    due = [pid]
    while due:
        one = due.pop()
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            children = {int(child) for child in path.read_text().split()}
            due += children - found
            found |= children
    return found
