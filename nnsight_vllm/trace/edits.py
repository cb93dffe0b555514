"""Edits: graphs that were recorded once, without a prompt, and that run in every request that uses them.

A `RecordedEdit` holds all it needs: its graph as bytes and its tensors by content. A model runs with the edits that were put
in place on it, in that order; named ones are kept beside them, for requests that ask.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nnsight_vllm.errors import RefusedError, UnknownEditError
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.text import render
from nnsight_vllm.trace.source import SourceLine, user_line


@dataclass(frozen=True, eq=False)
class RecordedEdit:
    """`graph` as msgpack bytes; `tensors` are those it names, as safetensors bytes by digest; `lines` by node."""

    name: str | None
    graph: bytes
    tensors: Mapping[str, bytes]
    lines: Mapping[int, SourceLine]
    line: SourceLine

    def __str__(self) -> str:
        return render(decode(self.graph))

    def __repr__(self) -> str:
        return f"<edit {'without a name' if self.name is None else repr(self.name)}, {self.line}>"


class NamedEdits(Mapping[str, RecordedEdit]):
    """The edits that any request may ask for by name. `del` takes one away; models that run with it keep it."""

    def __init__(self) -> None:
        self._edits: dict[str, RecordedEdit] = {}

    def __getitem__(self, name: str) -> RecordedEdit:
        known = self._edits.get(name)
        if known is not None:
            return known
        names = list(self._edits)
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4) or names[:8]
        hint = f"nearest: {', '.join(near)}" if near else 'there are none; model.edit("name") makes one'
        raise UnknownEditError(f"no edit is named {name!r} ({hint}); {user_line()}")

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._edits))

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, name: object) -> bool:
        return name in self._edits

    def __delitem__(self, name: str) -> None:
        del self._edits[self[name].name or name]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values())) or "no named edits"

    def put(self, edit: RecordedEdit) -> None:
        """Keep a named edit, in the place of an earlier one of its name."""
        if edit.name is not None:
            self._edits[edit.name] = edit


class Standing:
    """What the requests of one model run with: `applied`, in order, and then what each asks for."""

    def __init__(
        self, named: NamedEdits, applied: tuple[RecordedEdit, ...] = (), missing: SourceLine | None = None
    ) -> None:
        self.named = named
        self.applied = applied
        self._missing = missing  # the line of an edit that isn't recorded yet

    def add(self, edit: RecordedEdit) -> None:
        self.named.put(edit)
        self.applied, self._missing = (*self.applied, edit), None

    def clear(self) -> None:
        self.applied = ()

    def with_unrecorded(self, line: SourceLine) -> Standing:
        """The same, for a model that gets one edit more when that is recorded."""
        return Standing(self.named, self.require(), line)

    def require(self) -> tuple[RecordedEdit, ...]:
        """What is applied. Raises `RefusedError` where an edit should be and isn't, since its block failed."""
        if self._missing is not None:
            raise RefusedError(
                f"this edited model has no edit: its block at {self._missing} isn't over, or failed; {user_line()}"
            )
        return self.applied

    def chosen(self, asked: object) -> tuple[RecordedEdit, ...]:
        """All edits of a request that asks for these, by name or as `RecordedEdit`s, in order."""
        items = asked if isinstance(asked, list | tuple) else [asked]
        return (*self.require(), *(self._one(item) for item in items))

    def _one(self, item: object) -> RecordedEdit:
        if isinstance(item, RecordedEdit):
            return item
        if isinstance(item, str):
            return self.named[item]
        raise RefusedError(f"edits are asked for by name, such as edits=['calm']; got {item!r:.80}; {user_line()}")
