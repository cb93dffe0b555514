"""Which operations of a program are edits that a table knows.

An edit's values must be parameters of the request, so that its line can be in the table before the forward starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnsight_vllm.graph.nodes import Arg, Const, Op, Ref, Slice
from nnsight_vllm.kernels.columns import COLUMNS
from nnsight_vllm.plan.instructions import Instruction, Run

ADDS = {"py.iadd": 1, "tensor.add_": 1, "py.isub": -1, "tensor.sub_": -1}
"""In-place operations that add to their target, and the sign of what they add: to a site's addend, where it has one."""

PREFIX = "edit."
PRODUCTS = frozenset(["py.mul", "tensor.mul", "torch.mul"])
FULL = Slice()
_SCALES = frozenset(["py.imul", "tensor.mul_"])


@dataclass(frozen=True)
class Edit:
    """`values`: the parameter of each column of the operation, a negative id; None: one. `sign`: of the coefficient.

    `zero`: a parameter that must be zero for it to be this edit.
    """

    operation: str
    values: tuple[int | None, ...] = ()
    sign: int = 1
    zero: int | None = None


def find_edits(code: Sequence[Instruction], copied: frozenset[int]) -> dict[int, Edit]:
    """Edits by the id of their node."""
    nodes = {run.node.id: run.node for run in code if isinstance(run, Run)}
    found = {}
    for node in nodes.values():
        if isinstance(node, Op) and (edit := _Finder(nodes, copied).edit(node)) is not None:
            found[node.id] = edit
    return found


class _Finder:
    def __init__(self, nodes: Mapping[int, object], copied: frozenset[int]) -> None:
        self._nodes = nodes
        self._copied = copied

    def edit(self, node: Op) -> Edit | None:
        name, rest = node.name, node.args[1:]
        if node.kwargs or not node.args or not isinstance(node.args[0], Ref):
            return None
        if name.startswith(PREFIX):
            return self._named(name.removeprefix(PREFIX).removesuffix("_"), rest)
        if name == "tensor.zero_" and not rest:
            return Edit("ablate")
        if name == "py.setitem" and rest[:1] == [FULL] and len(rest) == 2:
            return self._replaced(rest[1])
        if len(rest) != 1:
            return None
        if name in ADDS:
            return self._added(rest[0], ADDS[name])
        if name in _SCALES and (number := self._number(rest[0])) is not None:
            return Edit("scale", (number,))
        return self._replaced(rest[0]) if name == "tensor.copy_" else None

    def _named(self, operation: str, rest: list[Arg]) -> Edit | None:
        if len(rest) != len(COLUMNS.get(operation, ())):
            return None
        values = []
        for column, arg in zip(COLUMNS[operation], rest, strict=True):
            value = self._vector(arg) if column.shape else self._number(arg)
            if value is None:
                return None
            values.append(value)
        return Edit(operation, tuple(values))

    def _added(self, arg: Arg, sign: int) -> Edit | None:
        vector, coefficient = self._vector(arg), None
        product = self._nodes.get(arg.id) if isinstance(arg, Ref) else None
        if vector is not None:
            return Edit("add", (vector, None), sign)
        if isinstance(product, Op) and product.name in PRODUCTS and len(product.args) == 2 and not product.kwargs:
            for one, other in (product.args, reversed(product.args)):
                vector, coefficient = self._vector(one), self._number(other)
                if vector is not None and coefficient is not None:
                    return Edit("add", (vector, coefficient), sign)
        return None

    def _replaced(self, arg: Arg) -> Edit | None:
        vector = self._vector(arg)
        if vector is not None:
            return Edit("replace", (vector,))
        number = self._number(arg)
        return None if number is None else Edit("ablate", zero=number)

    def _vector(self, arg: Arg) -> int | None:
        """The parameter behind a constant that is as it was sent."""
        node = self._nodes.get(arg.id) if isinstance(arg, Ref) else None
        is_plain = isinstance(node, Const) and node.id not in self._copied and node.digest.startswith("-")
        return int(node.digest) if is_plain and isinstance(node, Const) else None

    @staticmethod
    def _number(arg: Arg) -> int | None:
        return arg.id if isinstance(arg, Ref) and arg.id < 0 else None
