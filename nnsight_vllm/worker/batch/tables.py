"""The tables of an engine: the constants of all requests' edits, a line a slot, there before the forward that uses them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsight_vllm.kernels.columns import COLUMNS
from nnsight_vllm.kernels.dispatch import edit
from nnsight_vllm.kernels.table import DTYPES, Table
from nnsight_vllm.plan.edits import Edit
from nnsight_vllm.plan.template import Digest, Key, Parameter, parameter_of

MAX_LINE = 4 << 20  # bytes; a larger edit runs without a table
MAX_TABLE = 256 << 20  # bytes of lines in use; what comes after that runs without one


ANY, NO_WIDTH = -1, -2


@dataclass(frozen=True)
class TableLine:
    """A line in use. `width` of the rows that it fits."""

    table: Table
    number: int
    width: int


@dataclass(frozen=True)
class TableLines:
    """Some requests' lines for one edit. `numbers`: for each table their slots, int32 [requests], -1 where one has none.

    `widths`: of the rows that they fit; `NO_WIDTH` is among them if a request has no line.
    """

    numbers: list[tuple[Table, Tensor]]
    widths: frozenset[int]

    @classmethod
    def of(cls, slots: Sequence[TableLine | None]) -> TableLines:
        found = [slot for slot in slots if slot is not None]
        tables = {id(slot.table): slot.table for slot in found}
        numbers = [
            (table, torch.tensor([_number(slot, table) for slot in slots], dtype=torch.int32))
            for table in tables.values()
        ]
        widths = {slot.width for slot in found}
        return cls(numbers, frozenset(widths if len(found) == len(slots) else widths | {NO_WIDTH}))

    def fit(self, width: int) -> bool:
        """Whether every request has a line for rows of this width."""
        return self.widths <= {width, ANY}

    def edit(self, rows: Tensor, owner: Tensor) -> None:
        """Edit `rows` [N, H] in place, row i by the line of request `owner[i]`. `owner`: int64 [N], on the host."""
        for table, numbers in self.numbers:
            edit(rows, table.operation, numbers[owner].to(rows.device), table.columns)


def _number(slot: TableLine | None, table: Table) -> int:
    return slot.number if slot is not None and slot.table is table else -1


class Tables:
    """Tables by operation, sizes and type; made when they are first needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[Hashable, Table] = {}
        self._needs_filling = False

    def acquire(self, wanted: Edit, parameters: Sequence[Parameter], values: Mapping[int, Any]) -> TableLine | None:
        """A slot for this request's edit; None where its values don't make a line. `values`: of the parameters, by id."""
        if wanted.zero is not None and values[wanted.zero] != 0:
            return None
        columns = COLUMNS[wanted.operation]
        line = {
            column.name: 1.0 if id is None else values[id] for column, id in zip(columns, wanted.values, strict=True)
        }
        if "coefficients" in line and wanted.sign < 0:
            line["coefficients"] = -line["coefficients"]
        sizes = _sizes(wanted.operation, line)
        if sizes is None:
            return None
        width, rank, dtype, size = sizes
        table = self._table(wanted.operation, width, rank, dtype)
        if len(table) * size >= MAX_TABLE:
            return None
        parts = [None if id is None else _name(parameters[parameter_of(id)]) for id in wanted.values]
        number = table.acquire((wanted.sign, *parts), line)
        self._needs_filling |= not table.is_filled
        return TableLine(table, number, ANY if width is None else width)

    def release(self, slots: Iterable[TableLine]) -> None:
        """The request is gone: its slots have a user less."""
        for slot in slots:
            slot.table.release(slot.number)

    def fill(self) -> None:
        """Bring new lines to the device. Once a step, before the forward."""
        if self._needs_filling:
            for table in self._tables.values():
                table.fill()
            self._needs_filling = False

    @property
    def num_lines(self) -> int:
        """Lines in use."""
        return sum(len(table) for table in self._tables.values())

    @property
    def num_bytes(self) -> int:
        """What the buffers occupy, free lines included."""
        return sum(column.nbytes for table in self._tables.values() for column in table.columns.values())

    @property
    def num_users(self) -> int:
        return sum(table.num_users for table in self._tables.values())

    def _table(self, operation: str, width: int | None, rank: int | None, dtype: torch.dtype) -> Table:
        key = (operation, width, rank, dtype)
        if key not in self._tables:
            self._tables[key] = Table(operation, width or 1, dtype, self._device, rank=rank)
        return self._tables[key]


def _sizes(operation: str, line: Mapping[str, Any]) -> tuple[int | None, int | None, torch.dtype, int] | None:
    """Width, rank, type and bytes of a line's tensors; None if they don't fit one another, or a number isn't one."""
    sizes: dict[str, int] = {}
    dtypes: set[torch.dtype] = set()
    size = 0
    for column in COLUMNS[operation]:
        value = line[column.name]
        if not column.shape and type(value) in (int, float):
            continue
        if not column.shape or not isinstance(value, Tensor) or value.ndim != len(column.shape):
            return None
        dtypes.add(value.dtype)
        size += value.nbytes
        lengths = zip(column.shape, value.shape, strict=True)
        if any(length == 0 or sizes.setdefault(dimension, length) != length for dimension, length in lengths):
            return None
    if len(dtypes) > 1 or not dtypes <= set(DTYPES) or size > MAX_LINE:
        return None
    return sizes.get("width"), sizes.get("rank"), next(iter(dtypes), torch.float32), size


def _name(parameter: Parameter) -> Hashable:
    """Equal names are equal values; -0.0 isn't 0.0."""
    return parameter.text if isinstance(parameter, Digest | Key) else float(parameter).hex()
