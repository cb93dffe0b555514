"""The intervention graph: what a user recorded, as data.

A graph is a block of nodes in program order; program order is execution order. Every node has an id, unique in
the whole graph, under which later nodes refer to its value. Structs are immutable and tagged, so the same
definitions serve msgpack, JSON and printing. Nothing in here can name code: operations are names in a closed table.
"""

from __future__ import annotations

from msgspec import Struct

VERSION = 1


class Ref(Struct, frozen=True, tag="ref", forbid_unknown_fields=True):
    """The value of the node (or block argument) with this id."""

    id: int


class Slice(Struct, frozen=True, tag="slice", forbid_unknown_fields=True):
    """`start:stop:step` inside an index."""

    start: Arg = None
    stop: Arg = None
    step: Arg = None


class List(Struct, frozen=True, tag="list", forbid_unknown_fields=True):
    """A Python list."""

    items: list[Arg]


class Tuple(Struct, frozen=True, tag="tuple", forbid_unknown_fields=True):
    """A Python tuple."""

    items: list[Arg]


class Dict(Struct, frozen=True, tag="dict", forbid_unknown_fields=True):
    """A Python dict, as pairs: keys may be any scalar."""

    items: list[tuple[Arg, Arg]]


class Dots(Struct, frozen=True, tag="dots", forbid_unknown_fields=True):
    """`...` inside an index."""


class Dtype(Struct, frozen=True, tag="dtype", forbid_unknown_fields=True):
    """A torch dtype by its bare name, such as `float32`."""

    name: str


class Special(Struct, frozen=True, tag="float", forbid_unknown_fields=True):
    """A float that JSON can't write: `inf`, `-inf` or `nan`."""

    text: str


Arg = Ref | Slice | List | Tuple | Dict | Dots | Dtype | Special | None | bool | int | float | str
NESTED = frozenset([Slice, List, Tuple, Dict])  # arguments that have others in them


class Block(Struct, frozen=True, tag="block", forbid_unknown_fields=True):
    """Nodes in program order, and the values that leave the block."""

    nodes: list[Node]
    yields: list[Arg] = []


class Read(Struct, frozen=True, tag="read", forbid_unknown_fields=True):
    """The site's current value. `iteration` is absolute; None inside an `Iterations` block means the block's own."""

    id: int
    site: str
    iteration: int | None = 0


class Write(Struct, frozen=True, tag="write", forbid_unknown_fields=True):
    """Assign a whole site by value: `module.output = value`."""

    id: int
    site: str
    value: Arg
    iteration: int | None = 0


class Op(Struct, frozen=True, tag="op", forbid_unknown_fields=True):
    """One operation of the table in `ops.py`.

    `writes` names the site whose current value the operation changes in place (its first argument is a view of
    it), and is None for everything else, in-place operations on private values included.
    """

    id: int
    name: str
    args: list[Arg] = []
    kwargs: dict[str, Arg] = {}
    writes: str | None = None


class Const(Struct, frozen=True, tag="const", forbid_unknown_fields=True):
    """A tensor, by the sha256 (hex) of its safetensors bytes."""

    id: int
    digest: str


class Call(Struct, frozen=True, tag="call", forbid_unknown_fields=True):
    """Apply a module of the model to a value, ad hoc: no site fires, the argument isn't modified."""

    id: int
    module: str
    args: list[Arg]


class Save(Struct, frozen=True, tag="save", forbid_unknown_fields=True):
    """Send a copy of `value`, as it is now, home under `name`. A container stays bound: later changes follow it."""

    id: int
    name: str
    value: Arg


class Log(Struct, frozen=True, tag="log", forbid_unknown_fields=True):
    """Send the printed form of the arguments home."""

    id: int
    args: list[Arg]


class Stop(Struct, frozen=True, tag="stop", forbid_unknown_fields=True):
    """End the request here."""

    id: int


class Export(Struct, frozen=True, tag="export", forbid_unknown_fields=True):
    """Keep a copy of `value`, as it is now, in the engine, for requests of the same bundle. Stands at the top level only."""

    id: int
    key: str
    value: Arg


class Import(Struct, frozen=True, tag="import", forbid_unknown_fields=True):
    """The value that another request of the bundle exports under `key`: there before this one's `iteration` begins.

    Stands at the top level only.
    """

    id: int
    key: str
    iteration: int = 0


class Cond(Struct, frozen=True, tag="cond", forbid_unknown_fields=True):
    """Run one of two blocks. `outs[i]` is the id of the chosen block's `yields[i]`."""

    id: int
    test: Arg
    then: Block
    orelse: Block
    outs: list[int] = []


class Loop(Struct, frozen=True, tag="loop", forbid_unknown_fields=True):
    """Run the body once for each item of `over` (a container, or the rows of a tensor).

    `item` is the id of the current item. `carried[i]` is the id that holds `inits[i]` in the first trip and
    `body.yields[i]` of the trip before afterwards; `outs[i]` is its value after the last trip.
    """

    id: int
    over: Arg
    item: int
    body: Block
    carried: list[int] = []
    inits: list[Arg] = []
    outs: list[int] = []


class Iterations(Struct, frozen=True, tag="iterations", forbid_unknown_fields=True):
    """Run the body at each of the request's iterations `start, start + step, ...` below `stop` (None: no end).

    `index` is the id of the current iteration's number, an int. Sites inside have `iteration=None`.
    """

    id: int
    start: int
    stop: int | None
    step: int
    index: int
    body: Block


Node = Read | Write | Op | Const | Call | Save | Log | Stop | Export | Import | Cond | Loop | Iterations


class Graph(Struct, frozen=True, tag="graph", forbid_unknown_fields=True):
    """A whole intervention graph."""

    body: Block
    version: int = VERSION
