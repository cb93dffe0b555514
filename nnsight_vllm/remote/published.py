"""Named edits of a model that a server runs: each is a model of the server's, too, which plain clients name as `BASE:name`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nnsight_vllm.trace.edits import NamedEdits, RecordedEdit

if TYPE_CHECKING:
    from nnsight_vllm.remote.engine import RemoteEngine


class PublishedEdits(NamedEdits):
    """`engine` gives the one that is connected now."""

    def __init__(self, engine: Callable[[], RemoteEngine]) -> None:
        super().__init__()
        self._engine = engine

    def put(self, edit: RecordedEdit) -> None:
        if edit.name is not None:
            self._engine().publish(edit)
        super().put(edit)

    def __delitem__(self, name: str) -> None:
        self._engine().withdraw(self[name].name or name)
        super().__delitem__(name)
