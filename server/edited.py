"""Models that are the served one with a standing intervention. Plain clients name one as `BASE:name`, its tenant only.

In a folder each is a file, which is whole or isn't there; without a folder they end with the server.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec

from nnsight_vllm.errors import EngineSettingError, UnknownEditError
from nnsight_vllm.graph.codec import digest
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.names import nearest
from nnsight_vllm.server.schema import Intervention


@dataclass(frozen=True)
class EditedModel:
    """`tensors` by digest; `references`: the digest of what a name meant when the model was made, whatever it means now."""

    name: str
    intervention: Intervention
    tensors: dict[str, bytes]
    references: dict[str, str] = field(default_factory=dict)

    def tensor_of(self, reference: str, param: str) -> tuple[str, bytes]:
        """Digest and bytes. Raises `Refused`."""
        name = self.references.get(reference, reference)
        if name not in self.tensors:
            raise Refused(f"the edited model has no tensor {reference[:64]!r}", param)
        return name, self.tensors[name]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    tenant: str
    name: str
    intervention: str  # JSON
    tensors: dict[str, bytes]
    references: dict[str, str]


class EditedModels:
    """All tenants'. Raises `EngineSettingError` that names the file which can't be read. Any thread may use it."""

    def __init__(self, directory: str | Path | None) -> None:
        self._directory = None if directory is None else Path(directory)
        self._models: dict[str, dict[str, EditedModel]] = {}  # by tenant and name
        self._lock = threading.Lock()
        if self._directory is not None:
            self._load(self._directory)

    def get(self, tenant: str, name: str) -> EditedModel | None:
        return self._models.get(tenant, {}).get(name)

    def put(self, tenant: str, model: EditedModel, most: int | None = None) -> None:
        """Keep it, in the place of an earlier one of its name. Raises `Refused` where the tenant has `most` others."""
        with self._lock:
            known = self._models.setdefault(tenant, {})
            if most is not None and model.name not in known and len(known) >= most:
                raise Refused(f"{len(known)} edited models; the limit is {most}", "name", kind="AdmissionError")
            if self._directory is not None:
                _write(self._directory / _file_name(tenant, model.name), tenant, model)
            self._models[tenant] = {**known, model.name: model}

    def delete(self, tenant: str, name: str) -> None:
        """Forget it. Raises `Refused` with status 404. Requests that run keep it."""
        with self._lock:
            known = dict(self._models.get(tenant, {}))
            if known.pop(name, None) is None:
                raise self._unknown(tenant, name)
            if self._directory is not None:
                (self._directory / _file_name(tenant, name)).unlink(missing_ok=True)
            self._models[tenant] = known

    def known(self, tenant: str, name: str) -> EditedModel:
        """Raises `Refused` with status 404, which names near ones of the tenant's."""
        found = self.get(tenant, name)
        if found is None:
            raise self._unknown(tenant, name)
        return found

    def cards(self, tenant: str, base_names: list[str], vllm_cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """vLLM's cards, and one like the base's for each of the tenant's edited models."""
        base = base_names[0]
        like = next((card for card in vllm_cards if card["id"] == base), {"object": "model"})
        ours = [{**like, "id": f"{base}:{one.name}", "parent": base} for one in self.list(tenant)]
        return [*vllm_cards, *ours]

    def _unknown(self, tenant: str, name: str) -> Refused:
        message = f"no edited model {name[:64]!r}{nearest(name, self._models.get(tenant, {}))}"
        return Refused(message, "name", status=HTTPStatus.NOT_FOUND, kind=UnknownEditError.__name__)

    def _load(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            paths = sorted(directory.glob("*.msgpack"))
        except OSError as error:
            raise EngineSettingError(f"--edits-dir {directory}: {error}") from None
        for path in paths:
            try:
                tenant, model = _read(path)
            except (OSError, ValueError) as error:  # of msgspec and pydantic, too
                raise EngineSettingError(f"--edits-dir: {path} can't be read: {error}") from None
            self._models.setdefault(tenant, {})[model.name] = model

    def list(self, tenant: str) -> list[EditedModel]:
        return list(self._models.get(tenant, {}).values())


def _file_name(tenant: str, name: str) -> str:
    return f"{hashlib.sha256(f'{tenant}/{name}'.encode()).hexdigest()}.msgpack"  # no tenant's name has a slash


def _write(path: Path, tenant: str, model: EditedModel) -> None:
    intervention = model.intervention.model_dump_json(exclude_unset=True)
    data = msgspec.msgpack.encode(_File(tenant, model.name, intervention, model.tensors, model.references))
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> tuple[str, EditedModel]:
    file = msgspec.msgpack.decode(path.read_bytes(), type=_File)
    if path.name != _file_name(file.tenant, file.name):
        raise ValueError(f"it is the file of another model, {file.name!r}")
    for name, data in file.tensors.items():
        if digest(data) != name:
            raise ValueError(f"the tensor {name} is damaged")
    intervention = Intervention.model_validate_json(file.intervention)
    return file.tenant, EditedModel(file.name, intervention, file.tensors, file.references)
