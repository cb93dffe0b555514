"""What a server tells of a trace, as the objects that a trace has locally."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from nnsight_vllm.errors import ConnectionFailed
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Completion, Outcome, Result, Sample
from nnsight_vllm.trace.events import Notice
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.wire.trace import Answered, Chances, SentCompletion, SentNotice, SentOutcome
from nnsight_vllm.wire.values import decode_value

_decoder = msgspec.msgpack.Decoder(Answered)


@dataclass
class Logprob:
    """vLLM's class of this name, which a client may not have."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def outcomes_of(data: bytes) -> list[Outcome]:
    """The outcomes in the server's answer."""
    try:
        answered = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConnectionFailed(f"the server's answer isn't one of ours: {error}; {user_line()}") from None
    return outcomes(answered)


def outcomes(answered: Answered) -> list[Outcome]:
    """What became of the requests."""
    with garbage.paused():
        return [_outcome(one) for one in answered.outcomes]


def notice_of(sent: SentNotice) -> Notice:
    """A step's notice."""
    return Notice(
        sent.request,
        sent.sample,
        sent.text,
        sent.token_ids,
        {name: decode_value(value) for name, value in sent.values.items()},
        frozenset(sent.replaced),
        sent.logs,
        sent.finish_reason,
        sent.failure,
        None if sent.result is None else _outcome(sent.result).result,
        sent.restarted,
    )


def _outcome(sent: SentOutcome) -> Outcome:
    result = Result(
        [_completion(one) for one in sent.completions],
        sent.prompt,
        sent.prompt_token_ids,
        _logprobs(sent.prompt_logprobs),
        sent.num_cached_tokens,
    )
    samples = [
        Sample({name: decode_value(value) for name, value in one.values.items()}, one.logs, one.failure)
        for one in sent.samples
    ]
    return Outcome(result, samples)


def _completion(sent: SentCompletion) -> Completion:
    return Completion(
        sent.text,
        sent.token_ids,
        sent.finish_reason,
        sent.stop_reason,
        _logprobs(sent.logprobs),
        sent.cumulative_logprob,
    )


def _logprobs(sent: Chances | None) -> list[dict[int, Logprob] | None] | None:
    if sent is None:
        return None
    return [
        None if place is None else {id: Logprob(one.logprob, one.rank, one.decoded_token) for id, one in place.items()}
        for place in sent
    ]
