"""What requests that hand values to each other tell the engine beside their graphs.

Requests of one *bundle* know each other: what one of them exports under a key, others import. The scheduler holds a request
before an iteration whose imports aren't there, so it has to know them without reading graphs.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Name = Annotated[str, Meta(min_length=1, max_length=64)]
Count = Annotated[int, Meta(ge=0)]


class Need(Struct, frozen=True, forbid_unknown_fields=True):
    """A value that a request can't begin `iteration` without; `node` is the import's id."""

    key: Name
    iteration: Count
    node: Count


class Links(Struct, frozen=True, forbid_unknown_fields=True):
    """One request's place in a bundle of `size` requests, each sample counted.

    `makes`: what it exports, and how many requests import that, each once. `program`: the number of the graph that does, among
    the request's.
    """

    bundle: Annotated[str, Meta(max_length=64)] = ""
    size: Count = 0
    makes: dict[Name, Count] = {}
    needs: list[Need] = []
    program: Count = 0
