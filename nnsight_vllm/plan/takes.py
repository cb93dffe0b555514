"""Sites where a program does nothing but collect: it appends the site's rows, or one of them, to lists that go home.

A group does that in one read and no more, whatever the number of its requests and of the program's operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnsight_vllm.graph.nodes import Arg, Op, Read, Ref, Slice
from nnsight_vllm.plan.edits import leaves_site
from nnsight_vllm.plan.instructions import At, Instruction, Run

_FULL = Slice()


@dataclass(frozen=True)
class Take:
    """All that a program does at a site. Then it goes on at `stop`.

    `columns`: for each append the parameter with the row's number (None: all rows) and the name that the list is saved under.
    `num_operations`: how many of the program's operations that is.
    """

    site: str
    columns: tuple[tuple[int | None, str], ...]
    num_operations: int
    stop: int
    free: tuple[int, ...]


def find_takes(code: Sequence[Instruction], streams: Mapping[int, str]) -> dict[int, Take]:
    """Takes by the place in the program where a request waits for the site."""
    found = {}
    for start, at in enumerate(code):
        if isinstance(at, At) and at.site is not None and (take := _take(code, start, at.site, streams)) is not None:
            found[start] = take
    return found


def _take(code: Sequence[Instruction], start: int, site: str, streams: Mapping[int, str]) -> Take | None:
    rows: dict[int, int | None] = {}  # values that are the site, or a row of it by its parameter
    made: set[int] = set()
    columns: list[tuple[int | None, str]] = []
    free: list[int] = []
    num_operations = 0
    stop = start + 1
    while isinstance(run := code[stop], Run):
        node = run.node
        made.add(node.id)
        free += run.free
        stop += 1
        match node:
            case Read() if node.site == site:
                rows[node.id] = None
                continue
            case Op(name="py.getitem") if _is_whole(node.args[0], rows) and node.args[1] == _FULL:
                rows[node.id] = None
            case Op(name="py.getitem", args=[target, Ref(id=key)]) if _is_whole(target, rows) and key < 0:
                rows[node.id] = key
            case Op(name="py.append", args=[Ref(id=stream), Ref(id=item)]) if stream in streams and item in rows:
                columns.append((rows[item], streams[stream]))
            case _:
                return None
        num_operations += 1
    if not columns or not leaves_site(code, stop, site) or not made <= set(free):
        return None
    return Take(site, tuple(columns), num_operations, stop, tuple(free))


def _is_whole(arg: Arg, rows: Mapping[int, int | None]) -> bool:
    return isinstance(arg, Ref) and arg.id in rows and rows[arg.id] is None
