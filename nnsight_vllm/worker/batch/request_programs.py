"""Several programs of one request: edits, its own, and the one that collects its values.

They run side by side, each at its own point, and share what the request is: its id, its results, its end. Where several
wait for the same site they run in their order, so a later one sees what an earlier one wrote. When one stops or fails,
the request is over: those that send something home end at once, while those that only edit go on as long as the engine
computes rows for the request, so that all rows are edited alike (the prefix cache keeps them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnsight_vllm.errors import GraphError
from nnsight_vllm.wire.extras import MAX_PROGRAMS

if TYPE_CHECKING:
    from nnsight_vllm.worker.batch.requests import EngineRequest, Status


class RequestPrograms:
    """The programs of one request, in order. `ended` collects the requests that end in a step."""

    def __init__(self, ended: set[RequestPrograms]) -> None:
        self.units: list[EngineRequest] = []
        self.is_over = False
        self._ended = ended

    def end(self, status: Status) -> None:
        """One of them stopped or failed."""
        if self.is_over:
            return
        self.is_over = True
        self._ended.add(self)
        for unit in self.units:
            if not unit.program.is_quiet:
                unit.finish(status)

    def reopen(self) -> None:
        """What it had to say of its end is withdrawn: something else is to be said."""
        self.is_over = False


def check_names(units: Sequence[EngineRequest]) -> None:
    """Raise `GraphError` if two programs of a request send home under one name, or if there are too many."""
    if len(units) > MAX_PROGRAMS:
        raise GraphError(f"a request carries {len(units)} graphs; the limit is {MAX_PROGRAMS}")
    seen: set[str] = set()
    for unit in units:
        if both := seen & unit.program.saves:
            raise GraphError(f"two graphs of the request save under the name {min(both)!r}")
        seen |= unit.program.saves
