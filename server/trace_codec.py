"""Outcomes of a trace as they travel to its client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from nnsight_vllm.trace.backend import Completion, Outcome
from nnsight_vllm.trace.events import Notice
from nnsight_vllm.wire.trace import (
    Answered,
    Chance,
    Chances,
    Frame,
    SentCompletion,
    SentNotice,
    SentOutcome,
    SentSample,
)
from nnsight_vllm.wire.values import encode_value

_encoder = msgspec.msgpack.Encoder()


def encode_outcomes(outcomes: Iterable[Outcome]) -> bytes:
    """As msgpack of `Answered`."""
    return _encoder.encode(answered(outcomes))


def encode_frame(frame: Frame) -> bytes:
    """A piece of a streamed answer."""
    data = _encoder.encode(frame)
    return len(data).to_bytes(4, "big") + data


def answered(outcomes: Iterable[Outcome]) -> Answered:
    """All outcomes, the end of a streamed answer."""
    return Answered([_outcome(one) for one in outcomes])


def noticed(notice: Notice) -> SentNotice:
    """A step's notice."""
    return SentNotice(
        notice.request,
        notice.sample,
        notice.text,
        notice.token_ids,
        {name: encode_value(value) for name, value in notice.values.items()},
        sorted(notice.replaced),
        notice.logs,
        notice.finish_reason,
        notice.failure,
        None if notice.result is None else _outcome(Outcome(notice.result, [])),
        notice.restarted,
    )


def _outcome(outcome: Outcome) -> SentOutcome:
    result = outcome.result
    samples = [
        SentSample({name: encode_value(value) for name, value in one.values.items()}, one.logs, one.failure)
        for one in outcome.samples
    ]
    return SentOutcome(
        [_completion(one) for one in result.outputs],
        samples,
        result.prompt,
        result.prompt_token_ids,
        _chances(result.prompt_logprobs),
        result.num_cached_tokens,
    )


def _completion(one: Completion) -> SentCompletion:
    return SentCompletion(
        one.text, one.token_ids, one.finish_reason, one.stop_reason, _chances(one.logprobs), one.cumulative_logprob
    )


def _chances(logprobs: Any) -> Chances | None:
    """From vLLM's, one mapping a position; a prompt's first token has none."""
    if logprobs is None:
        return None
    return [
        None
        if place is None
        else {int(id): Chance(one.logprob, one.rank, one.decoded_token) for id, one in place.items()}
        for place in logprobs
    ]
