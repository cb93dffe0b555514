"""A server's engine, as a trace sees it: the backend behind `VLLM.connect`.

Prompts of text and sampling arguments are asked about once each; token ids need no request. A trace is one request: its
small tensors travel with it, large ones are uploaded first unless the server has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import quote

import msgspec

from nnsight_vllm.client.admission import admitted_prompt, sampling_arguments
from nnsight_vllm.client.trace_codec import decode_outcomes
from nnsight_vllm.errors import ConnectionFailed, EngineSettingError
from nnsight_vllm.graph.codec import decode, to_json
from nnsight_vllm.graph.nodes import VERSION
from nnsight_vllm.graph.results import Stats
from nnsight_vllm.remote.connection import Connection, Refusal
from nnsight_vllm.remote.sampling import Samplings
from nnsight_vllm.remote.tokenizer import RemoteTokenizer
from nnsight_vllm.trace.backend import Outcome, Prompt, Request
from nnsight_vllm.trace.edits import RecordedEdit
from nnsight_vllm.trace.source import SourceLine, user_line
from nnsight_vllm.trace.tree import Tree
from nnsight_vllm.wire.trace import MISSING, MSGPACK, PREFIX, Described, SentRequest, SentTrace

SMALL = 1 << 18
"""Bytes up to which a tensor travels with each trace that needs it."""

SMALL_TOGETHER = 1 << 23

TRACE = f"{PREFIX}/trace"
_EDITS = f"{PREFIX}/edits"
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class RemotePrompt:
    """Token ids, more that vLLM takes with them, and the user's line that gave them."""

    token_ids: list[int]
    cache_salt: str | None
    line: SourceLine


