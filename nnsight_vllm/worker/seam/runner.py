"""What differs between vLLM's two model runners, and what a runner tells the seam."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nnsight_vllm.wire.step_output import Ints


@dataclass(frozen=True)
class Batch:
    """A step as its runner laid it out. `ids` in the order of the batch; `logits`: see `Step`."""

    ids: list[str]
    starts: Ints
    positions: Ints
    logits: Ints | None


class Steps(Protocol):
    """The seam, as a runner sees it: what it knows of the step at hand, and what it wants to be told."""

    has_graphs: bool
    drafts: Mapping[str, list[int]]

    def begin(self, batch: Batch) -> None: ...

    def sample(self, sample: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...


class Runner(Protocol):
    """One of vLLM's model runners, which is `raw`."""

    raw: Any

    def attach(self, steps: Steps) -> None:
        """Have `begin` called before a forward of a step with graphs, which is no captured one, and `sample` around sampling."""

    def known_requests(self) -> Collection[str]:
        """Requests that the runner has state of."""

    def emitting(self) -> list[str]:
        """Requests that get a token in this step: a chunk of a prompt gets none."""

    def wants_logprobs(self) -> bool:
        """Whether anybody in this step does."""

    def reported_line(self, at: int, width: int) -> int:
        """Where the logprob of a request's first token is; `at` its place in the batch, `width` most tokens of a request."""

    def trial(self, num_rows: int) -> Tensor:
        """The hidden states of a forward over padding, outside of captured graphs, that writes no key or value."""


def forgo_captured(owner: Any, name: str, steps: Steps, keyword: str) -> None:
    """Have the function that chooses how a step runs told not to replay a captured graph in a step with graphs of ours."""

    def chosen(choose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return choose(*args, **(kwargs | {keyword: True} if steps.has_graphs else kwargs))

    wrap(owner, name, chosen)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace an instance's method by `around(original, ...)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    if isinstance(owner, nn.Module):
        owner.__dict__[name] = wrapped
    else:
        setattr(owner, name, wrapped)
