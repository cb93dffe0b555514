"""Who asks: a tenant has a name and keys. Without any key the server has one tenant, whose name is empty."""

from __future__ import annotations

import hashlib
import secrets
import tomllib
from argparse import Namespace
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Request

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.names import NAME, NAME_RULE


class Tenants:
    """`keys`: the tenant's name by key. Only digests are compared."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = dict(keys)
        self._digests = [(_digest(key), name) for key, name in keys.items()]

    @classmethod
    def from_args(cls, args: Namespace) -> Tenants:
        """Of `--tenants` and of vLLM's `--api-key`, in whose place VLLM_API_KEY may be. Raises `EngineSettingError`."""
        import vllm.envs as envs

        keys = {} if args.tenants is None else _read(Path(args.tenants))
        for key in filter(None, args.api_key or [envs.VLLM_API_KEY]):
            keys.setdefault(key, f"key-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
        return cls(keys)

    @property
    def all_keys(self) -> list[str]:
        """The keys that vLLM lets in."""
        return list(self._keys)

    def of(self, raw_request: Request) -> str:
        """The tenant's name. Raises `Refused` with status 401; takes as long for any key."""
        if not self._digests:
            return ""
        scheme, _, key = raw_request.headers.get("authorization", "").partition(" ")
        given, found = _digest(key), None
        for known, name in self._digests:
            if secrets.compare_digest(given, known):
                found = name
        if found is None or scheme.lower() != "bearer":
            raise Refused(
                "expected a key of this server as `Authorization: Bearer KEY`",
                status=HTTPStatus.UNAUTHORIZED,
                kind="AuthenticationError",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def add_arguments(group: Any) -> None:
    """The flag of the file, to an argparse group."""
    group.add_argument("--tenants", default=None, help='a TOML file of tenants: a line `name = ["key", ...]` each')


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(path: Path) -> dict[str, str]:
    where = f"--tenants {path}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of TOML and of UTF-8, too
        raise EngineSettingError(f"{where}: {error}") from None
    found: dict[str, str] = {}
    for name, keys in table.items():
        _check_tenant(name, keys, where)
        for other in (found[key] for key in keys if found.setdefault(key, name) != name):
            raise EngineSettingError(f"{where}: {other!r} and {name!r} have a key in common")
    if not found:
        raise EngineSettingError(f"{where}: it names no tenant")
    return found


def _check_tenant(name: str, keys: object, where: str) -> None:
    if not NAME.fullmatch(name) or name.startswith("key-"):
        raise EngineSettingError(f"{where}: {NAME_RULE} and doesn't begin with 'key-'; got {name!r}")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key.strip() for key in keys):
        raise EngineSettingError(f'{where}: expected `{name} = ["key", ...]` with keys that aren\'t empty')