class RemoteEngine:
    """The engine of the server at `url`. Raises `ConnectionFailed` where none of ours answers there."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float | None = 600.0) -> None:
        self._connection = Connection(url, api_key, timeout)
        try:
            described, self._tag = self._describe()
        except BaseException:
            self._connection.close()
            raise
        self.names = described.names
        self.tree = Tree(described.catalogue)
        self.tokenizer = RemoteTokenizer(self._connection, self.names[0])
        self._samplings = Samplings(self._connection)
        self._uploaded: set[str] = set()

    # -- the backend of a trace ------------------------------------------------------------------------------------------

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        """The prompt behind the arguments of `trace` or `invoke`. Raises `AdmissionError`."""
        prompt = admitted_prompt(inputs, self.tokenizer, self.tree.catalogue)
        engine = RemotePrompt(prompt.engine["prompt_token_ids"], prompt.engine.get("cache_salt"), user_line())
        return Prompt(prompt.rows, prompt.text, engine)

    def sampling(self, arguments: dict[str, object]) -> Any:
        """Checked sampling parameters. Raises `AdmissionError` for what the server's vLLM doesn't know or allow."""
        return self._samplings.of(sampling_arguments(arguments))

    def admit(self, request: Request, tensors: Mapping[str, bytes]) -> None:
        """Nothing: what only the engine knows of a request it tells when the trace is sent."""

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        """Run all requests together and wait for them. An interruption ends them in the server, too."""
        content, large = packed(requests, tensors)
        self.upload(large)
        try:
            answer = self._traced(content)
        except Refusal as refusal:
            if refusal.kind != MISSING:
                raise refusal.as_error(line_of(refusal, requests)) from None
            self.upload_again(large)
            try:
                answer = self._traced(content)
            except Refusal as again:
                raise again.as_error(line_of(again, requests)) from None
        return decode_outcomes(answer)

    # -- the server ------------------------------------------------------------------------------------------------------

    def upload(self, tensors: Mapping[str, bytes]) -> None:
        """Have the server keep tensors. Raises what it refuses."""
        for digest, data in tensors.items():
            if digest in self._uploaded:
                continue
            path = f"{PREFIX}/tensors/{digest}"
            try:
                self._connection.send("PUT", path, data, {"Content-Type": "application/octet-stream"})
            except Refusal as refusal:
                raise refusal.as_error() from None
            self._uploaded.add(digest)

    def upload_again(self, tensors: Mapping[str, bytes]) -> None:
        """The server has forgotten some of these."""
        self._uploaded -= tensors.keys()
        self.upload(tensors)

    def publish(self, edit: RecordedEdit) -> None:
        """Make a named edit a model of the server's, in the place of an earlier one of its name. Raises what it refuses."""
        self.upload(edit.tensors)
        graph = json.loads(to_json(decode(edit.graph)))
        content = json.dumps({"name": edit.name, "intervention": {"graph": graph}}).encode()
        try:
            self._connection.send("POST", _EDITS, content, {"Content-Type": "application/json"})
        except Refusal as refusal:
            raise refusal.as_error(edit.line) from None

    def withdraw(self, name: str) -> None:
        """Take such a model away, if it's there."""
        try:
            self._connection.send("DELETE", f"{_EDITS}/{quote(name, safe='')}")
        except Refusal as refusal:
            if refusal.status != HTTPStatus.NOT_FOUND:
                raise refusal.as_error() from None

    def stats(self) -> Stats:
        """What the server's engine ran so far, for whomever."""
        try:
            return msgspec.json.decode(self._connection.send("GET", f"{PREFIX}/stats").content, type=Stats)
        except Refusal as refusal:
            raise refusal.as_error() from None

    def check_integrity(self) -> NoReturn:
        """Raises `EngineSettingError`."""
        raise EngineSettingError(f"the engine's integrity is its operator's to check, not a client's; {user_line()}")

    @property
    def llm(self) -> NoReturn:
        raise EngineSettingError(
            f"the model runs in the server at {self._connection.url}: it has no llm here; {user_line()}"
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _describe(self) -> tuple[Described, str]:
        url = self._connection.url
        try:
            answer = self._connection.send("GET", f"{PREFIX}/model")
            plain = json.loads(answer.content)
            version = plain["graph_version"]
        except Refusal as refusal:
            raise refusal.as_error() from None
        except (ValueError, KeyError, TypeError):
            raise ConnectionFailed(f"what answers at {url} is no server of ours; {user_line()}") from None
        if version != VERSION:
            raise ConnectionFailed(
                f"the server at {url} takes graphs of version {version}, this client records version {VERSION}: install the "
                f"server's version of nnsight-vllm here; {user_line()}"
            )
        try:
            return msgspec.convert(plain, Described), answer.headers.get("ETag", "")
        except msgspec.ValidationError as error:
            raise ConnectionFailed(
                f"the server at {url} describes its model in another way: {error}; {user_line()}"
            ) from None

    def _traced(self, content: bytes) -> bytes:
        return self._connection.send("POST", TRACE, content, self._headers(MSGPACK)).content

    def _headers(self, accepted: str) -> dict[str, str]:
        return {"Content-Type": MSGPACK, "Accept": accepted, **({"If-Match": self._tag} if self._tag else {})}


def packed(requests: list[Request], tensors: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
    """A trace as the server takes it, and the tensors that it has to have already."""
    needed = {digest: tensors[digest] for request in requests for digest in request.constants}
    small = _small(needed)
    large = {digest: data for digest, data in needed.items() if digest not in small}
    return _encoder.encode(_sent(requests, small)), large


def _small(tensors: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those that travel with the trace."""
    found: dict[str, bytes] = {}
    size = 0
    for digest, data in tensors.items():
        if len(data) <= SMALL and size + len(data) <= SMALL_TOGETHER:
            found[digest] = data
            size += len(data)
    return found


def _sent(requests: list[Request], tensors: dict[str, bytes]) -> SentTrace:
    numbers: dict[str, int] = {}
    for request in requests:
        numbers.setdefault(request.sampling.arguments, len(numbers))
    return SentTrace(
        [
            SentRequest(
                request.prompt.engine.token_ids,
                numbers[request.sampling.arguments],
                request.prompt.text,
                request.prompt.engine.cache_salt,
                request.graph,
                list(request.edits),
                list(request.after),
                request.links,
            )
            for request in requests
        ],
        [json.loads(arguments) for arguments in numbers],
        tensors,
    )


def line_of(refusal: Refusal, requests: list[Request]) -> SourceLine | None:
    """Where the request that is refused was opened."""
    head, mark, rest = (refusal.param or "").partition("requests[")
    number = rest.partition("]")[0]
    if head or not mark or not number.isdigit() or int(number) >= len(requests):
        return None
    line: SourceLine = requests[int(number)].prompt.engine.line
    return line
