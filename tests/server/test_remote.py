"""`VLLM.connect` against the routes on a real HTTP server; the engine is a toy."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from toy import Toy, toy_catalogue
from toy_server import ToyServer

import nnsight_vllm as nv
from nnsight_vllm import VLLM
from nnsight_vllm.errors import (
    AdmissionError,
    BusyError,
    ConnectionFailed,
    EngineSettingError,
    InterventionError,
    OutOfOrderError,
    RefusedError,
    UnauthorizedError,
    UnknownModuleError,
)
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.remote import engine as remote_engine
from nnsight_vllm.trace.tree import Tree

PROMPT = [1, 2, 3]


@pytest.fixture
def server() -> Iterator[ToyServer]:
    with ToyServer() as running:
        yield running


@pytest.fixture
def model(server: ToyServer) -> Iterator[VLLM]:
    with VLLM.connect(server.url) as connected:
        yield connected


# -- the language --------------------------------------------------------------------------------------------------------


def test_reads_writes_and_results_come_home_with_their_types(model: VLLM) -> None:
    with model.trace(PROMPT, max_tokens=2) as tracer:
        before = model[0].output.clone().save()
        model[0].output[:] = 0
        after = model[2].output.save()
        pair = (before.sum(), [before.shape[-1], {"dtype": before.dtype}])
        kept = nv.list(pair).save()
        top = before.topk(2).save()
        tracer.log("sum", before.sum())
        done = tracer.result.save()
    assert before.tolist() == [[1.0] * 4] * 3 and after.tolist() == [[2.0] * 4] * 3
    assert before.dtype == torch.float32
    assert kept[1] == [4, {"dtype": torch.float32}] and float(kept[0]) == 12.0
    assert top.values.shape == top.indices.shape == (3, 2) and top.indices.dtype == torch.int64
    assert tracer.logs == ["sum tensor(12.)"]
    assert done.token_ids == [0, 0] and done.finish_reason == "length" and done.prompt_token_ids == PROMPT
    assert done.logprobs[0][0].logprob == -0.5 and done.logprobs[0][0].decoded_token == "0"
    before += 1  # the caller's own


def test_iterations_loops_and_conditions(model: VLLM) -> None:
    with model.trace(PROMPT, max_tokens=3) as tracer:
        rows = nv.list().save()
        for i in tracer.iter[:]:
            if i > 0:  # type: ignore[operator]
                model[0].mlp.output[:] *= 3
            rows.append(model[0].output.sum())
    assert [float(one) for one in rows] == [12.0, 12.0, 12.0]


def test_values_pass_between_invokes_and_traces_of_a_session(model: VLLM) -> None:
    with model.trace(max_tokens=1) as tracer:
        with tracer.invoke(PROMPT):
            source = model[0].output[-1] * 5
        with tracer.invoke("two words"):
            model[1].output[:] = source
            seen = model[1].output.save()
    assert seen.tolist() == [[5.0] * 4] * 2
    with model.session():
        with model.trace(PROMPT, max_tokens=1):
            first = model[1].output.sum()
        with model.trace(PROMPT, max_tokens=1):
            second = (model[1].output.sum() + first).save()
    assert float(second) == 48.0


def test_caches_edits_and_scans(model: VLLM, server: ToyServer) -> None:
    with model.edit() as steered:
        model[0].output[:] += torch.ones(4)
    with steered.trace(PROMPT, max_tokens=2) as tracer:
        cache = tracer.cache([model[0]])
    assert [value.tolist() for value in cache["0"].output] == [[[2.0] * 4] * 3, [[2.0] * 4]]
    with model.scan("any text"):
        shape = model[0].output.shape
    assert tuple(shape) == (2, 4)
    assert server.tensors.num_puts == 0 and len(server.engine.requests) == 1


def test_a_named_edit_is_published_and_withdrawn(model: VLLM, server: ToyServer) -> None:
    with model.edit("calm"):
        model[0].output[:] += torch.full((4,), 2.0)
    graph = server.edits["calm"]["graph"]
    (digest,) = model.edits["calm"].tensors
    assert graph["type"] == "graph" and ("", digest) in server.tensors.data
    with model.trace(PROMPT, max_tokens=1, edits=["calm"]):
        seen = model[0].output.save()
    assert seen.tolist() == [[3.0] * 4] * 3
    del model.edits["calm"]
    assert not server.edits and not model.edits


def test_large_tensors_are_uploaded_once_and_again_when_the_server_forgot(
    model: VLLM, server: ToyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "SMALL", 0)
    vector = torch.ones(4)
    for num_puts in (1, 1):
        with model.trace(PROMPT, max_tokens=1):
            seen = (model[0].output + vector).save()
        assert server.tensors.num_puts == num_puts and seen.tolist() == [[2.0] * 4] * 3
    server.tensors.data.clear()
    with model.trace(PROMPT, max_tokens=1):
        again = (model[0].output + vector).save()
    assert server.tensors.num_puts == 2 and torch.equal(again, seen)


# -- prompts and sampling ------------------------------------------------------------------------------------------------


def test_many_invokes_take_few_requests(model: VLLM, server: ToyServer) -> None:
    server.asked.clear()
    with model.trace(max_tokens=1) as tracer:
        for i in range(20):
            with tracer.invoke([1] * (i + 1)):
                pass
    assert server.asked == ["/v1/interventions/prepare", "/v1/interventions/trace"]
    server.asked.clear()
    texts = [f"{'w ' * i}end" for i in range(10)]
    model.tokenizer(texts)
    with model.trace(max_tokens=1) as tracer:
        for text in texts:
            with tracer.invoke(text):
                pass
    assert server.asked == ["/v1/interventions/prepare", "/v1/interventions/trace"]


@pytest.mark.parametrize(
    "prompt",
    [torch.tensor([[1, 2, 3]]), {"input_ids": torch.tensor([[1, 2, 3]])}, {"prompt_token_ids": PROMPT}, "a bb ccc"],
)
def test_prompts_of_every_kind(model: VLLM, prompt: object) -> None:
    with model.trace(prompt, max_tokens=1) as tracer:
        done = tracer.result.save()
    assert done.prompt_token_ids == PROMPT


def test_bad_prompts_and_sampling_are_admission_errors_with_the_line(model: VLLM) -> None:
    with pytest.raises(AdmissionError, match=r"vocabulary.*test_remote\.py:\d+"):
        model.trace([99])
    with pytest.raises(AdmissionError, match=r"unexpected keyword argument 'warmth'.*test_remote\.py:\d+"):
        model.trace(PROMPT, warmth=2)
    with pytest.raises(AdmissionError, match=r"temperature=.* can't be sent.*test_remote\.py:\d+"):
        model.trace(PROMPT, temperature=object())
    with pytest.raises(AdmissionError, match="max_model_len is 64"):
        model.trace([1] * 64)
    with pytest.raises(AdmissionError, match=r"sets 'nnsight_vllm' itself"):
        model.trace(PROMPT, extra_args={"nnsight_vllm": 1})


def test_the_tokenizer_works_through_the_server(model: VLLM) -> None:
    assert model.tokenizer.encode("a bb") == [1, 2]
    assert model.tokenizer.decode(torch.tensor([1, 2])) == "x xx"
    with pytest.raises(EngineSettingError, match=r"transformers\.AutoTokenizer"):
        model.tokenizer.apply_chat_template([])


# -- errors --------------------------------------------------------------------------------------------------------------


def test_what_is_wrong_in_a_block_is_refused_while_it_is_recorded(model: VLLM, server: ToyServer) -> None:
    with pytest.raises(OutOfOrderError, match=r"test_remote\.py:\d+"):
        with model.trace(PROMPT):
            model[1].output.save()
            model[0].output.save()
    with pytest.raises(UnknownModuleError, match="nearest"):
        with model.trace(PROMPT):
            model[0].nonsense.output.save()
    assert server.engine.requests == []


def test_a_graph_that_fails_is_raised_with_the_users_line(model: VLLM) -> None:
    with pytest.raises(InterventionError, match=r"IndexError.*test_remote\.py:\d+: late = model"):
        with model.trace(PROMPT, max_tokens=2):
            late = model[0].output[model[0].output.sum().int() + 100]
            model[0].output[:] = late


def test_what_only_the_engine_knows_is_raised_with_the_line_of_the_invoke(model: VLLM) -> None:
    with pytest.raises(
        AdmissionError, match=r"must fit into one step.*test_remote\.py:\d+: with tracer.invoke\(\[1\] \* 40"
    ):
        with model.trace(max_tokens=1) as tracer:
            with tracer.invoke(PROMPT):
                model[0].output[:] = 0
            with tracer.invoke([1] * 40):
                model[0].output[:] = 0


def test_no_server_no_key_and_a_server_without_our_routes() -> None:
    with pytest.raises(ConnectionFailed, match=r"can't be reached.*test_remote\.py"):
        VLLM.connect("http://127.0.0.1:9")
    with pytest.raises(ConnectionFailed, match="begins with http"):
        VLLM.connect("localhost:8000")
    with ToyServer(key="sesame") as server:
        for key in (None, "wrong"):
            with pytest.raises(UnauthorizedError, match="wants another api_key"):
                VLLM.connect(server.url, api_key=key)
        VLLM.connect(f"{server.url}/v1", api_key="sesame").close()
        with pytest.raises(ConnectionFailed, match="nnsight-vllm serve"):
            VLLM.connect(f"{server.url}/nowhere", api_key="sesame")


def test_a_busy_server_is_asked_once_more_and_then_raised(model: VLLM, server: ToyServer) -> None:
    server.concurrent.num_refused = 1
    with model.trace(PROMPT, max_tokens=1):
        seen = model[0].output.save()
    assert seen.shape == (3, 4)
    server.concurrent.num_refused = 2
    with pytest.raises(BusyError, match="too many requests") as busy:
        with model.trace(PROMPT, max_tokens=1):
            pass
    assert busy.value.retryable
    server.concurrent.num_refused, server.concurrent.retry_after = 1, "600"
    with pytest.raises(BusyError):
        with model.trace(PROMPT, max_tokens=1):
            pass


def test_another_model_at_the_server_is_noticed(model: VLLM, server: ToyServer) -> None:
    server.engine.tree = Tree(msgspec.structs.replace(server.engine.tree.catalogue, vocab_size=9))
    with pytest.raises(ConnectionFailed, match="connect again"):
        with model.trace(PROMPT, max_tokens=1):
            pass


def test_another_version_of_graphs_is_refused(server: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "VERSION", 2)
    with pytest.raises(ConnectionFailed, match=r"version 1, this client records version 2"):
        VLLM.connect(server.url)


def test_a_client_that_does_not_wait_ends_its_requests_in_the_engine(server: ToyServer) -> None:
    with VLLM.connect(server.url, timeout=0.5) as model:
        server.engine.is_stuck = True
        with pytest.raises(ConnectionFailed, match=r"didn't answer in time \(timeout=0\.5\)"):
            with model.trace(PROMPT, max_tokens=1):
                pass
    (run,) = server.engine.runs
    assert run.is_aborted.wait(10)


INTERRUPTED = """
    import signal, sys
    from nnsight_vllm import VLLM

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs behind it with SIGINT ignored

    with VLLM.connect(sys.argv[1]) as model:
        try:
            with model.trace([1, 2], max_tokens=1):
                print("recorded", flush=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
"""


def test_ctrl_c_ends_the_requests_in_the_engine(server: ToyServer, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    server.engine.is_stuck = True
    with subprocess.Popen([sys.executable, str(script), server.url], stdout=subprocess.PIPE, text=True) as client:
        try:
            assert server.engine.is_running.wait(60)
            client.send_signal(signal.SIGINT)
            out, _ = client.communicate(timeout=30)
        finally:
            client.kill()
    assert out == "recorded\ninterrupted\n" and client.returncode == 0
    (run,) = server.engine.runs
    assert run.is_aborted.wait(10)


def test_an_engine_that_fails_is_no_error_of_the_users(model: VLLM, server: ToyServer) -> None:
    server.engine.error = InterventionError("the engine was closed while the trace ran")
    with pytest.raises(ConnectionFailed, match="was closed"):
        with model.trace(PROMPT, max_tokens=1):
            pass


def test_what_only_a_local_model_has_says_so(model: VLLM) -> None:
    with pytest.raises(EngineSettingError, match="runs in the server"):
        model.llm  # noqa: B018
    with pytest.raises(EngineSettingError):
        model.loop  # noqa: B018
    with pytest.raises(EngineSettingError, match="operator"):
        model.check_integrity()
    assert model.stats().alone == 0


def test_a_model_that_is_known_is_not_told_again(server: ToyServer) -> None:
    path = f"{server.url}/v1/interventions/model"
    first = httpx.get(path)
    again = httpx.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{server.url}/v1/interventions/limits").json()["graph_nodes"] == 200
    assert httpx.post(f"{server.url}/v1/interventions/trace", content=b"x" * (5 << 20)).status_code == 413


def test_a_closed_model_connects_again(model: VLLM) -> None:
    model.close()
    with model.trace(PROMPT, max_tokens=1):
        seen = model[0].output.save()
    assert seen.shape == (3, 4)


def test_threads_share_a_connection(model: VLLM) -> None:
    found: dict[int, float] = {}

    def run(number: int) -> None:
        with model.trace([1] * number, max_tokens=1):
            total = model[0].output.sum().save()
        found[number] = float(total)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: 4.0 * number for number in range(1, 7)}


# -- without vLLM --------------------------------------------------------------------------------------------------------

CLIENT = """
    import sys
    sys.modules["vllm"] = None
    import nnsight_vllm as nv
    from nnsight_vllm import VLLM

    with VLLM.connect(sys.argv[1]) as model:
        with model.edit("louder"):
            model[0].output[:] *= 2
        with model.trace("three short words", max_tokens=2, edits=["louder"]) as tracer:
            rows = nv.list().save()
            with tracer.all():
                rows.append(model[0].output.sum())
            done = tracer.result.save()
        print([float(one) for one in rows], done.token_ids)
        try:
            VLLM(".").llm
        except nv.EngineSettingError as error:
            print(error)
    print(sorted(name for name in sys.modules if name.startswith("vllm")))
"""


def test_a_client_needs_no_vllm(server: ToyServer, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    ran = subprocess.run([sys.executable, str(script), server.url], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    values, advice, modules = ran.stdout.splitlines()
    assert values == "[24.0, 8.0] [0, 0]"
    assert "install nnsight-vllm[cpu]" in advice
    assert modules == "['vllm']"


# -- nv.record -----------------------------------------------------------------------------------------------------------


def test_record_prints_a_graph_and_its_tensors(model: VLLM, server: ToyServer) -> None:
    vector = torch.ones(4)

    def steer(root: VLLM, tracer: object) -> dict[str, object]:
        root[0].output[:] += vector
        return {"h": root[1].output[-1].save()}

    recorded = nv.record(model, steer)
    (digest,) = recorded.tensors
    assert f'"digest":"{digest}"' in recorded.to_json() and '"name":"h"' in recorded.to_json()
    assert str(nv.record(server.engine.tree, lambda root: root[0].output.save())).count("save") == 1
    assert server.engine.requests == []
    with pytest.raises(RefusedError, match=r"'x' isn't a value that was saved"):
        nv.record(model, lambda root: {"x": root[0].output})
    with pytest.raises(OutOfOrderError):
        nv.record(model, lambda root: [root[1].output.save(), root[0].output.save()])


def test_what_is_recorded_with_a_tracer_runs() -> None:
    vector = torch.full((4,), 2.0)

    def each(root: Any, tracer: Any) -> dict[str, Any]:
        rows = nv.list().save()
        with tracer.all():
            root[0].output[:] += vector
            with tracer.cond(root[0].output.sum() > 12):
                tracer.log("the prompt")
            rows.append(root[0].output.shape[0])
        return {"rows": rows}

    recorded = nv.record(Tree(toy_catalogue()), each)
    toy = Toy()
    toy.store.put(recorded.tensors.values())
    assert toy.run(encode(recorded.graph.nodes), steps=3) == {"rows": [2, 1, 1]}
    assert [line for delta in toy.received["r"] for line in delta.logs] == ["the prompt"]
