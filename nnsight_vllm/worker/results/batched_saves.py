"""What the requests of a group save in one step, kept together: one piece of memory, a line a request.

Each save is one copy for all requests. At the end of the step they become one buffer [requests, bytes], and a request's
message is a line of it: nothing is done request by request, nor save by save.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnsight_vllm.graph.codec import encode_delta, encode_saved
from nnsight_vllm.graph.results import Delta, Saved, Sheet, TensorValue, TupleValue, Value
from nnsight_vllm.worker.lanes.lanes import Each, Lane, Rows, Several, Shared, View
from nnsight_vllm.worker.results.outbox import Outbox

# Name, whether it continues a list, type and shape of each tensor, the tensors' names if they are a tuple.
ColumnKey = tuple[str, bool, tuple[tuple[torch.dtype, torch.Size], ...], tuple[str, ...] | None]


@dataclass
class SavedColumn:
    """One save: `tensors` are copies, each [requests, ...]. `make`: how a request's tensors become its value."""

    name: str
    append: bool
    tensors: list[Tensor]
    several: Several | None

    def value_of(self, i: int) -> object:
        parts = [tensor[i] for tensor in self.tensors]
        return parts[0] if self.several is None else self.several.make(parts)

    @property
    def key(self) -> ColumnKey:
        """All that the message says of it."""
        kinds = tuple((tensor.dtype, tensor.shape[1:]) for tensor in self.tensors)
        return self.name, self.append, kinds, None if self.several is None else _names(self.several)


@dataclass
class BatchedSaves:
    """The saves of a group of `size` requests in one step, in program order."""

    size: int
    columns: list[SavedColumn] = field(default_factory=list)
    by_request: set[str] = field(default_factory=set)  # names that went to the requests' own outboxes

    def take(self, name: str, lane: Lane, append: bool) -> bool:
        """Copy a value. False if it isn't tensors of one shape for all: then each request saves its own."""
        if name in self.by_request or not self.size:
            return False
        several = lane if isinstance(lane, Several) else None
        tensors = [_stacked(part, self.size) for part in (lane.lanes if isinstance(lane, Several) else [lane])]
        if any(tensor is None for tensor in tensors):
            return False
        if not append:
            self.columns = [column for column in self.columns if column.name != name]
        self.columns.append(SavedColumn(name, append, [tensor for tensor in tensors if tensor is not None], several))
        return True

    def append(self, name: str, tensor: Tensor) -> None:
        """Take a copy that was made already, [requests, ...], as what one item more of a list is made of."""
        self.columns.append(SavedColumn(name, True, [tensor if tensor.device.type == "cpu" else tensor.cpu()], None))

    def spill(self, outboxes: list[Outbox], name: str | None = None) -> None:
        """Hand what's here (or what's here under one name) to the requests' own outboxes."""
        for column in [column for column in self.columns if name in (None, column.name)]:
            send = Outbox.append if column.append else Outbox.save
            for i, outbox in enumerate(outboxes):
                send(outbox, column.name, column.value_of(i))
        self.columns = [column for column in self.columns if name not in (None, column.name)]

    def clear(self) -> None:
        self.columns = []
        self.by_request.clear()

    def lines(self) -> tuple[bytes, Tensor]:
        """The beginning that all messages share, and a line of bytes a request: [requests, bytes]."""
        flat = [_bytes(tensor).numpy() for column in self.columns for tensor in column.tensors]
        length = sum(part.shape[1] for part in flat)
        start, head = _start(tuple(column.key for column in self.columns), length)
        lines = np.empty(
            (self.size, len(start) + length), dtype=np.uint8
        )  # fresh memory costs torch more than twice as much
        lines[:, : len(start)] = head
        np.concatenate(flat, 1, out=lines[:, len(start) :])
        return start, torch.from_numpy(lines)

    @property
    def num_bytes(self) -> int:
        """Bytes a request."""
        return sum(tensor.nbytes for column in self.columns for tensor in column.tensors) // max(self.size, 1)

    def sheet_of(self, i: int, start: bytes, lines: Tensor) -> Sheet:
        """Request i's part, for a message that has more to say."""
        return Sheet(
            encode_saved([_described(column.key) for column in self.columns]),
            memoryview(lines[i, len(start) :].numpy().tobytes()),
        )


def _stacked(lane: Lane, size: int) -> Tensor | None:
    """A copy of the lane's value [requests, ...], on the host."""
    lane = lane.read() if isinstance(lane, View) else lane
    match lane:
        case Each():
            tensor = lane.tensor
        case Rows() if lane.ragged.is_even:
            tensor = lane.tensor.reshape(size, -1, *lane.tensor.shape[1:]) if lane.tensor.numel() else lane.tensor
        case Shared(value=Tensor() as value):
            tensor = value.expand(size, *value.shape)
        case _:
            return None
    if tensor.is_complex() or tensor.numel() == 0:
        return None
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=256)
def _start(keys: tuple[ColumnKey, ...], length: int) -> tuple[bytes, NDArray[np.uint8]]:
    """The beginning of a message with such columns and `length` bytes to follow, as bytes and as an array."""
    saved = encode_saved([_described(key) for key in keys])
    start = encode_delta(Delta(sheet=Sheet(saved, memoryview(bytes(length)))))[: -length or None]
    return start, np.frombuffer(start, dtype=np.uint8)


def _described(key: ColumnKey) -> Saved:
    """A column in a message: types, shapes and names, without the bytes."""
    name, append, kinds, names = key
    values: list[Value] = [TensorValue(str(dtype).removeprefix("torch."), tuple(shape), b"") for dtype, shape in kinds]
    return Saved(name, values[0] if names is None else TupleValue(values, names), append)


def _names(several: Several) -> tuple[str, ...]:
    return tuple(getattr(several.make, "__match_args__", ())) if several.make is not tuple else ()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:])).view(torch.uint8)
