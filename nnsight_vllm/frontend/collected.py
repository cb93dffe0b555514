"""What one sample of a request has sent home so far, as values: deltas come in, one a step or several."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from msgspec import Raw

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.codec import decode_saved
from nnsight_vllm.graph.results import Delta, Saved, Sheet, TensorValue, TupleValue, Value
from nnsight_vllm.trace.backend import Sample
from nnsight_vllm.wire.values import decode_value, named

READ_AT_ONCE = 16
"""Sheets of one sample. Together they cost less than one by one; not all at the end, since now the engine is busy and we are not."""


@dataclass
class Fresh:
    """What came since it was last taken: values, a list's new items, and the lists whose earlier items are void."""

    values: dict[str, object] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    logs: list[str] = field(default_factory=list)

    def set(self, name: str, value: object, was_known: bool) -> None:
        self.values[name] = list(value) if isinstance(value, list) else value
        if was_known and isinstance(value, list):
            self.replaced.add(name)

    def grow(self, name: str, items: list[object]) -> None:
        known = self.values.setdefault(name, [])
        assert isinstance(known, list)
        known.extend(items)


@dataclass
class Collected:
    """What one sample has sent so far; `fresh` is kept for those who want it bit by bit."""

    sample: Sample = field(default_factory=Sample)
    is_stopped: bool = False
    fresh: Fresh | None = None
    _sheets: list[Sheet] = field(default_factory=list)  # not read yet

    def add(self, delta: Delta) -> None:
        if delta.saves:
            self.read_sheets()
        for saved in delta.saves:
            self._save(saved)
        if delta.sheet is not None:
            self._sheets.append(delta.sheet)
            if len(self._sheets) >= READ_AT_ONCE:
                self.read_sheets()
        self.sample.logs += delta.logs
        if self.fresh is not None:
            self.fresh.logs += delta.logs
        self.sample.failure = self.sample.failure or delta.failure
        self.is_stopped = self.is_stopped or delta.stopped

    def read_sheets(self) -> None:
        """Turn the sheets that came into values. Many steps' sheets are alike, and are read together."""
        sheets, self._sheets = self._sheets, []
        for header, alike in itertools.groupby(sheets, key=lambda sheet: bytes(sheet.saved)):
            for name, append, values in _columns(_decoded(header), [sheet.data for sheet in alike]):
                self._grow(name, values) if append else self._set(name, values[-1])

    def take_fresh(self) -> Fresh:
        """What is new, complete to the last step."""
        assert self.fresh is not None
        self.read_sheets()
        fresh, self.fresh = self.fresh, Fresh()
        return fresh

    def _save(self, saved: Saved) -> None:
        value = decode_value(saved.value)
        if not saved.append:
            self._set(saved.name, value)
        elif isinstance(value, list):
            self._grow(saved.name, value)

    def _set(self, name: str, value: object) -> None:
        if self.fresh is not None:
            self.fresh.set(name, value, name in self.sample.values)
        self.sample.values[name] = value

    def _grow(self, name: str, items: list[object]) -> None:
        self._known(name).extend(items)
        if self.fresh is not None:
            self.fresh.grow(name, items)

    def _known(self, name: str) -> list[object]:
        known = self.sample.values.get(name)
        if not isinstance(known, list):
            raise InterventionError(f"the engine sent a continuation of {name}, which isn't a list")
        return known


@functools.lru_cache(maxsize=64)
def _decoded(header: bytes) -> list[Saved]:
    return decode_saved(Raw(header))


def _columns(saved: list[Saved], data: list[memoryview]) -> Iterator[tuple[str, bool, list[object]]]:
    """Name, whether it continues a list, and the values of all steps; `data`: the sheets' bytes, one a step."""
    # numpy copies: torch would use several threads for it, and wait for each where the engine keeps the cores busy.
    steps = np.frombuffer(b"".join(data), dtype=np.uint8).reshape(len(data), -1)
    columns: dict[tuple[str, bool], list[list[object]]] = {}
    start = 0
    for one in saved:
        parts: list[list[object]] = []
        leaves = one.value.items if isinstance(one.value, TupleValue) else [one.value]
        for leaf in leaves:
            assert isinstance(leaf, TensorValue)
            dtype: torch.dtype = getattr(torch, leaf.dtype)
            stop = start + math.prod(leaf.shape) * dtype.itemsize
            values = torch.from_numpy(steps[:, start:stop].copy()).view(dtype)
            parts.append(list(values.reshape(len(data), *leaf.shape).unbind()))
            start = stop
        items = parts[0] if one.value is leaves[0] else _tuples(one.value, parts)
        columns.setdefault((one.name, one.append), []).append(items)
    for (name, append), several in columns.items():
        yield name, append, [value for step in zip(*several, strict=True) for value in step]


def _tuples(value: Value, parts: list[list[object]]) -> list[object]:
    names = value.names if isinstance(value, TupleValue) else ()
    return [named(names, items) if names else items for items in zip(*parts, strict=True)]
