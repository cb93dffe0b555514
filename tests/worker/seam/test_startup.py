"""What the worker asks of vLLM before anything runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vllm

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.worker.seam import startup


def test_another_vllm_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(EngineSettingError, match=r"vLLM 0\.32\.\*; this is 0\.33\.1"):
        startup.require_supported()


def test_the_fingerprint_enters_what_vllm_hashes_and_other_settings_stay() -> None:
    config = SimpleNamespace(additional_config={"other": 1, "nnsight_vllm": {"sites": "all"}})
    startup.salt_compile_cache(config, "f00")
    assert config.additional_config == {"other": 1, "nnsight_vllm": {"sites": "all", "fingerprint": "f00"}}


def test_a_worker_without_our_settings_says_what_it_needs() -> None:
    with pytest.raises(EngineSettingError, match="additional_config needs"):
        startup.settings_of(SimpleNamespace(additional_config=None))
