"""What the engine hands over: new requests, and the rows of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnsight_vllm.graph.links import Links
from nnsight_vllm.wire.step_output import Ints


@dataclass(frozen=True)
class Arrival:
    """A new request as the engine hands it over. `prompt_length` in tokens; `graph` as msgpack bytes, or several in order.

    `refuse_samples`: why the sampled token can't be replaced, empty where it can. `links`: those to requests of its bundle.
    """

    request_id: str
    graph: bytes | Sequence[bytes]
    prompt_length: int
    seed: int
    refuse_samples: str = ""
    links: Links | None = None

    @property
    def graphs(self) -> list[bytes]:
        return list(self.graph) or [b""] if isinstance(self.graph, list | tuple) else [self.graph]  # type: ignore[list-item]


@dataclass(frozen=True)
class Step:
    """The rows of one step. `ids`: its requests in the order of the batch, `index` the same the other way round.

    Request i has rows `starts[i] : starts[i + 1]` of the step, the first at `positions[i]` of the request. Where each
    request has one row, that's row i; among the logits row `logits[i]`, where others have drafts to verify.
    """

    index: Mapping[str, int]
    starts: Ints
    positions: Ints
    logits: Ints | None = None

    @classmethod
    def of(cls, ids: Iterable[str], starts: Ints, positions: Ints) -> Step:
        return cls({id: i for i, id in enumerate(ids)}, starts, positions)

    def rows(self, at: int, at_logits: bool) -> slice:
        """The rows of the request at this place in the batch."""
        if not at_logits:
            return slice(int(self.starts[at]), int(self.starts[at + 1]))
        row = at if self.logits is None else int(self.logits[at])
        return slice(row, row + 1)

    def logits_rows(self, at: Ints) -> Ints:
        """The one row that each request at these places has among the logits."""
        return at if self.logits is None else self.logits[at]

    def after_logits(self) -> Step:
        """The same step from where tokens are drawn: those have a row a request, drafts or not."""
        return self if self.logits is None else replace(self, logits=None)


NO_STEP = Step.of((), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
"""Between steps."""
