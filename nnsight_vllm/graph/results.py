"""What comes home from the worker: saved values, logs, a stop, a failure; one delta a step.

Tensors are raw little-endian bytes with dtype and shape. A saved container is sent in pieces: `append` extends the list
that was sent before under the same name.
"""

from __future__ import annotations

from msgspec import Raw, Struct


class TensorValue(Struct, frozen=True, tag="tensor"):
    """A contiguous tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class ListValue(Struct, frozen=True, tag="list"):
    items: list[Value]


class TupleValue(Struct, frozen=True, tag="tuple"):
    """A tuple; `names` where its items have names, as torch's results of several tensors do."""

    items: list[Value]
    names: tuple[str, ...] = ()


class DictValue(Struct, frozen=True, tag="dict"):
    items: list[tuple[Value, Value]]


class DtypeValue(Struct, frozen=True, tag="dtype"):
    name: str


Value = TensorValue | ListValue | TupleValue | DictValue | DtypeValue | None | bool | int | float | str


class Saved(Struct, frozen=True):
    """The value saved under `name`; with `append`, items to add to the list sent before."""

    name: str
    value: Value
    append: bool = False


class Sheet(Struct, frozen=True):
    """Many saved tensors as one piece: `saved` is a msgpack list of `Saved`, in which tensors come without their bytes.

    Those lie in `data`, one after the other; in a decoded sheet that's the message's own memory.
    """

    saved: Raw
    data: memoryview


STEP_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Bounds of the classes in which `Stats` counts steps."""


class Stats(Struct, frozen=True):
    """What an engine ran since it started.

    Operations of programs, each counted once a request: `batched` ran for a whole group of requests at once, `one_by_one`
    in a group but request by request, `alone` for a request that nobody shared its place and program with. `prevented`
    says of `one_by_one` how often each operation was why. `programs` are compiled and kept; `program_hits` and
    `program_misses` count requests whose program was there already, or not. `restarted`: how often a request was run again
    because the engine had evicted it. `exported` counts values that requests kept for others, `imported` their uses;
    `num_kept` values wait for a use now.

    `steps_within` counts steps with graphs by the time that their programs took: up to the first of `STEP_SECONDS`, the
    second, ..., above the last; `seconds` of all of them. `saved_bytes` were sent home. `table_lines`: edits that the kernels' tables hold
    now, `table_bytes` what these tables occupy.
    """

    batched: int = 0
    one_by_one: int = 0
    alone: int = 0
    prevented: dict[str, int] = {}
    programs: int = 0
    program_hits: int = 0
    program_misses: int = 0
    restarted: int = 0
    exported: int = 0
    imported: int = 0
    num_kept: int = 0
    steps_within: list[int] = []
    seconds: float = 0.0
    saved_bytes: int = 0
    table_lines: int = 0
    table_bytes: int = 0


class Failure(Struct, frozen=True):
    """Why a graph failed. `kind` is the error's class name, `node` the id of the node it happened at.

    `program`: the number of the graph among those of the request.
    """

    kind: str
    message: str
    node: int | None = None
    retryable: bool = False
    program: int = 0


class Delta(Struct, frozen=True, omit_defaults=True):
    """What one step of one request sends home.

    `stopped` ends the request. `keep_token` says whether the step's sampled token still belongs to the request:
    false when it stopped or failed before its `samples` site of this iteration. `sheet` comes after `saves`.
    """

    saves: list[Saved] = []
    logs: list[str] = []
    stopped: bool = False
    keep_token: bool = True
    failure: Failure | None = None
    sheet: Sheet | None = None
