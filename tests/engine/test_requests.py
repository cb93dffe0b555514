"""Requests through the public interface on a tiny model: results, failures, stops, sampling, limits, clean-up."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import nnsight_vllm as nv
from nnsight_vllm.errors import AdmissionError, InterventionError, RecordError, RefusedError, ValueNotSetError
from nnsight_vllm.graph.codec import digest, encode
from nnsight_vllm.graph.nodes import Block, Const, Graph, Op, Ref
from nnsight_vllm.wire.extras import RequestExtras, encode_extras

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

PROMPT = [5, 17, 33, 90, 41, 7]
OTHER = [9, 8, 7, 6]


@pytest.fixture
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    engine = engines(
        tiny_checkpoint("llama"), enforce_eager=True, max_model_len=128, max_num_batched_tokens=64, max_num_seqs=32
    )
    yield engine
    engine.check_integrity()


def greedy(model: VLLM, prompt: object = PROMPT, **more: Any) -> Any:
    """A plain request's result, through the same engine."""
    with model.trace(prompt, **{"temperature": 0.0, "max_tokens": 4, **more}) as tracer:
        result = tracer.result.save()
    return result


def test_a_request_that_only_reads_gets_the_plain_tokens(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=4) as tracer:
        h = model.model.layers[1].output[0].save()
        result = tracer.result.save()
    assert h.shape == (6, 128)
    assert result.token_ids == greedy(model).token_ids


def test_a_failure_belongs_to_its_request_and_the_others_have_their_values(model: VLLM) -> None:
    with pytest.raises(InterventionError, match=r"IndexError: .*test_requests\.py:\d+: .*nonzero") as caught:
        with model.trace(temperature=0.0, max_tokens=4) as tracer:
            with tracer.invoke(PROMPT):
                good = model.model.layers[1].output[0].save()
                result = tracer.result.save()
            with tracer.invoke(PROMPT):
                h = model.model.layers[0].output[0]
                h[(h[:, 0] > 1e9).nonzero()[0]] = 0
                failed = tracer.result.save()
    assert good.shape == (6, 128)
    assert len(result.token_ids) == 4
    assert failed.finish_reason == "error"
    assert not caught.value.retryable


def test_several_failures_are_a_group(model: VLLM) -> None:
    with pytest.raises(ExceptionGroup) as caught, model.trace(temperature=0.0, max_tokens=2) as tracer:
        for _ in range(2):
            with tracer.invoke(PROMPT):
                h = model.model.layers[0].output[0]
                h[(h[:, 0] > 1e9).nonzero()[0]] = 0
    assert len(caught.value.exceptions) == 2


@pytest.mark.parametrize("value", [10**6, -1, torch.tensor([1.5]), torch.tensor([True]), torch.tensor([1, 2])])
def test_a_sample_that_is_no_token_fails_the_request(model: VLLM, value: Any) -> None:
    with pytest.raises((InterventionError, RecordError)):
        with model.trace(PROMPT, temperature=0.0, max_tokens=4):
            model.samples.output = value


def test_the_engine_goes_on_from_an_edited_sample(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=3) as tracer:
        model.samples.output = 77
        result = tracer.result.save()
    assert result.token_ids == [77, *greedy(model, [*PROMPT, 77], max_tokens=2).token_ids]


def test_an_edited_sample_can_stop_the_request(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=8, stop_token_ids=[77]) as tracer:
        with tracer.iter[2]:
            model.samples.output = 77
        result = tracer.result.save()
    assert len(result.token_ids) == 3
    assert (result.finish_reason, result.outputs[0].stop_reason) == ("stop", 77)


