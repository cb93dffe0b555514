"""The command `nnsight-vllm`: what it puts into vLLM's arguments, and what it refuses before anything starts."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable

import pytest

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.server import cli


@pytest.fixture
def prepared(tiny_checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """vLLM's arguments after `nnsight-vllm serve CHECKPOINT ...`."""
    monkeypatch.setenv("VLLM_PLUGINS", "")  # the command changes it

    def prepare(*more: str, model: str = "") -> Namespace:
        parser = cli._parser()
        args: Namespace = parser.parse_args(list(more))
        args.model = model or tiny_checkpoint("llama")
        cli.prepare(args, {name: parser.get_default(name) for name in vars(args)})
        return args

    return prepare


def test_vllm_gets_our_worker_scheduler_and_plugin(prepared: Callable[..., Namespace]) -> None:
    args = prepared("--max-num-seqs", "7", "--sites", "blocks")
    assert "nnsight_vllm" in args.worker_cls and "nnsight_vllm" in str(args.scheduler_cls)
    assert args.max_num_seqs == 7
    assert "blocks" in str(args.additional_config)
    assert "nnsight_vllm" in os.environ["VLLM_PLUGINS"].split(",")


def test_it_binds_to_loopback_unless_told(prepared: Callable[..., Namespace]) -> None:
    assert prepared().host == "127.0.0.1"
    assert prepared("--host", "0.0.0.0").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-server-count", "2"], "--api-server-count 2"),
        (["--headless"], "--headless"),
        (["--tensor-parallel-size", "2"], "tensor"),
        (["--max-program-seconds", "0"], "--max-program-seconds"),
        (["--tenants", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_can_not_be_served_is_refused_by_name(
    prepared: Callable[..., Namespace], arguments: list[str], message: str
) -> None:
    with pytest.raises(EngineSettingError, match=message):
        prepared(*arguments)


def test_a_checkpoint_that_is_not_there_is_refused(prepared: Callable[..., Namespace]) -> None:
    with pytest.raises(EngineSettingError, match="nowhere"):
        prepared(model="/nowhere/at/all")


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["sing"], 2), (["--help"], 0)])
def test_without_a_command_it_says_what_there_is(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == status
    assert "nnsight-vllm serve MODEL" in capsys.readouterr().out
