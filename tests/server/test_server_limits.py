"""Limits as flags, and how many requests of a tenant run at a time."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
from prometheus_client import REGISTRY

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.server import limits, metrics
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.limits import Concurrent, ServerLimits


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    limits.add_arguments(parser.add_argument_group("interventions"))
    return parser.parse_args(arguments)


def test_without_flags_they_are_the_defaults() -> None:
    assert ServerLimits.from_args(parsed()) == ServerLimits()


def test_each_limit_has_a_flag() -> None:
    names = [one.name for one in dataclasses.fields(ServerLimits)]
    arguments = [part for name in names for part in (f"--max-{name.replace('_', '-')}", "7")]
    assert set(dataclasses.asdict(ServerLimits.from_args(parsed(*arguments))).values()) == {7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-graph-nodes", "0"], "--max-graph-nodes 0: expected at least 1"),
        (["--max-result-seconds", "-1"], "--max-result-seconds -1: expected at least 1"),
        (["--max-saved-bytes", "9", "--max-saved-bytes-in-all", "8"], "--max-saved-bytes 9: .*in-all, which is 8"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(EngineSettingError, match=message):
        ServerLimits.from_args(parsed(*arguments))


def test_the_engine_gets_its_own() -> None:
    given: Any = ServerLimits(saved_bytes=3, saved_bytes_in_all=4, program_seconds=5, loop_trips=6).of_engine()[
        "limits"
    ]
    assert (given["request"], given["engine"], given["seconds"], given["trips"]) == (3, 4, 5, 6)


def test_the_engines_defaults_are_the_servers() -> None:
    from nnsight_vllm.wire.limits import Limits, limits_of

    given: Any = ServerLimits().of_engine()["limits"]
    assert limits_of(given) == Limits()
    assert {one.name for one in dataclasses.fields(Limits)} - set(given) == {"work"}  # it depends on the device


def test_no_flag_is_one_of_vllms() -> None:
    from nnsight_vllm.server.cli import _parser

    assert (
        ServerLimits.from_args(_parser().parse_args([])) == ServerLimits()
    )  # argparse raises for a flag that is there already


def test_a_full_tenant_waits_and_another_does_not() -> None:
    concurrent = Concurrent(1)
    with concurrent.enter("a"):
        with pytest.raises(Refused) as refused, concurrent.enter("a"):
            pass
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        with concurrent.enter("b"):
            assert concurrent.running == {"a": 1, "b": 1}
    assert concurrent.running == {}
    with concurrent.enter("a"):
        assert concurrent.running == {"a": 1}


def test_what_fails_is_no_longer_counted() -> None:
    concurrent = Concurrent(1)
    with pytest.raises(KeyError), concurrent.enter("a"):
        raise KeyError
    assert concurrent.running == {}


def test_requests_and_their_graphs_are_counted() -> None:
    names = ("nnsight_requests_with_graphs_total", "nnsight_graphs_total")
    before = [REGISTRY.get_sample_value(name) or 0 for name in names]
    metrics.count_request((b"a", b"b"))
    assert [REGISTRY.get_sample_value(name) for name in names] == [before[0] + 1, before[1] + 2]


def test_the_gauge_follows_what_runs() -> None:
    before = REGISTRY.get_sample_value("nnsight_running") or 0
    with Concurrent(2).enter("a"):
        assert REGISTRY.get_sample_value("nnsight_running") == before + 1
    assert REGISTRY.get_sample_value("nnsight_running") == before
