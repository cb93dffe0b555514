"""What a graph's values are made of: constants, each row of its own, a part of the rows, or something else.

    CONSTANT  the same for every row
    ROWS      a line for each row of the request, made of that row and constants only
    PART      the same for some rows, which are known by their positions in the prompt
    MIXED     anything else: it may depend on all rows

How the prefix cache may be used and whether a prompt may come in chunks both follow from this. Where a kind isn't known, it
counts as `MIXED`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from nnsight_vllm.graph.check import refs
from nnsight_vllm.graph.nodes import Arg, Dots, List, Op, Ref, Slice, Tuple
from nnsight_vllm.plan.rows import Kind, rule_of

FULL = Slice()
NOTHING = 2**62  # comes after every position
CONTAINERS = frozenset(["py.list", "py.dict", "py.tuple"])
_SINGLE_ROW = ("lm_head.", "logits.", "samples.")
_REDUCING = frozenset(["sum", "mean", "amax", "amin", "prod", "std", "var", "norm", "argmax", "argmin", "any", "all"])
_KEEPING = frozenset(["softmax", "log_softmax", "cumsum", "cumprod", "normalize"])


def is_drawn(site: str) -> bool:
    """Whether a site has one row a request: that whose token is drawn next."""
    return site.startswith(_SINGLE_ROW)


class Of(enum.Enum):
    CONSTANT = "constant"
    ROWS = "rows"
    PART = "part"
    MIXED = "mixed"


@dataclass(frozen=True)
class RowRange:
    """Rows of the prompt, by positions: `start` to `stop`. `is_one`: a single row, without a dimension for it.

    `is_fixed`: prompts of any length that have these rows mean the same ones.
    """

    start: int
    stop: int
    is_one: bool
    is_fixed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class ValueKind:
    """`dims`: dimensions, that of rows not counted. `needs`: the first row of the prompt that is in it, other than the last."""

    of: Of
    dims: int = 0
    needs: int = NOTHING
    part: RowRange | None = None
    is_own: bool = False  # a container, or something the graph made for itself
    is_late: bool = False  # known only behind all of the prompt's sites

    @property
    def is_rows(self) -> bool:
        return self.of in (Of.ROWS, Of.PART)


NUMBER = ValueKind(Of.CONSTANT)


class Kinds:
    """The kinds of a graph's values, by id. `num_rows`: the prompt's length.

    `trailing`: dimensions of a site's value after the rows; `rank`: those of a constant, by its digest.
    """

    def __init__(self, trailing: Callable[[str], int], rank: Callable[[str], int], num_rows: int) -> None:
        self._trailing = trailing
        self._rank = rank
        self._num_rows = num_rows
        self._values: dict[int, ValueKind] = {}

    def value(self, arg: Arg) -> ValueKind:
        match arg:
            case Ref():
                return self._values.get(arg.id, ValueKind(Of.MIXED))
            case List() | Tuple():
                return NUMBER if not any(True for _ in refs(arg)) else self.mixed([arg])
            case _:
                return self.mixed([arg]) if any(True for _ in refs(arg)) else NUMBER

    def mixed(self, args: Iterable[Arg]) -> ValueKind:
        return ValueKind(Of.MIXED, needs=self.needs_of(args))

    def needs_of(self, args: Iterable[Arg]) -> int:
        known = (self._values[id].needs for arg in args for id in refs(arg) if id in self._values)
        return min(known, default=NOTHING)

    def computed(self, node: Op) -> ValueKind | None:
        """The kind of an operation's result that changes nothing; None where it isn't known."""
        target = self.value(node.args[0]) if node.args else NUMBER
        if node.name == "py.getitem" and len(node.args) == 2:
            return self.part(target, node.args[1])
        match rule_of(node.name).kind:
            case Kind.POINTWISE:
                return self._pointwise([*node.args, *node.kwargs.values()])
            case Kind.MATMUL:
                return self._product(node)
            case Kind.LAST if node.name.partition(".")[2] in _REDUCING | _KEEPING:
                return self._along(node, target)
            case _:
                return None

    def part(self, target: ValueKind, key: Arg) -> ValueKind | None:
        """`target[key]`, where that's columns of all rows, or known rows."""
        items: list[Arg] = key.items if isinstance(key, Tuple) else [key]
        if not target.is_rows or not items:
            return None
        is_line = target.part is not None and target.part.is_one
        columns = items if is_line else items[1:]
        dims = self._narrowed(target.dims, columns)
        if dims is None:
            return None
        if is_line or items[0] == FULL or (items[0] == Dots() and not _reaches_rows(columns, target.dims)):
            return replace(target, dims=dims)
        part = self._rows_of(items[0], target) if target.of is Of.ROWS else None
        if part is None:
            return None
        needs = NOTHING if target.needs == NOTHING or self.is_last(part) else part.start
        return replace(target, of=Of.PART, dims=dims, part=part, needs=needs)

    def is_last(self, part: RowRange | None) -> bool:
        """Whether it's the prompt's last row."""
        return part is not None and part.start == self._num_rows - 1

    def takes_columns(self, item: Arg) -> bool:
        """Whether an index chooses columns by a tensor, and may be followed though it may fail."""
        return False

    def _narrowed(self, dims: int, columns: list[Arg]) -> int | None:
        """The dimensions that are left of a row; None where that can't be said."""
        chosen = [item for item in columns if item is not None and type(item) not in (int, Slice, Dots)]
        if len(chosen) > 1 or not all(self.takes_columns(item) for item in chosen):
            return None
        left = dims + columns.count(None) - sum(type(item) is int for item in columns)
        return left if left >= 0 else None

    def _rows_of(self, key: Arg, target: ValueKind) -> RowRange | None:
        """The rows behind an index or a slice; None where there are none, or it can't be said."""
        last, length = self._num_rows - 1, self._num_rows
        if target.is_late:  # one row, whichever iteration it is
            return RowRange(last, length, True) if type(key) is int and key == -1 else None
        if type(key) is int:
            row = key if key >= 0 else key + length
            return RowRange(row, row + 1, True, key >= 0) if 0 <= row < length else None
        if not isinstance(key, Slice) or key.step not in (None, 1):
            return None
        ends = [key.start, key.stop]
        if not all(end is None or type(end) is int for end in ends):
            return None
        start, stop, _ = slice(*ends).indices(length)
        is_fixed = _is_from_front(key.start, 0, length) and _is_from_front(key.stop, None, length)
        return RowRange(start, stop, False, is_fixed) if start < stop else None

    def _pointwise(self, args: list[Arg]) -> ValueKind | None:
        values = [self.value(arg) for arg in args]
        made = [value for value in values if value.of is not Of.CONSTANT]
        if not made:
            return ValueKind(Of.CONSTANT, max((value.dims for value in values), default=0))
        if not all(fits(value, made[0]) for value in values):
            return None
        return replace(made[0], needs=min(value.needs for value in made))

    def _product(self, node: Op) -> ValueKind | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = (self.value(arg) for arg in node.args)
        if left.of is right.of is Of.CONSTANT and left.dims in (1, 2) and right.dims in (1, 2):
            return replace(left, dims=left.dims + right.dims - 2)
        if not left.is_rows or left.dims != 1 or right.of is not Of.CONSTANT:
            return None
        return replace(left, dims=right.dims - 1) if right.dims in (1, 2) else None

    def _along(self, node: Op, target: ValueKind) -> ValueKind | None:
        """Over the last dimension of each row, where it says so and has one."""
        at = rule_of(node.name).dim
        dim = node.kwargs.get("dim", node.args[at] if len(node.args) > at else None)
        others = [arg for key, arg in node.kwargs.items() if key not in ("dim", "keepdim")]
        if dim != -1 or target.dims < 1 or not target.is_rows or others or len(node.args) > at + 1:
            return None
        keeps = node.name.partition(".")[2] in _KEEPING or node.kwargs.get("keepdim") is True
        return replace(target, dims=target.dims - (0 if keeps else 1))


def fits(value: ValueKind, target: ValueKind) -> bool:
    """Whether an element of the target meets only what belongs to its own row."""
    if value.of is Of.CONSTANT:
        return value.dims <= target.dims
    return value.of is target.of and value.dims == target.dims and value.part == target.part


def is_counted_from_the_end(key: Arg) -> bool:
    """`[-1]` and `[-1:]` are the last row in any step that has it."""
    first = key.items[0] if isinstance(key, Tuple) and key.items else key
    return (type(first) is int and first == -1) or first == Slice(-1)


def _reaches_rows(columns: list[Arg], dims: int) -> bool:
    """Whether indices after `...` are more than the dimensions behind the rows."""
    return Dots() in columns or len(columns) - columns.count(None) > dims


def _is_from_front(end: Arg, default: int | None, length: int) -> bool:
    found = default if end is None else end
    return type(found) is int and 0 <= found <= length
