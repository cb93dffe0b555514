"""What a client and a server say to each other about traces: msgpack, but for what is asked before a prompt is recorded (JSON).

The schema is closed: what isn't told here is refused. Graphs are bytes, as the engine takes them; a graph's digests say which
tensors it needs. Nothing names code.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.results import Failure, Value

PREFIX = "/v1/interventions"
MSGPACK = "application/msgpack"
FRAMES = "application/vnd.nnsight-vllm.frames"
"""Pieces of msgpack, each behind its length in four bytes, most significant first: notices, then `Answered` or `Broken`."""

MISSING = "MissingTensors"
"""An error's kind: the server hasn't got tensors that the trace names; they are in the error's `tensors`."""


class Described(Struct, frozen=True):
    """The model: `names` under which it is served, `graph_version` of the graphs that it takes."""

    names: list[str]
    graph_version: int
    catalogue: Catalogue


class Asked(Struct, frozen=True, forbid_unknown_fields=True):
    """Prompts to count the tokens of, and sampling arguments to check."""

    prompts: list[str] = []
    samplings: list[dict[str, Any]] = []


class Settled(Struct, frozen=True):
    """Of sampling arguments, what recording needs to know."""

    max_tokens: int | None
    n: int


class Prepared(Struct, frozen=True):
    """`prompts`: the token ids of each. In the order of what was asked."""

    prompts: list[list[int]]
    samplings: list[Settled]


class SentRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """One request; `sampling` is the index of its arguments. `links` say nothing of a bundle: that is the server's."""

    token_ids: list[int]
    sampling: int
    text: str | None = None
    cache_salt: str | None = None
    graph: bytes | None = None
    edits: list[bytes] = []
    after: list[bytes] = []
    links: Links | None = None


class SentTrace(Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that run together. `tensors`: small ones, as safetensors bytes by digest; the server has the others."""

    requests: list[SentRequest]
    samplings: list[dict[str, Any]]
    tensors: dict[str, bytes] = {}


class Chance(Struct, frozen=True, array_like=True):
    """A token's log probability, its rank, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Chances = list[dict[int, Chance] | None]


class SentCompletion(Struct, frozen=True):
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: Chances | None = None
    cumulative_logprob: float | None = None


class SentSample(Struct, frozen=True):
    values: dict[str, Value]
    logs: list[str] = []
    failure: Failure | None = None


class SentOutcome(Struct, frozen=True):
    """One request's completions, and of each what its graphs sent home."""

    completions: list[SentCompletion]
    samples: list[SentSample]
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Chances | None = None
    num_cached_tokens: int | None = None


class Answered(Struct, frozen=True, tag="answered"):
    """In the order of the requests."""

    outcomes: list[SentOutcome]


class SentNotice(Struct, frozen=True, tag="notice", omit_defaults=True):
    """What one step of one sample brought; see `trace/events.py`. `result` has no samples."""

    request: int
    sample: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    values: dict[str, Value] = {}
    replaced: list[str] = []
    logs: tuple[str, ...] = ()
    finish_reason: str | None = None
    failure: Failure | None = None
    result: SentOutcome | None = None
    restarted: bool = False


class Broken(Struct, frozen=True, tag="broken"):
    """An error after the answer has begun, with what would have been its status."""

    status: int
    kind: str
    message: str
    param: str | None = None


AnswerFrame = Answered | SentNotice | Broken
