"""Positions of the short form as rows of iterations: what an edit or a save touches, and when.

Position p of a prompt of R tokens is row p of iteration 0; from R on it is the only row of iteration p - R + 1. Logits and
samples have one row an iteration, whose position is the last so far: R - 1 in iteration 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.schema import PositionRange, Word

LAST = slice(-1, None)
RowIndex = slice | list[int] | None


@dataclass(frozen=True)
class SelectedRows:
    """Rows at iterations `first, first + step, ...` below `stop` (None: no end). `rows` None: all; a list of them rises."""

    first: int
    stop: int | None
    step: int = 1
    rows: RowIndex = None

    def starts(self, begin: int) -> int:
        """Its first iteration from `begin` on."""
        return max(self.first, begin + (self.first - begin) % self.step)

    def is_in(self, begin: int, end: int | None) -> bool:
        """Whether it has an iteration from `begin` on and below `end`."""
        start = self.starts(begin)
        return (self.stop is None or start < self.stop) and (end is None or start < end)


@dataclass(frozen=True)
class SelectedPositions:
    """`over_iterations`: not the prompt alone. `is_single`: one row at each iteration."""

    parts: tuple[SelectedRows, ...]
    over_iterations: bool
    is_single: bool


@dataclass(frozen=True)
class ActionBlock:
    """A block of the graph: iterations `start, start + step, ...` below `stop`, and what is done in it, by the number of the action.

    A part whose step isn't 1 is done at its own iterations only.
    """

    start: int
    stop: int | None
    step: int
    actions: tuple[tuple[int, SelectedRows], ...]


def choose(
    positions: Word | Sequence[int] | PositionRange,
    rows: int,
    max_tokens: int | None,
    has_one_row: bool,
    is_save: bool,
    param: str,
) -> SelectedPositions:
    """The positions in a prompt of `rows` tokens. Raises `Refused` where the site has no row, or a save would wait in vain.

    An edit may name positions that never come: an edited model's are the same for prompts of every length.
    """
    if positions == "all":
        return SelectedPositions((SelectedRows(0, None),), True, has_one_row)
    if positions == "last":
        return SelectedPositions((SelectedRows(0, None, rows=LAST),), True, True)
    if positions == "prompt":
        return SelectedPositions((SelectedRows(0, 1),), False, has_one_row)
    if positions == "generated":
        return SelectedPositions((SelectedRows(1, None),), True, True)
    before = rows - 1 if has_one_row else 0  # positions without a row
    last = rows + max_tokens - 2 if is_save and max_tokens is not None else None
    if isinstance(positions, PositionRange):
        return _range(positions, rows, before, last, has_one_row, param)
    return _list(sorted(set(map(int, positions))), rows, before, last, has_one_row, param)


def _list(
    positions: list[int], rows: int, before: int, last: int | None, has_one_row: bool, param: str
) -> SelectedPositions:
    if positions[0] < before:
        raise Refused(f"there is one row an iteration here, the first at position {before}; got {positions[0]}", param)
    _refuse_late(positions[-1], last, param)
    in_prompt = [p - before for p in positions if p < rows]
    later = [p - rows + 1 for p in positions if p >= rows]
    parts = [SelectedRows(0, 1, rows=_as_slice(in_prompt))] if in_prompt else []
    parts += [SelectedRows(start, stop) for start, stop in _runs(later)]
    return SelectedPositions(tuple(parts), bool(later), has_one_row or not in_prompt)


def _range(
    asked: PositionRange, rows: int, before: int, last: int | None, has_one_row: bool, param: str
) -> SelectedPositions:
    start = asked.start + max(0, -((asked.start - before) // asked.step)) * asked.step  # the first that has a row
    if asked.stop is not None and start >= asked.stop:
        raise Refused(f"there is one row an iteration here, the first at position {before}", param)
    _refuse_late(start, last, param)
    parts = []
    if start < rows:
        stop = rows if asked.stop is None else min(asked.stop, rows)
        parts.append(SelectedRows(0, 1, rows=slice(start - before, stop - before, asked.step)))
    later = start if start >= rows else rows + (start - rows) % asked.step
    is_later = asked.stop is None or later < asked.stop
    if is_later:
        end = None if asked.stop is None else asked.stop - rows + 1
        parts.append(SelectedRows(later - rows + 1, end, asked.step))
    return SelectedPositions(tuple(parts), is_later, has_one_row or start >= rows)


def _refuse_late(position: int, last: int | None, param: str) -> None:
    if last is not None and position > last:
        raise Refused(f"position {position} never comes: with this prompt and max_tokens the last is {last}", param)


def _as_slice(rows: list[int]) -> RowIndex:
    """As a slice where they are evenly spaced: that is a view."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = range(rows[0], rows[-1] + 1, step)
    return slice(rows[0], rows[-1] + 1, step) if rows == list(even) else rows


def _runs(iterations: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours as (first, behind the last)."""
    begin = 0
    for i in range(1, len(iterations) + 1):
        if i == len(iterations) or iterations[i] != iterations[i - 1] + 1:
            yield iterations[begin], iterations[i - 1] + 1
            begin = i


def refuse_many(found: int, most: int) -> None:
    """Raise `Refused` where positions make too large a graph: each part is a node at least in every block that it is in."""
    if found > most:
        message = f"these positions make a graph of more than {found} nodes; the limit is {most}"
        raise Refused(message, "intervention", kind="AdmissionError")


def action_blocks(chosen: Sequence[SelectedPositions], max_tokens: int | None, most: int) -> Iterator[ActionBlock]:
    """The blocks that hold all parts that run, one after the other; as few as can be. Raises `Refused` above `most` actions in all."""
    parts = [(i, part) for i, one in enumerate(chosen) for part in one.parts]
    marks = sorted({mark for _, part in parts for mark in (part.first, part.stop) if mark is not None})
    waiting = sorted(parts, key=lambda one: -one[1].first)
    live: list[tuple[int, SelectedRows]] = []
    found = 0
    for begin, end in zip_longest(marks, marks[1:]):
        live = [one for one in live if one[1].stop is None or one[1].stop > begin]
        while waiting and waiting[-1][1].first == begin:
            live.append(waiting.pop())
        live.sort(key=lambda one: one[0])
        found += len(live)
        refuse_many(found, most)
        stretch = _stretch(begin, end, [one for one in live if one[1].is_in(begin, end)])
        if stretch.actions and (max_tokens is None or stretch.start < max_tokens):
            yield stretch


def _stretch(begin: int, end: int | None, active: list[tuple[int, SelectedRows]]) -> ActionBlock:
    paces = {(part.starts(begin), part.step if end != begin + 1 else 1) for _, part in active}
    if len(paces) == 1:
        ((start, step),) = paces
        return ActionBlock(start, end, step, tuple((i, SelectedRows(start, end, 1, part.rows)) for i, part in active))
    return ActionBlock(
        begin, end, 1, tuple((i, SelectedRows(part.starts(begin), end, part.step, part.rows)) for i, part in active)
    )
