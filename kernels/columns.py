"""What an operation's table holds: the columns, each with one line a slot.

A column of vectors has the table's dtype, which is the dtype of the user's tensor. A column of numbers is float32. The
names here are those of the operations everywhere: reference, kernel, test and compiled table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dimension = Literal["width", "rank"]


@dataclass(frozen=True)
class Column:
    """`shape`: of one slot's line. `()`: a number. `width`: the site's last dimension H; `rank`: r, the same in a whole table."""

    name: str
    shape: tuple[Dimension, ...] = ()

    def sizes(self, width: int, rank: int) -> tuple[int, ...]:
        return tuple(width if dimension == "width" else rank for dimension in self.shape)


_VECTORS = Column("vectors", ("width",))
_DIRECTIONS = Column("directions", ("width",))
_COEFFICIENTS = Column("coefficients")

COLUMNS: dict[str, tuple[Column, ...]] = {
    "add": (_VECTORS, _COEFFICIENTS),
    "scale": (_COEFFICIENTS,),
    "replace": (_VECTORS,),
    "ablate": (),
    "project_out": (_DIRECTIONS, _COEFFICIENTS),
    "clamp": (_DIRECTIONS, Column("lows"), Column("highs")),
    "norm_matched_add": (_VECTORS, _COEFFICIENTS),
    "low_rank": (Column("downs", ("rank", "width")), Column("ups", ("width", "rank")), _COEFFICIENTS),
    "sae_clamp": (
        Column("encoders", ("width",)),
        Column("biases"),
        Column("decoders", ("width",)),
        Column("targets"),
    ),
}


def needs_rank(operation: str) -> bool:
    return any("rank" in column.shape for column in COLUMNS[operation])
