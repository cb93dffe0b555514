"""What a rewritten block calls where it branches: the runtime of one run of one block.

Plain Python values go the way Python sends them. A proxy opens a construct of `branches.py`, or raises
`ControlFlowError` where the construct needs to know the value while the block is recorded. `opened` holds the
constructs that are open in the recorder: a jump or an exception must not leave one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Never

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks.bindings import Bindings
from nnsight_vllm.trace.blocks.branches import ForConstruct, IfConstruct, LoopNames, WithConstruct
from nnsight_vllm.trace.blocks.constructs import BlockRecorder, BlockRun, Bound

_COMPARE: dict[str, Callable[[Any, Any], object]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "is": operator.is_,
    "is not": operator.is_not,
    "in": lambda item, holder: item in holder,
    "not in": lambda item, holder: item not in holder,
}


class Runtime(BlockRun):
    """One run of a rewritten block; the block knows it as `__nns__`."""

    def __init__(self, recorder: BlockRecorder, bindings: Bindings, filename: str) -> None:
        super().__init__(recorder, bindings, filename)
        self._branches: list[IfConstruct] = []
        self._operands: list[tuple[IfConstruct, object, bool]] = []

    # -- statements ------------------------------------------------------------------------------------------------------

    def branch(self, test: object, bound: Bound, line: int) -> IfConstruct:
        """`if test:`."""
        return IfConstruct(self, "`if`", test, bound, line)

    def scope(self, bound: Bound, line: int) -> WithConstruct:
        """`with`, before its context object is made."""
        return WithConstruct(self, bound, line)

    def loop(
        self, over: Any, bound: Bound, targets: tuple[str, ...], augmented: tuple[str, ...], has_else: bool, line: int
    ) -> Any:
        """What `for` goes over. `augmented` are names that the body binds by `name += ...` only."""
        if not self.recorder.is_proxy(over):
            return over
        if has_else:
            self._refuse("`else` of a `for` over a proxy", line, "write what follows the loop after it")
        return ForConstruct(self, over, bound, LoopNames(targets, augmented), line)

    def plain(self, construct: str, value: object, line: int) -> object:
        """A value that the construct needs now. Raises if it is a proxy."""
        if self.recorder.is_proxy(value):
            self._refuse(f"{construct} over a proxy", line, _ADVICE.get(construct, _ADVICE[""]))
        return value

    @property
    def depth(self) -> int:
        """How many constructs over proxies are open."""
        return len(self.opened)

    def leave(self, keyword: str, depth: int, line: int) -> None:
        """`break`, `continue` or `raise` out of everything opened above `depth`."""
        if len(self.opened) > depth:
            advice = "what runs there is decided by the engine, but this is Python and would happen always"
            self._refuse(f"`{keyword}` inside the {self.opened[-1].place}", line, advice)

    def caught(self, depth: int) -> None:
        """An exception handler starts. Raises if the exception left a construct over a proxy."""
        if len(self.opened) > depth:
            raise ControlFlowError(f"an exception left the {self.opened[-1].place}, which is over a proxy")

    # -- expressions -----------------------------------------------------------------------------------------------------

    def arm(self, test: object, bound: Bound, line: int) -> bool:
        """`... if test else ...`: whether to evaluate the first value."""
        self._branches.append(IfConstruct(self, "conditional expression", test, bound, line))
        return self._branches[-1].then

    def other_arm(self) -> bool:
        """Whether to evaluate the second value."""
        branch = self._branches[-1]
        if branch.symbolic:
            branch.switch()
        return branch.other

    def choice(self, first: object, second: object) -> object:
        """The value of the conditional expression."""
        branch = self._branches.pop()
        if not branch.symbolic:
            return first if branch.then else second
        return self._merge(branch, first, second)

    def operand(self, left: object, is_and: bool, bound: Bound, line: int) -> bool:
        """The left side of `and` or `or`: whether to evaluate the right one."""
        branch = IfConstruct(self, "`and`" if is_and else "`or`", left, bound, line)
        self._operands.append((branch, left, is_and))
        if branch.symbolic and not is_and:
            branch.switch()
        return branch.then if is_and else branch.other

    def connective(self, right: object) -> object:
        """The value of `left and right`, or `left or right`."""
        branch, left, is_and = self._operands.pop()
        if not branch.symbolic:
            return right if branch.then == is_and else left
        if is_and:
            branch.switch()
        return self._merge(branch, *((right, left) if is_and else (left, right)))

    def negation(self, value: object) -> object:
        """`not value`."""
        return self.recorder.logical_not(value) if self.recorder.is_proxy(value) else not value

    def contains(self, item: object, symbol: str, holder: object, line: int) -> object:
        """`item in holder`, `item not in holder`."""
        if self.recorder.is_proxy(item) or self.recorder.is_proxy(holder):
            self._refuse(f"`{symbol}` over a proxy", line, "use (x == y).any()")
        return _COMPARE[symbol](item, holder)

    def chain(
        self, symbols: tuple[str, ...], line: int, left: object, right: object, *later: Callable[[], object]
    ) -> object:
        """`a < b < c`: all but the last result have to be known."""
        result = self._compare(symbols[0], left, right, line)
        for symbol, operand in zip(symbols[1:], later, strict=True):
            if self.recorder.is_proxy(result):
                self._refuse("a chained comparison over a proxy", line, "write (a < b) & (b < c)")
            if not result:
                return result
            left, right = right, operand()
            result = self._compare(symbol, left, right, line)
        return result

    # -- the end ---------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The block has run. Raises if something swallowed an exception that left a construct over a proxy."""
        self.caught(0)

    def _compare(self, symbol: str, left: object, right: object, line: int) -> object:
        return self.contains(left, symbol, right, line) if symbol.endswith("in") else _COMPARE[symbol](left, right)

    def _merge(self, branch: IfConstruct, first: object, second: object) -> object:
        if first is not second and not (self.recorder.can_merge(first) and self.recorder.can_merge(second)):
            kinds = f"{type(first).__name__} and {type(second).__name__}"
            raise ControlFlowError(f"the two values of the {branch.place} can't be merged: {kinds}")
        results = [] if first is second else [(first, second)]
        merged = branch.finish(results)
        return merged[0] if merged else first

    def _refuse(self, what: str, line: int, advice: str) -> Never:
        raise ControlFlowError(f"{self.filename}:{line}: {what} can't be recorded: {advice}")


_ADVICE = {
    "": "its value isn't known while recording; use `if` or `tracer.cond`",
    "`while`": "its value isn't known while recording; use `for` over a range or a proxy, or `tracer.iter`",
    "a comprehension": "use `for` with nv.list().append()",
}