def test_what_was_read_before_an_assignment_keeps_its_value(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        before = model.model.layers[0].mlp.output
        saved = before.save()
        model.model.layers[0].mlp.output = before * 2
        difference = (model.model.layers[0].mlp.output - before).save()
    torch.testing.assert_close(difference, saved)


def test_a_deep_copy_is_a_value(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        h = model.model.layers[0].output[0]
        copied = copy.deepcopy(h)
        copied[:] = 0
        after = h.save()
    assert bool((after != 0).any())
    assert copy.deepcopy([after])[0] is not after


def test_a_number_of_the_run_counts_up(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        count = nv.int(model.samples.output) * 0
        count += 2
        count -= 5
        saved = count.save()
    assert saved == -3


def test_log_probabilities_come_from_the_edited_logits_and_name_the_edited_token(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1, logprobs=2) as tracer:
        logits = model.logits.output
        logits[:, 11] = logits.max() + 5
        edited = logits.save()
        result = tracer.result.save()
    expected = torch.log_softmax(edited.float(), -1)[0]
    assert result.token_ids == [11]
    assert result.logprobs[0][11].logprob == pytest.approx(float(expected[11]), abs=1e-4)
    with model.trace(PROMPT, temperature=0.0, max_tokens=1, logprobs=2) as tracer:
        plain = model.logits.output.save()
        model.samples.output = 23
        result = tracer.result.save()
    expected = torch.log_softmax(plain.float(), -1)[0]
    assert result.logprobs[0][23].logprob == pytest.approx(float(expected[23]), abs=1e-4)
    assert result.logprobs[0][23].rank == int((expected > expected[23]).sum()) + 1
    assert result.outputs[0].cumulative_logprob == pytest.approx(float(expected[23]), abs=1e-4)


def test_prompt_logprobs_do_not_fire_the_logits_site(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1, prompt_logprobs=1) as tracer:
        logits = model.logits.output.save()
        result = tracer.result.save()
    assert logits.shape[0] == 1
    assert len(result.prompt_logprobs) == len(PROMPT)
    assert int(logits.argmax()) == result.token_ids[0]


def test_stop_ends_the_request_in_its_iteration(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=8, ignore_eos=True, min_tokens=8) as tracer:
        h = model.model.layers[0].output[0].save()
        tracer.stop()
        early = tracer.result.save()
    with model.trace(PROMPT, temperature=0.0, max_tokens=8, ignore_eos=True) as tracer:
        token = model.samples.next().output.save()
        tracer.stop()
        late = tracer.result.save()
    assert h.shape == (6, 128)
    assert (early.token_ids, early.finish_reason) == ([], "stop")
    assert late.token_ids == greedy(model).token_ids[:2]
    assert int(token) == late.token_ids[1]


def test_stop_of_a_value_and_of_a_tuple(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=4) as tracer:
        h = model.model.layers[0].output.save()
        model.model.layers[0].output.stop()
        result = tracer.result.save()
    assert result.token_ids == []
    assert isinstance(h, tuple)
    with model.trace(PROMPT, temperature=0.0, max_tokens=4):
        x = model.model.layers[0].mlp.output
        x.stop()
        never = model.model.layers[1].output[0].save()
    with pytest.raises(ValueNotSetError):
        print(never)


def test_samples_of_one_request_each_run_the_graph(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=1.0, seed=3, n=3, max_tokens=4, ignore_eos=True) as tracer:
        tokens = nv.list().save()
        h = model.model.layers[1].output[0].save()
        result = tracer.result.save()
        with tracer.all():
            tokens.append(model.samples.output)
    assert [[int(token) for token in sample] for sample in tokens] == [output.token_ids for output in result.outputs]
    assert [list(value.shape) for value in h] == [[6, 128]] * 3
    torch.testing.assert_close(h[0], h[2])


def test_stop_strings_and_seeds_keep_working(model: VLLM) -> None:
    plain = greedy(model, max_tokens=6, temperature=1.0, seed=11)
    with model.trace(PROMPT, max_tokens=6, temperature=1.0, seed=11) as tracer:
        model.model.layers[0].output[0].save()
        read = tracer.result.save()
    assert read.token_ids == plain.token_ids
    text = greedy(model, max_tokens=6).text
    stop = text[len(text) // 2 :][:1] or text[-1:]
    with model.trace(PROMPT, max_tokens=6, temperature=0.0, stop=[stop]) as tracer:
        model.model.layers[0].output[0].save()
        stopped = tracer.result.save()
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        torch.tensor(PROMPT),
        torch.tensor([PROMPT]),
        {"input_ids": [PROMPT]},
        {"prompt_token_ids": PROMPT},
        tuple(PROMPT),
    ],
)
def test_prompts_come_in_many_forms(model: VLLM, prompt: object) -> None:
    with model.trace(prompt, temperature=0.0, max_tokens=2) as tracer:
        h = model.model.layers[0].output[0].save()
        result = tracer.result.save()
    assert h.shape[0] == 6
    assert result.prompt_token_ids == PROMPT


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([1] * 200, {}, "200 tokens; max_model_len is 128"),
        ([1] * 100, {}, "100 tokens, max_num_batched_tokens is 64"),
        ([10**6], {}, "isn't in the vocabulary"),
        (["a", "b"], {}, "several prompts"),
        (object(), {}, "a prompt is text"),
        ({"multi_modal_data": 1, "prompt": "x"}, {}, "multi_modal_data"),
        (PROMPT, {"temperature": -1}, "temperature"),
        (PROMPT, {"no_such_argument": 1}, "no_such_argument"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"seed": "x"}, "seed"),
        (PROMPT, {"logprobs": 10**6}, "logprobs"),
        (PROMPT, {"logit_bias": {9000: 1.0}}, "9000"),
        (b"ab", {}, "not bytes"),
    ],
)
def test_bad_prompts_and_sampling_are_refused_before_the_engine_sees_them(
    model: VLLM, prompt: object, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdmissionError, match=message), model.trace(prompt, **sampling):
        model.model.layers[0].output[0].mean(0).save()
    assert len(greedy(model).token_ids) == 4


