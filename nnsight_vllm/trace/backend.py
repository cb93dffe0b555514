"""What a trace needs of an engine: check a prompt, run requests, give outcomes. One runs vLLM here, one asks a server's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.results import Failure, Stats
from nnsight_vllm.trace.tree import Tree


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it. `rows` is its number of tokens; `engine` the engine's own form."""

    rows: int
    text: str | None
    engine: Any


@dataclass(frozen=True)
class Request:
    """One request: `graph` is its own, None where it has none; `constants` are the digests of the tensors it names.

    `edits` are graphs that run before its own at each site, `after` those that run behind it. `links` say what it hands to others
    of the same run, and gets from them; the engine fills in which bundle that is. `tenant`: with whose requests it may share what
    its graphs compute.
    """

    prompt: Prompt
    sampling: Any
    graph: bytes | None
    constants: frozenset[str] = frozenset()
    edits: tuple[bytes, ...] = ()
    after: tuple[bytes, ...] = ()
    links: Links | None = None
    tenant: str = ""

    @property
    def graphs(self) -> tuple[bytes, ...]:
        """All of them, in order; a plain request has none."""
        return (*self.edits, *(() if self.graph is None else (self.graph,)), *self.after)


@dataclass
class Completion:
    """One sample of a request."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: Any = None
    cumulative_logprob: float | None = None


@dataclass
class Result:
    """What the engine generated for a request. `text`, `token_ids` and `finish_reason` are those of the first sample."""

    outputs: list[Completion]
    prompt: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: Any = None
    num_cached_tokens: int | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> Any:
        return self.outputs[0].logprobs


@dataclass
class Sample:
    """What one sample's graph sent home."""

    values: dict[str, object] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    failure: Failure | None = None


@dataclass
class Outcome:
    """What became of a request: `samples` has one entry a sample, in the order of `result.outputs`."""

    result: Result
    samples: list[Sample]

    @property
    def is_evicted(self) -> bool:
        """Whether the engine took its memory away, so that running it again may do better."""
        return any(sample.failure is not None and sample.failure.retryable for sample in self.samples)


class Backend(Protocol):
    """An engine as a trace sees it."""

    tree: Tree

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        """The prompt behind the arguments of `trace` or `invoke`. Raises `AdmissionError`."""

    def sampling(self, arguments: dict[str, object]) -> Any:
        """Checked sampling parameters; has `.max_tokens` and `.n`. Raises `AdmissionError`."""

    def admit(self, request: Request, tensors: Mapping[str, bytes]) -> None:
        """Raise `AdmissionError` if the engine can't take this request. `tensors`: its constants."""

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        """Run all requests together and wait for them."""


class ModelBackend(Backend, Protocol):
    """The same as the model's own object sees it. `tokenizer` has at least `encode` and `decode`."""

    tokenizer: Any

    @property
    def llm(self) -> Any:
        """vLLM's own object. Raises `EngineSettingError` where there is none here."""

    def stats(self) -> Stats:
        """What was run so far."""

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if anything is left of requests that have ended."""

    def close(self) -> None:
        """End the engine, or the connection to it."""
