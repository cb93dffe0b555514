"""What graphs are kept from: settings refused at start, the prefix cache, sites that aren't instrumented."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nnsight_vllm import VLLM
from nnsight_vllm.errors import EngineSettingError, RefusedError
from nnsight_vllm.frontend.settings import engine_arguments

if TYPE_CHECKING:
    from conftest import Engines

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
PROMPT = [5 + i % 90 for i in range(70)]


@pytest.mark.parametrize(
    "setting",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"speculative_config": {"method": "eagle3", "model": "somewhere", "num_speculative_tokens": 2}},
        {"speculative_config": {"model": "somewhere", "num_speculative_tokens": 2}},
        {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
        {"spec_method": "mtp"},
        {"spec_model": "somewhere"},
        {"enable_lora": True},
        {"enable_dbo": True},
        {"kv_sharing_fast_prefill": True},
        {"long_prefill_token_threshold": 32},
        {"worker_cls": "somewhere.Worker"},
        {"scheduler_cls": "somewhere.Scheduler"},
        {"runner": "pooling"},
    ],
)
def test_a_setting_that_graphs_do_not_support_is_refused_by_name_before_the_engine_starts(
    setting: dict[str, Any],
) -> None:
    (name,) = setting
    with pytest.raises(EngineSettingError, match=name):
        VLLM("no-such-checkpoint", **setting)


@pytest.mark.parametrize("chosen", ["0", "1"])
def test_the_users_choice_of_a_model_runner_stays(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv(RUNNER, chosen)
    engine_arguments({}, "all")
    assert os.environ[RUNNER] == chosen


def test_on_a_cpu_the_v1_runner_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNNER, "")
    monkeypatch.delenv(RUNNER)
    engine_arguments({}, "all")
    assert os.environ[RUNNER] == "0"


@pytest.mark.parametrize("sites", ["block", "model.layers.*", "", 3, None, [1], ["model.layers.0", ""], {"model": 1}])
def test_sites_that_no_model_could_have_are_refused_by_value_before_the_engine_starts(sites: Any) -> None:
    with pytest.raises(EngineSettingError, match=re.escape(f"sites={sites!r}: ")):
        VLLM("no-such-checkpoint", sites=sites)


def test_a_pattern_that_matches_nothing_is_refused_by_name(tiny_checkpoint: Callable[[str], str]) -> None:
    model = VLLM(tiny_checkpoint("llama"), sites=["model.layer.*"], enforce_eager=True, max_model_len=128)
    with pytest.raises(EngineSettingError, match=r"'model\.layer\.\*' matches no module.*'model\.layers\.0' is one"):
        _ = model.llm


@pytest.mark.parametrize("limits", [{"second": 1}, {"trips": 0}, {"value_bytes": "1 GiB"}, {"work": 0.5}])
def test_a_limit_that_there_is_not_is_refused_by_name_before_the_engine_starts(limits: dict[str, Any]) -> None:
    (name,) = limits
    with pytest.raises(EngineSettingError, match=name):
        VLLM("no-such-checkpoint", limits=limits)


@pytest.mark.parametrize("path", ["/no/such/checkpoint", "./no-such", "~/no-such"])
def test_a_checkpoint_that_is_not_there_is_refused_by_path(path: str) -> None:
    with pytest.raises(EngineSettingError, match=re.escape(repr(path))):
        VLLM(path)


def test_a_name_that_no_model_hub_gives_is_refused_by_name() -> None:
    model = VLLM("no-such-checkpoint")
    with pytest.raises(EngineSettingError, match="no checkpoint 'no-such-checkpoint'"):
        _ = model.llm


def test_the_users_additional_config_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNNER, "0")
    arguments = engine_arguments({"additional_config": {"mine": 1}, "seed": 3}, ["b", "a"])
    assert arguments["additional_config"] == {"mine": 1, "nnsight_vllm": {"sites": ["a", "b"]}}
    assert arguments["seed"] == 3


def test_edited_state_never_reaches_the_prefix_cache_of_others(
    engines: Engines, tiny_checkpoint: Callable[[str], str]
) -> None:
    model = engines(
        tiny_checkpoint("llama"), enforce_eager=True, max_model_len=128, max_num_batched_tokens=128, block_size=32
    )

    def plain() -> Any:
        with model.trace(PROMPT, temperature=0.0, max_tokens=4, logprobs=1) as tracer:
            result = tracer.result.save()
        return result

    def edited() -> tuple[Any, torch.Tensor]:
        with model.trace(PROMPT, temperature=0.0, max_tokens=4) as tracer:
            model.model.layers[0].output[0][:] += 1
            h = model.model.layers[1].output[0].save()
            result = tracer.result.save()
        return result, h

    model.llm.reset_prefix_cache()
    first, h1 = edited()
    before, again = plain(), plain()
    second, h2 = edited()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    assert (before.num_cached_tokens, again.num_cached_tokens) == (0, 64)
    assert before.token_ids == again.token_ids
    assert torch.equal(h1, h2)
    assert h1.shape[0] == len(PROMPT)
    model.check_integrity()


def test_a_site_that_is_not_instrumented_is_refused_with_the_advice(
    engines: Engines, tiny_checkpoint: Callable[[str], str]
) -> None:
    model = engines(tiny_checkpoint("llama"), enforce_eager=True, max_model_len=128, sites=("model.layers.1.mlp",))
    with model.trace(PROMPT, max_tokens=1):
        kept = model.model.layers[1].mlp.output.save()
        logits = model.logits.output.save()
    assert (kept.shape, logits.shape[0]) == ((70, 128), 1)
    with pytest.raises(RefusedError, match="sites="), model.trace(PROMPT, max_tokens=1):
        model.model.layers[0].mlp.output.save()
    model.check_integrity()


def test_an_engine_can_be_closed_and_used_again(tiny_checkpoint: Callable[[str], str]) -> None:
    with VLLM(tiny_checkpoint("llama"), dtype="float32", enforce_eager=True, max_model_len=128, dispatch=True) as model:
        first = model._lazy
        assert "LlamaForCausalLM" in repr(model)
    assert first is model._lazy
    assert first._running is None
