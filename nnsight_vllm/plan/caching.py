"""How a graph and the prefix cache may meet: whose blocks a request may read, and who may read its own.

A block of the cache holds what the model made of some tokens and all tokens before them. A graph that changes nothing but
logits and samples leaves it as it is. One that changes rows makes blocks of its own kind, which may be shared as far as a row
depends on the same things, by `salt`:

    NONE      the graph changes no rows: plain blocks
    GRAPH     every row, of prompt and answer alike, is changed by itself and in the same way
    LENGTH    every row of the prompt is changed by itself, but which, or how, may depend on the prompt's length
    PROMPT    a row may depend on any other: only the same prompt
    UNIQUE    random numbers: nobody

`reads`: blocks found in the cache may stand for rows of the prompt, because the graph looks at none of them.

This is decided by running the graph on kinds of values. Where a kind isn't known to be harmless, it counts as `MIXED`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from nnsight_vllm.graph.check import refs
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Dots,
    Graph,
    Iterations,
    List,
    Log,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Stop,
    Tuple,
    Write,
)
from nnsight_vllm.graph.ops import MAY_CHANGE, RANDOM, changes_container, is_inplace
from nnsight_vllm.plan.rows import Kind, is_fresh, rule_of

DRAWN = frozenset(["logits.output", "samples.output"])
_FULL = Slice()
_REDUCING = frozenset(["sum", "mean", "amax", "amin", "prod", "std", "var", "norm", "argmax", "argmin", "any", "all"])
_KEEPING = frozenset(["softmax", "log_softmax", "cumsum", "cumprod", "normalize"])
_CONTAINERS = frozenset(["py.list", "py.dict", "py.tuple"])


class Salt(enum.Enum):
    NONE = "none"
    GRAPH = "graph"
    LENGTH = "length"
    PROMPT = "prompt"
    UNIQUE = "unique"


@dataclass(frozen=True)
class Caching:
    salt: Salt
    reads: bool


class _Of(enum.Enum):
    """What a value is made of: constants, each row of its own, the last row, or something else."""

    CONSTANT = "constant"
    ROWS = "rows"
    LAST = "last"
    MIXED = "mixed"


@dataclass(frozen=True)
class _Value:
    """`dims`: dimensions, that of rows not counted. `needs_prompt`: rows of the prompt are in it."""

    of: _Of
    dims: int = 0
    needs_prompt: bool = False
    is_own: bool = False  # a container, or something the graph made for itself
    is_late: bool = False  # known only behind all of the prompt's sites


_NUMBER = _Value(_Of.CONSTANT)


def caching_of(graph: Graph, trailing: Callable[[str], int], rank: Callable[[str], int]) -> Caching:
    """`trailing`: dimensions of a site's value after the rows; `rank`: those of a constant, by its digest."""
    reader = _Reader(trailing, rank)
    reader.block(graph.body, _Where())
    if reader.is_random and reader.writes:
        return Caching(Salt.UNIQUE, False)
    if reader.may_break_off and reader.writes:  # a row may have got some of its edits and not the others
        reader.writes = {Salt.PROMPT}
    if reader.may_fail_late and reader.writes:  # and rows of the answer none
        reader.writes.add(Salt.LENGTH)
    if reader.changes_own:  # what a name stood for when it was looked at may not be what it stands for later
        reader.needs_prompt |= reader.reads_prompt
        reader.writes = {Salt.PROMPT} if reader.writes else set()
    salt = max(reader.writes, key=_STRICTNESS.index, default=Salt.NONE)
    return Caching(salt, salt is not Salt.PROMPT and not reader.needs_prompt)


_STRICTNESS = [Salt.GRAPH, Salt.LENGTH, Salt.PROMPT]


@dataclass(frozen=True)
class _Where:
    """`is_prompt`: iteration 0 comes here. `is_every`: all iterations do. `is_sure`: not in a branch or loop."""

    is_prompt: bool = True
    is_every: bool = False
    is_sure: bool = True

    def at(self, iteration: int | None) -> _Where:
        return self if iteration is None else replace(self, is_prompt=iteration == 0, is_every=False)


