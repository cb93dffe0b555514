"""The tokenizer of a server's model, as far as a client needs it: text to token ids and back."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.remote.connection import Connection, Refusal
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.wire.trace import PREFIX, Asked, Prepared

KEPT = 1024
"""Texts whose token ids a client remembers, the latest."""


class RemoteTokenizer:
    """Works through the server. Several texts take one request: `tokenizer(texts)`, after which they are prompts without any."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection = connection
        self._model = model
        self._known: OrderedDict[str, list[int]] = OrderedDict()

    def encode(self, text: str) -> list[int]:
        """The token ids, with those that the tokenizer puts around a text."""
        return self._of([text])[0]

    def __call__(self, text: str | Sequence[str]) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, of one text or of each."""
        ids = self._of([text] if isinstance(text, str) else list(text))
        masks = [[1] * len(one) for one in ids]
        if isinstance(text, str):
            return {"input_ids": ids[0], "attention_mask": masks[0]}
        return {"input_ids": ids, "attention_mask": masks}

    def decode(self, ids: Any) -> str:
        """The text of token ids: a list, a tensor, or one id."""
        plain = ids.tolist() if hasattr(ids, "tolist") else ids
        tokens = [plain] if isinstance(plain, int) else list(plain)
        content = json.dumps({"model": self._model, "tokens": tokens}).encode()
        try:
            answer = self._connection.send("POST", "/detokenize", content, {"Content-Type": "application/json"})
        except Refusal as refusal:
            raise refusal.as_error() from None
        return str(answer.json()["prompt"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise EngineSettingError(
            f"tokenizer.{name}: the tokenizer is the server's, and does encode(text), decode(ids) and tokenizer(texts) only; for "
            f"more, load it here, as transformers.AutoTokenizer; {user_line()}"
        )

    def _of(self, texts: list[str]) -> list[list[int]]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = {text: self._known[text] for text in texts if text in self._known}
        if missing:
            found |= zip(missing, self._asked(missing), strict=True)
        for text, ids in found.items():
            self._known[text] = ids
            self._known.move_to_end(text)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return [list(found[text]) for text in texts]

    def _asked(self, texts: list[str]) -> list[list[int]]:
        content = msgspec.json.encode(Asked(prompts=texts))
        try:
            answer = self._connection.send("POST", f"{PREFIX}/prepare", content, {"Content-Type": "application/json"})
        except Refusal as refusal:
            raise refusal.as_error() from None
        return msgspec.json.decode(answer.content, type=Prepared).prompts
