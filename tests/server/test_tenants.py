"""Whose request it is, from its key."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path

import pytest
from fastapi import Request

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.tenants import Tenants


def request(authorization: str | None) -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return Request({"type": "http", "headers": headers})


def made(folder: Path, text: str | None, api_key: list[str] | None = None) -> Tenants:
    if text is None:
        return Tenants.from_args(Namespace(tenants=None, api_key=api_key))
    file = folder / "tenants.toml"
    file.write_text(text)
    return Tenants.from_args(Namespace(tenants=str(file), api_key=api_key))


def test_without_keys_all_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    tenants = made(tmp_path, None)
    assert tenants.all_keys == []
    assert tenants.of(request(None)) == tenants.of(request("Bearer x")) == ""


def test_a_tenant_has_any_number_of_keys(tmp_path: Path) -> None:
    tenants = made(tmp_path, 'alice = ["a", "b"]\nbob = ["c"]')
    assert [tenants.of(request(f"Bearer {key}")) for key in "abc"] == ["alice", "alice", "bob"]
    assert tenants.of(request("bearer a")) == "alice"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer z", "Basic a", "a"])
def test_another_key_is_refused(tmp_path: Path, authorization: str | None) -> None:
    with pytest.raises(Refused) as refused:
        made(tmp_path, 'alice = ["a"]').of(request(authorization))
    assert refused.value.status == 401


def test_an_api_key_is_a_tenant_unless_the_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    tenants = made(tmp_path, 'alice = ["a"]', ["a", "k"])
    assert tenants.all_keys == ["a", "k"]
    assert tenants.of(request("Bearer a")) == "alice"
    assert tenants.of(request("Bearer k")) == f"key-{hashlib.sha256(b'k').hexdigest()[:12]}"
    assert made(tmp_path, None).all_keys == ["of-the-environment"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", "Invalid value"),
        ('"a b" = ["k"]', "got 'a b'"),
        ('key-1 = ["k"]', "doesn't begin with 'key-'"),
        ('a = "k"', r'expected `a = \["key", ...\]`'),
        ('a = [""]', "aren't empty"),
        ("a = []", "expected `a"),
        ('a = ["k"]\nb = ["k"]', "'a' and 'b' have a key in common"),
        ("", "names no tenant"),
    ],
)
def test_a_bad_file_stops_the_start(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EngineSettingError, match=message):
        made(tmp_path, text)


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(EngineSettingError, match=r"--tenants .*No such file"):
        Tenants.from_args(Namespace(tenants=str(tmp_path / "none"), api_key=None))


def test_keys_are_not_printed(tmp_path: Path) -> None:
    assert "secret" not in repr(made(tmp_path, 'alice = ["secret"]'))