class _Reader:
    """Runs a graph on kinds. `writes`: for each write to rows the salt that it needs."""

    def __init__(self, trailing: Callable[[str], int], rank: Callable[[str], int]) -> None:
        self._trailing = trailing
        self._rank = rank
        self._values: dict[int, _Value] = {}
        self.writes: set[Salt] = set()
        self.needs_prompt = False
        self.reads_prompt = False
        self.changes_own = False
        self.is_random = False
        self.may_break_off = False  # between two sites of the prompt
        self.may_fail_late = False  # behind them

    def block(self, block: Block, where: _Where) -> None:
        for node in block.nodes:
            self._node(node, where)

    def _node(self, node: Node, where: _Where) -> None:
        match node:
            case Read():
                self._values[node.id] = self._read(node.site, where.at(node.iteration))
            case Write():
                self._write(
                    node.site, self._site(node.site, where.at(node.iteration)), [node.value], where.at(node.iteration)
                )
            case Const():
                self._values[node.id] = _Value(_Of.CONSTANT, self._rank(node.digest))
            case Op():
                self._values[node.id] = self._op(node, where)
            case Stop():
                self._break_off(where.is_prompt)
            case Call():
                self._values[node.id] = self._unknown(node.args, where)
            case Save(value=value):
                self._send([value])
            case Log(args=args):
                self._send(args)
            case Cond():
                self._use([node.test])
                for inner in (node.then, node.orelse):
                    self.block(inner, replace(where, is_sure=False))
                self._hand_on(node.outs, [*node.then.yields, *node.orelse.yields])
            case Loop():
                self._use([node.over])
                self._hand_on([node.item, *node.carried], [node.over, *node.inits])
                self.block(node.body, replace(where, is_sure=False))
                self._hand_on(node.outs, [*node.inits, *node.body.yields])
            case Iterations():
                self._pass_over()
                self._values[node.index] = _Value(_Of.MIXED)
                is_every = (node.start, node.stop, node.step) == (0, None, 1)
                self.block(node.body, replace(where, is_prompt=node.start == 0, is_every=is_every))
                self._pass_over()

    # -- sites -------------------------------------------------------------------------------------------------------

    def _site(self, site: str, where: _Where) -> _Value:
        if site in DRAWN:
            self.may_fail_late = True
            return _Value(_Of.MIXED, is_late=True)
        return _Value(_Of.ROWS, self._trailing(site), where.is_prompt, is_late=not where.is_prompt)

    def _read(self, site: str, where: _Where) -> _Value:
        self.reads_prompt |= where.is_prompt and site not in DRAWN
        return self._site(site, where)

    def _write(self, site: str, target: _Value, args: Iterable[Arg], where: _Where) -> None:
        """`args`: what the new value is made of, beside the old one."""
        if site in DRAWN:
            self._use(args)
            return
        is_alone = where.is_sure and target.of in (_Of.ROWS, _Of.LAST)
        for arg in args:
            is_alone = is_alone and _fits(self._value(arg), target)
        if not (is_alone and where.is_prompt):
            self._use(args)
        if where.is_every and is_alone and target.of is _Of.ROWS:
            self.writes.add(Salt.GRAPH)
        elif is_alone or not where.is_prompt:
            self.writes.add(Salt.LENGTH)
        else:
            self.writes.add(Salt.PROMPT)

    # -- operations --------------------------------------------------------------------------------------------------

    def _op(self, node: Op, where: _Where) -> _Value:
        name = node.name.partition(".")[2]
        self.is_random |= node.name in RANDOM
        if node.writes is not None:
            return self._change(node, where)
        target = self._value(node.args[0]) if node.args else _NUMBER
        if node.name in _CONTAINERS or (changes_container(node.name) and target.is_own and target.of is _Of.MIXED):
            self._send(node.args)
            return _Value(_Of.MIXED, is_own=True)
        if is_inplace(node.name) or node.name in MAY_CHANGE or "out" in node.kwargs:
            self._change_unknown(node, target, where)
            return target
        args = [*node.args, *node.kwargs.values()]
        found = self._computed(node, name, target, args) or self._unknown(args, where)
        return replace(found, is_own=is_fresh(node.name))

    def _computed(self, node: Op, name: str, target: _Value, args: list[Arg]) -> _Value | None:
        if node.name == "py.getitem" and len(node.args) == 2:
            return self._part(target, node.args[1])
        match rule_of(node.name).kind:
            case Kind.POINTWISE:
                return self._pointwise(args)
            case Kind.MATMUL:
                return self._product(node)
            case Kind.LAST if name in _REDUCING | _KEEPING:
                return self._along(node, name, target)
            case _:
                return None

    def _change(self, node: Op, where: _Where) -> _Value:
        """In place, on a site."""
        assert node.writes is not None
        target = self._value(node.args[0]) if node.args else _Value(_Of.MIXED)
        kind = rule_of(node.name).kind
        rest: list[Arg] = [*node.args[1:], *node.kwargs.values()]
        is_known = kind is Kind.POINTWISE or node.name.startswith("edit.")
        if node.name == "py.setitem" and len(node.args) == 3:
            part = self._part(target, node.args[1])
            target, rest, is_known = part or _Value(_Of.MIXED), node.args[2:], part is not None
        if node.name.startswith("edit."):  # its matrices act on each row
            rest = [arg for arg in rest if self._value(arg).of is not _Of.CONSTANT]
        self._write(node.writes, target if is_known else _Value(_Of.MIXED), rest, where)
        return target

    def _unknown(self, args: Iterable[Arg], where: _Where) -> _Value:
        """The result of an operation that isn't followed, and that may fail for some values."""
        args = list(args)
        is_late = not where.is_prompt or any(self._is_late(arg) for arg in args)
        self._break_off(not is_late)
        return replace(self._mixed(args), is_late=is_late)

    def _break_off(self, is_prompt: bool) -> None:
        self.may_break_off |= is_prompt
        self.may_fail_late = True

    def _send(self, args: Iterable[Arg]) -> None:
        self.may_fail_late = True
        self._use(args)

    def _change_unknown(self, node: Op, target: _Value, where: _Where) -> None:
        """In place, on a value that may be the graph's own, or a view of a site that the recorder couldn't see."""
        self.changes_own = True
        self._break_off(where.is_prompt and not target.is_late)
        if not target.is_own:
            self.writes.add(Salt.PROMPT)
        self._use([*node.args[1:], *node.kwargs.values()])

    def _pointwise(self, args: list[Arg]) -> _Value | None:
        values = [self._value(arg) for arg in args]
        made = [value for value in values if value.of is not _Of.CONSTANT]
        if not made:
            return _Value(_Of.CONSTANT, max((value.dims for value in values), default=0))
        if not all(_fits(value, made[0]) for value in values):
            return None
        return replace(made[0], needs_prompt=any(value.needs_prompt for value in made))

    def _product(self, node: Op) -> _Value | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = (self._value(arg) for arg in node.args)
        if left.of not in (_Of.ROWS, _Of.LAST) or left.dims != 1 or right.of is not _Of.CONSTANT:
            return None
        return replace(left, dims=right.dims - 1) if right.dims in (1, 2) else None

    def _along(self, node: Op, name: str, target: _Value) -> _Value | None:
        """Over the last dimension of each row, where it says so and has one."""
        at = rule_of(node.name).dim
        dim = node.kwargs.get("dim", node.args[at] if len(node.args) > at else None)
        others = [arg for key, arg in node.kwargs.items() if key not in ("dim", "keepdim")]
        if dim != -1 or target.dims < 1 or target.of not in (_Of.ROWS, _Of.LAST) or others or len(node.args) > at + 1:
            return None
        keeps = name in _KEEPING or node.kwargs.get("keepdim") is True
        return replace(target, dims=target.dims - (0 if keeps else 1))

    def _part(self, target: _Value, key: Arg) -> _Value | None:
        """`target[key]`, where that's columns of all rows, or the last row."""
        items = key.items if isinstance(key, Tuple) else [key]
        if target.of is not _Of.ROWS or not items:
            return None
        dims = target.dims
        for item in items[1:]:
            if item is not None and type(item) not in (int, Slice, Dots):
                return None
            dims += 1 if item is None else -1 if type(item) is int else 0
        if items[0] == _FULL and dims >= 0:
            return replace(target, dims=dims)
        if type(items[0]) is int and items[0] == -1 and dims >= 0:
            return _Value(_Of.LAST, dims)
        return None

    # -- values ------------------------------------------------------------------------------------------------------

    def _value(self, arg: Arg) -> _Value:
        match arg:
            case Ref():
                return self._values.get(arg.id, _Value(_Of.MIXED))
            case List() | Tuple():
                return _NUMBER if not any(True for _ in refs(arg)) else self._mixed([arg])
            case _:
                return self._mixed([arg]) if any(True for _ in refs(arg)) else _NUMBER

    def _mixed(self, args: Iterable[Arg]) -> _Value:
        return _Value(_Of.MIXED, needs_prompt=self._has_prompt(args))

    def _has_prompt(self, args: Iterable[Arg]) -> bool:
        return any(self._values[id].needs_prompt for arg in args for id in refs(arg) if id in self._values)

    def _is_late(self, arg: Arg) -> bool:
        return any(self._values[id].is_late for id in refs(arg) if id in self._values)

    def _use(self, args: Iterable[Arg]) -> None:
        """Something else than the rows themselves comes to depend on these."""
        self.needs_prompt |= self._has_prompt(args)

    def _hand_on(self, ids: Iterable[int], args: list[Arg]) -> None:
        value = _Value(_Of.MIXED, needs_prompt=self._has_prompt(args))
        self._values.update(dict.fromkeys(ids, value))

    def _pass_over(self) -> None:
        """Values go from one iteration to others: rows of one aren't those of another."""
        for id, value in self._values.items():
            if value.of is not _Of.CONSTANT:
                self._values[id] = replace(value, of=_Of.MIXED)


def _fits(value: _Value, target: _Value) -> bool:
    """Whether an element of the target meets only what belongs to its own row."""
    if value.of is _Of.CONSTANT:
        return value.dims <= target.dims
    return value.of is target.of and value.dims == target.dims