def test_samples_under_structured_outputs_are_refused(model: VLLM) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    with pytest.raises(AdmissionError, match="structured outputs"):
        with model.trace(PROMPT, structured_outputs=StructuredOutputsParams(choice=["a", "b"])):
            model.samples.output = 3


def test_a_tensor_crosses_once_an_engine(model: VLLM) -> None:
    matrix = torch.randn(128, 128 * 160) / 100  # 10 MB
    engine: Any = model._engine
    before = engine.store()["received_bytes"]
    for _ in range(2):
        with model.trace(temperature=0.0, max_tokens=2) as tracer:
            for _ in range(32):
                with tracer.invoke(PROMPT):
                    h = model.model.layers[0].output[0]
                    h[:] += (h @ matrix)[:, :128]
    received = engine.store()["received_bytes"] - before
    assert matrix.nbytes <= received < matrix.nbytes + 1000


def many(model: VLLM) -> None:
    """Forty requests on 32 seats and 64 tokens a step: some run, some wait, plain prompts come in pieces; with constants."""
    with model.trace(temperature=1.0, max_tokens=50, ignore_eos=True) as tracer:
        for number in range(40):
            with tracer.invoke([number + 3] * (100 if number % 8 == 0 else 20), n=1 + (number % 5 == 0)):
                if number % 8:
                    h = model.model.layers[0].output[0]
                    h += torch.full((128,), float(number % 3))
                    h.save()


