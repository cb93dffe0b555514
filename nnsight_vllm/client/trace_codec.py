"""What became of a trace, and what its steps brought, as it travels from a server to its client: both directions side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from nnsight_vllm.errors import ConnectionFailed
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.backend import Completion, Outcome, Result, Sample
from nnsight_vllm.trace.events import Notice
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.wire.trace import Answered, AnswerFrame, Chance, SentCompletion, SentNotice, SentOutcome, SentSample
from nnsight_vllm.wire.values import decode_value, encode_value

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_answer_decoder = msgspec.msgpack.Decoder(Answered)
_frame_decoder: msgspec.msgpack.Decoder[AnswerFrame] = msgspec.msgpack.Decoder(AnswerFrame)


@dataclass
class Logprob:
    """vLLM's class of this name, which a client may not have."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def encode_outcomes(outcomes: Iterable[Outcome]) -> bytes:
    """A whole answer."""
    return _encoder.encode(answered_of(outcomes))


def decode_outcomes(data: bytes) -> list[Outcome]:
    """Raises `ConnectionFailed` for what is no answer."""
    return outcomes_of(_decoded(_answer_decoder, data))


def encode_frame(frame: AnswerFrame) -> bytes:
    """A piece of a streamed answer, behind its length."""
    data = _encoder.encode(frame)
    return len(data).to_bytes(4, "big") + data


def decode_frame(data: bytes, line: object) -> AnswerFrame:
    """Of a piece without its length. Raises `ConnectionFailed`, with this line of the user's."""
    return _decoded(_frame_decoder, data, line)


def _decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes, line: object = None) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConnectionFailed(f"the server's answer isn't one of ours: {error}; {line or user_line()}") from None


def answered_of(outcomes: Iterable[Outcome]) -> Answered:
    """All outcomes, the end of a streamed answer."""
    return Answered([_sent_outcome(one) for one in outcomes])


def outcomes_of(answered: Answered) -> list[Outcome]:
    """What became of the requests."""
    with garbage.paused():
        return [_outcome(one) for one in answered.outcomes]


def sent_notice(notice: Notice) -> SentNotice:
    """A step's notice, for the client."""
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
        None if notice.result is None else _sent_outcome(Outcome(notice.result, [])),
        notice.restarted,
    )


def notice_of(sent: SentNotice) -> Notice:
    """A step's notice, at the client."""
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


def _sent_outcome(outcome: Outcome) -> SentOutcome:
    result = outcome.result
    return SentOutcome(
        [_sent_completion(one) for one in result.outputs],
        [_sent_sample(one) for one in outcome.samples],
        result.prompt,
        result.prompt_token_ids,
        _each_place(Chance, result.prompt_logprobs),
        result.num_cached_tokens,
    )


def _outcome(sent: SentOutcome) -> Outcome:
    result = Result(
        [_completion(one) for one in sent.completions],
        sent.prompt,
        sent.prompt_token_ids,
        _each_place(Logprob, sent.prompt_logprobs),
        sent.num_cached_tokens,
    )
    return Outcome(result, [_sample(one) for one in sent.samples])


def _sent_sample(sample: Sample) -> SentSample:
    return SentSample({name: encode_value(value) for name, value in sample.values.items()}, sample.logs, sample.failure)


def _sample(sent: SentSample) -> Sample:
    return Sample({name: decode_value(value) for name, value in sent.values.items()}, sent.logs, sent.failure)


def _sent_completion(one: Completion) -> SentCompletion:
    return SentCompletion(
        one.text,
        one.token_ids,
        one.finish_reason,
        one.stop_reason,
        _each_place(Chance, one.logprobs),
        one.cumulative_logprob,
    )


def _completion(sent: SentCompletion) -> Completion:
    return Completion(
        sent.text,
        sent.token_ids,
        sent.finish_reason,
        sent.stop_reason,
        _each_place(Logprob, sent.logprobs),
        sent.cumulative_logprob,
    )


def _each_place(kind: Callable[[float, int | None, str | None], T], logprobs: Any) -> list[dict[int, T] | None] | None:
    """One mapping a position; a prompt's first token has none."""
    if logprobs is None:
        return None
    return [
        None
        if place is None
        else {int(id): kind(one.logprob, one.rank, one.decoded_token) for id, one in place.items()}
        for place in logprobs
    ]
