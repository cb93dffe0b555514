"""The code of the language's reference pages for vLLM runs as written, but for the model's name and the imports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nnsight_vllm as nnsight
from nnsight_vllm.errors import GradientsUnavailable, OutOfOrderError

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM


@pytest.fixture
def vllm(engines: Engines, smollm2: str) -> Iterator[VLLM]:
    model = engines(smollm2, dtype="auto", max_model_len=1024)
    yield model
    model.check_integrity()


def test_clean_and_corrupted_logits(vllm: VLLM) -> None:
    with vllm.trace(temperature=0.0, top_p=1.0, max_tokens=1) as tracer:
        with tracer.invoke("The Eiffel Tower is located in the city of"):
            clean_logits = vllm.logits.output.save()

        with tracer.invoke("The Eiffel Tower is located in the city of"):
            vllm.model.layers[-2].mlp.output[:] = 0
            corrupted_logits = vllm.logits.output.save()

    assert vllm.tokenizer.decode(clean_logits.argmax(dim=-1)) == " Paris"
    assert clean_logits.shape == corrupted_logits.shape
    assert not torch.equal(clean_logits, corrupted_logits)


def test_the_samples_then_logits_loop(vllm: VLLM) -> None:
    with vllm.trace(
        "Madison Square Garden is located in the city of", temperature=0.8, top_p=0.95, max_tokens=3
    ) as tracer:
        samples = nnsight.list().save()
        logits = nnsight.list().save()

        for _ii in range(3):
            samples.append(vllm.samples.output)
            vllm.samples.next()
            logits.append(vllm.logits.output)
            vllm.logits.next()

        result = tracer.result.save()

    assert [int(token) for token in samples] == result.token_ids
    assert [tuple(row.shape) for row in logits] == [(1, 49152)] * 3


def test_all_iterations_of_the_logits_are_as_many_as_the_tokens(vllm: VLLM) -> None:
    with vllm.trace("Hello World!", max_tokens=10, ignore_eos=True):
        logits = nnsight.list().save()
        with vllm.logits.all():
            logits.append(vllm.logits.output)

    assert len(logits) == 10


def test_next_gives_the_prompt_then_single_tokens(vllm: VLLM) -> None:
    with vllm.generate("The Eiffel Tower is in the city of", max_new_tokens=3, temperature=0.0):
        hidden_states1 = vllm.model.layers[-1].output[0].save()
        hidden_states2 = vllm.model.layers[-1].next().output[0].save()
        hidden_states3 = vllm.model.layers[-1].next().output[0].save()

    assert [len(h) for h in (hidden_states1, hidden_states2, hidden_states3)] == [9, 1, 1]


def test_the_old_loop_over_next_with_a_later_layer(vllm: VLLM) -> None:
    layers = vllm.model.layers
    hidden_states = []
    with vllm.generate("The Eiffel Tower is in the city of", max_new_tokens=3):
        for _i in range(3):
            layers[0].output[0][:] = 0
            hidden_states.append(layers[-1].output.save())
            layers[0].next()

    assert [len(h[0]) for h in hidden_states] == [9, 1, 1]


def test_noise_is_added_in_place(vllm: VLLM) -> None:
    with vllm.trace("The Eiffel Tower is in the city of", max_tokens=1):
        hidden_states_pre = vllm.model.layers[-1].output[0].clone().save()
        noise = (0.001**0.5) * torch.randn(hidden_states_pre.shape)
        vllm.model.layers[-1].output[0][:] = hidden_states_pre + noise
        hidden_states_post = vllm.model.layers[-1].output[0].save()

    expected = (hidden_states_pre + noise).to(hidden_states_post.dtype)
    torch.testing.assert_close(hidden_states_post, expected)


def test_conditions_with_cond_and_with_if(vllm: VLLM) -> None:
    with vllm.trace("The Eiffel Tower is in the city of", max_tokens=1) as tracer:
        number = vllm.samples.output[0]
        with tracer.cond(number % 2 == 0):
            tracer.log("even")
        with tracer.cond(number % 2 == 1):
            tracer.log("odd")
        if number % 2 == 0:
            tracer.log("even")
        if number % 2 == 1:
            tracer.log("odd")
        saved = number.save()
    assert tracer.logs == [["even", "odd"][int(saved) % 2]] * 2


def test_modules_applied_out_of_order_and_a_softmax(vllm: VLLM) -> None:
    with vllm.trace("The Eiffel Tower is in the city of", max_tokens=1, temperature=0.0) as tracer:
        hidden_states = vllm.model.layers[-1].output[0]
        hidden_states = vllm.lm_head(vllm.model.norm(hidden_states)).save()
        tokens: Any = torch.softmax(hidden_states, dim=-1).argmax(dim=-1)
        tokens = tokens.save()
        result = tracer.result.save()
    assert hidden_states.shape == (9, 49152)
    assert int(tokens[-1]) == result.token_ids[0]


def test_an_edited_clone_and_an_assignment(vllm: VLLM) -> None:
    with vllm.trace("The Eiffel Tower is in the city of", max_tokens=1):
        l1_output_before = vllm.model.layers[1].mlp.output.save()
        edited_tensor = vllm.model.layers[1].mlp.output.clone().save()
        edited_tensor[:, 0] = 0
        vllm.model.layers[1].mlp.output = edited_tensor
        l1_output_after = vllm.model.layers[1].mlp.output.save()
    assert torch.equal(l1_output_after[:, 1:], l1_output_before[:, 1:])
    assert bool((l1_output_after[:, 0] == 0).all())
    assert bool((l1_output_before[:, 0] != 0).any())


def test_the_two_layers_in_the_wrong_order(vllm: VLLM) -> None:
    with pytest.raises(OutOfOrderError):
        with vllm.trace("The Eiffel Tower is in the city of", max_tokens=1):
            l2_output = vllm.model.layers[2].output.save()
            l1_output = vllm.model.layers[1].output.save()
        print("Layer1:", l1_output)
        print("Layer2:", l2_output)


def test_gradients_are_refused(vllm: VLLM) -> None:
    with pytest.raises(GradientsUnavailable), vllm.trace("The Eiffel Tower", max_tokens=1):
        vllm.logits.output.sum().backward()


def test_the_prompts_embeddings_of_one_trace_replace_those_of_another(vllm: VLLM) -> None:
    prompt, blank = vllm.tokenizer.encode("Madison square garden is located in the city of New"), [28] * 11
    with vllm.generate(prompt, max_new_tokens=3, temperature=0.0) as tracer:
        embeddings = vllm.model.embed_tokens.output.save()
        original = tracer.result.save()
    with vllm.generate(blank[: len(prompt)], max_new_tokens=3, temperature=0.0) as tracer:
        vllm.model.embed_tokens.output = embeddings
        intervened = tracer.result.save()
    assert intervened.token_ids == original.token_ids


def test_the_residual_stream_is_the_sum_of_what_the_blocks_add(vllm: VLLM) -> None:
    with vllm.trace("The Eiffel Tower is in the city of", max_tokens=1, temperature=0.0):
        stream = vllm.model.layers[2].output[0].save()
        attention = vllm.model.layers[3].self_attn.output[0].save()
        mlp = vllm.model.layers[3].mlp.output.save()
        after = vllm.model.layers[3].output[0].save()
        normed = vllm.model.layers[4].input.save()
    torch.testing.assert_close(after.float(), stream.float() + attention.float() + mlp.float(), atol=4.0, rtol=2e-2)
    assert torch.equal(after, normed)
    assert not torch.equal(after, mlp)