@pytest.mark.parametrize("when", ["step 0", "step 1", "step 2", "step 7", "request 0", "request 20"])
def test_an_interruption_leaves_nothing_behind(model: VLLM, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Before the first token, in the middle of prompts, with requests that wait, and while they are sent."""
    expected = greedy(model).token_ids
    what, _, number = when.partition(" ")
    engine, name = model.llm.llm_engine, "step" if what == "step" else "add_request"
    original, calls = getattr(engine, name), iter(range(1000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == int(number):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            many(model)
    model.check_integrity()
    processor = engine.output_processor
    assert not processor.request_states and not processor.parent_requests and not processor.external_req_ids
    front: Any = model._engine
    assert front.tensors.in_use == 0 and not front.collector.pending
    assert greedy(model).token_ids == expected


def test_two_threads_trace_at_once(model: VLLM) -> None:
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        with model.trace([number + 1, 5, 9], temperature=0.0, max_tokens=3):
            value = model.model.layers[1].output[0].save()
        found[number] = value

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        with model.trace([number + 1, 5, 9], temperature=0.0, max_tokens=3):
            alone = model.model.layers[1].output[0].save()
        torch.testing.assert_close(found[number], alone)


def test_an_error_in_the_block_runs_nothing(model: VLLM) -> None:
    with pytest.raises(ZeroDivisionError), model.trace(PROMPT, temperature=0.0):
        model.model.layers[0].output[0].save()
        _ = 1 / 0
    assert len(greedy(model).token_ids) == 4


def test_plain_use_of_the_llm_beside_traces(model: VLLM) -> None:
    from vllm import SamplingParams

    outputs = model.llm.generate(
        {"prompt_token_ids": PROMPT}, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False
    )
    assert list(outputs[0].outputs[0].token_ids) == greedy(model).token_ids


def test_logs_are_printed_with_their_values(model: VLLM, capsys: pytest.CaptureFixture[str]) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1) as tracer:
        nv.log("token", model.samples.output)
        result = tracer.result.save()
    assert capsys.readouterr().out.strip() == f"token tensor([{result.token_ids[0]}])"
    assert tracer.logs == [f"token tensor([{result.token_ids[0]}])"]


def test_named_results_keep_their_names(model: VLLM) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        top = model.logits.output.topk(2).save()
    assert top.values.shape == top.indices.shape == (1, 2)
    assert torch.equal(top[0], top.values)


def test_a_constant_in_shared_memory_is_taken_as_it_is_at_each_use(model: VLLM) -> None:
    memory = np.zeros(128, dtype=np.float32)
    tensor = torch.from_numpy(memory)
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        h = model.model.layers[0].output[0]
        x = (h[0] * 0 + tensor).save()
        memory += 1
        y = (h[0] * 0 + tensor).save()
    assert (float(x[0]), float(y[0])) == (0.0, 1.0)


def test_values_of_a_failed_trace_say_that_it_failed(model: VLLM) -> None:
    with pytest.raises(KeyError), model.trace(PROMPT, max_tokens=1):
        a = model.logits.output.save()
        raise KeyError
    with pytest.raises(ValueNotSetError, match="its trace failed"):
        print(a + 1)


def test_a_constant_that_cannot_travel_is_refused_with_the_line(model: VLLM) -> None:
    with (
        pytest.raises(RefusedError, match=r"sparse_coo float32 tensor.*test_requests"),
        model.trace(PROMPT, max_tokens=1),
    ):
        model.logits.output + torch.ones(1, 500).to_sparse()


def test_the_store_of_constants_is_never_changed_by_a_graph(model: VLLM) -> None:
    table = torch.randn(500, 4)
    graph = Graph(
        Block(
            [
                Const(0, digest(safetensors.torch.save({"tensor": table}))),
                Op(1, "nn.relu", [Ref(0), True]),
                Op(2, "nn.dropout", [Ref(0), 0.9, True, True]),
            ]
        )
    )
    with model.trace(PROMPT, max_tokens=1):
        sent: Any = F.embedding(model.model.embed_tokens.input, table)
        sent.save()
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, extra_args=encode_extras(RequestExtras([encode(graph)])))
    model.llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    with model.trace(PROMPT, max_tokens=1):
        rows: Any = F.embedding(model.model.embed_tokens.input, table)
        rows = rows.save()
    assert torch.equal(rows, table[PROMPT])
    with pytest.raises(RefusedError, match="max_norm"), model.trace(PROMPT, max_tokens=1):
        F.embedding(model.model.embed_tokens.input, table, max_norm=0.1)
