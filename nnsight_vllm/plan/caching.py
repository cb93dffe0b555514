"""How a graph and the prefix cache may meet: whose blocks a request may read, and who may read its own.

A block of the cache holds what the model made of some tokens and all tokens before them. A graph that changes nothing but
logits and samples leaves it as it is. One that changes rows makes blocks of its own kind, which may be shared as far as a row
depends on the same things, by `salt`:

    NONE      the graph changes no rows: plain blocks
    GRAPH     every row, of prompt and answer alike, is changed by itself and in the same way
    LENGTH    every row of the prompt is changed by itself, but which, or how, may depend on the prompt's length
    PROMPT    a row may depend on any other: only the same prompt
    UNIQUE    random numbers, or values of other requests: nobody

A row of the prompt that only its position tells (`h[2] = v`) is edited alike in every prompt that has it.

`most`: blocks found in the cache may stand for so many rows of the prompt, because the graph looks at none of them.

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
    Export,
    Graph,
    Import,
    Iterations,
    Log,
    Loop,
    Node,
    Op,
    Read,
    Save,
    Stop,
    Write,
)
from nnsight_vllm.graph.ops import RANDOM, changes_container
from nnsight_vllm.graph.walk import is_quiet
from nnsight_vllm.plan.effects import changes
from nnsight_vllm.plan.kinds import (
    CONTAINERS,
    NOTHING,
    NUMBER,
    Kinds,
    Of,
    ValueKind,
    fits,
    is_counted_from_the_end,
    is_drawn,
)
from nnsight_vllm.plan.rows import Kind, is_fresh, rule_of


class Salt(enum.Enum):
    NONE = "none"
    GRAPH = "graph"
    LENGTH = "length"
    PROMPT = "prompt"
    UNIQUE = "unique"


@dataclass(frozen=True)
class Caching:
    """`most`: how many tokens of the prompt may come from the cache; None: any number.

    `first`: the first row that is changed; blocks before it are plain ones, and the salt is theirs that come after.
    `has_parts`: rows of the prompt are named by their positions, so their numbers change with what comes from the cache.
    `breaks`: it may fail, or stop, between two sites of the prompt. `is_quiet`: as a program's.
    """

    salt: Salt
    most: int | None
    first: int = 0
    has_parts: bool = False
    breaks: bool = False
    is_quiet: bool = False


def caching_of(graph: Graph, trailing: Callable[[str], int], rank: Callable[[str], int], num_rows: int) -> Caching:
    """For a prompt of `num_rows` tokens; the others are those of `Kinds`."""
    reader = _Reader(trailing, rank, num_rows)
    reader.block(graph.body, _Where())
    if reader.is_unlike and reader.writes:
        return Caching(Salt.UNIQUE, min(reader.first, reader.needs), reader.first, reader.has_parts)
    if reader.may_break_off and reader.writes:  # a row may have got some of its edits and not the others
        reader.writes = {Salt.PROMPT}
    if reader.may_fail_late and reader.writes:  # and rows of the answer none
        reader.writes.add(Salt.LENGTH)
    if reader.changes_own:  # what a name stood for when it was looked at may not be what it stands for later
        reader.needs = 0 if reader.reads_prompt else reader.needs
        reader.writes = {Salt.PROMPT} if reader.writes else set()
    salt = max(reader.writes, key=_STRICTNESS.index, default=Salt.NONE)
    most = min(reader.first, reader.needs) if salt is Salt.PROMPT else reader.needs
    first = reader.first if reader.writes else 0
    found = Caching(salt, None if most == NOTHING else most, first, reader.has_parts)
    return replace(found, breaks=reader.may_break_off, is_quiet=is_quiet(graph))


_STRICTNESS = [Salt.GRAPH, Salt.LENGTH, Salt.PROMPT]


@dataclass(frozen=True)
class _Where:
    """`is_prompt`: iteration 0 comes here. `is_every`: all iterations do. `is_sure`: not in a branch or loop.

    `is_once`: not in a block that other iterations come to.
    """

    is_prompt: bool = True
    is_every: bool = False
    is_sure: bool = True
    is_once: bool = True

    def at(self, iteration: int | None) -> _Where:
        return self if iteration is None else replace(self, is_prompt=iteration == 0, is_every=False)


class _Reader(Kinds):
    """Runs a graph on kinds. `writes`: for each write to rows the salt that it needs.

    `needs`: the first row looked at; `first`: the first one written.
    """

    def __init__(self, trailing: Callable[[str], int], rank: Callable[[str], int], num_rows: int) -> None:
        super().__init__(trailing, rank, num_rows)
        self.writes: set[Salt] = set()
        self.needs = NOTHING
        self.first = NOTHING
        self.has_parts = False
        self.reads_prompt = False
        self.changes_own = False
        self.is_unlike = False  # what no other request can be known to have alike: random numbers, values of others
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
                self._values[node.id] = ValueKind(Of.CONSTANT, self._rank(node.digest))
            case Op():
                self._values[node.id] = self._op(node, where)
            case Stop():
                self._break_off(where.is_prompt)
            case Call():
                self._values[node.id] = self._unknown(node.args, where)
            case Import():  # of the other request's prompt, graph and sampling
                self.is_unlike = True
                self._values[node.id] = self._unknown([], where.at(node.iteration))
            case Save(value=value) | Export(value=value):
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
                self._values[node.index] = ValueKind(Of.MIXED)
                is_every = (node.start, node.stop, node.step) == (0, None, 1)
                self.block(node.body, replace(where, is_prompt=node.start == 0, is_every=is_every, is_once=False))
                self._pass_over()

    # -- sites -------------------------------------------------------------------------------------------------------

    def _site(self, site: str, where: _Where) -> ValueKind:
        if is_drawn(site):
            self.may_fail_late = True
            return ValueKind(Of.MIXED, is_late=True)
        return ValueKind(Of.ROWS, self._trailing(site), 0 if where.is_prompt else NOTHING, is_late=not where.is_prompt)

    def _read(self, site: str, where: _Where) -> ValueKind:
        self.reads_prompt |= where.is_prompt and not is_drawn(site)
        return self._site(site, where)

    def _write(self, site: str, target: ValueKind, args: Iterable[Arg], where: _Where) -> None:
        """`args`: what the new value is made of, beside the old one."""
        if is_drawn(site):
            self._use(args)
            return
        self.first = min(self.first, self._first_of(target, where))
        is_alone = where.is_sure and target.is_rows
        for arg in args:
            is_alone = is_alone and fits(self.value(arg), target)
        if not (is_alone and where.is_prompt):
            self._use(args)
        is_fixed = target.part is not None and target.part.is_fixed and where.is_once and not target.is_late
        if is_alone and (is_fixed or (where.is_every and target.of is Of.ROWS)):
            self.writes.add(Salt.GRAPH)
        elif is_alone or not where.is_prompt:
            self.writes.add(Salt.LENGTH)
        else:
            self.writes.add(Salt.PROMPT)

    def _first_of(self, target: ValueKind, where: _Where) -> int:
        """The first row that a write to this may change."""
        if target.is_late or not where.is_prompt:
            return self._num_rows
        return target.part.start if target.of is Of.PART and target.part is not None else 0

    # -- operations --------------------------------------------------------------------------------------------------

    def _op(self, node: Op, where: _Where) -> ValueKind:
        self.is_unlike |= node.name in RANDOM
        if node.writes is not None:
            return self._change(node, where)
        target = self.value(node.args[0]) if node.args else NUMBER
        if node.name in CONTAINERS or (changes_container(node.name) and target.is_own and target.of is Of.MIXED):
            self._send(node.args)
            return ValueKind(Of.MIXED, is_own=True)
        if changes(node):
            self._change_unknown(node, target, where)
            return target
        args = [*node.args, *node.kwargs.values()]
        found = self.computed(node) or self._unknown(args, where)
        return replace(found, is_own=is_fresh(node.name))

    def _change(self, node: Op, where: _Where) -> ValueKind:
        """In place, on a site."""
        assert node.writes is not None
        target = self.value(node.args[0]) if node.args else ValueKind(Of.MIXED)
        kind = rule_of(node.name).kind
        rest: list[Arg] = [*node.args[1:], *node.kwargs.values()]
        is_known = kind is Kind.POINTWISE or node.name.startswith("edit.")
        if node.name == "py.setitem" and len(node.args) == 3:
            part = self.part(target, node.args[1])
            target, rest, is_known = part or ValueKind(Of.MIXED), node.args[2:], part is not None
        if node.name.startswith("edit."):  # its matrices act on each row
            rest = [arg for arg in rest if self.value(arg).of is not Of.CONSTANT]
        self._write(node.writes, target if is_known else ValueKind(Of.MIXED), rest, where)
        return target

    def _unknown(self, args: Iterable[Arg], where: _Where) -> ValueKind:
        """The result of an operation that isn't followed, and that may fail for some values."""
        args = list(args)
        is_late = not where.is_prompt or any(self._is_late(arg) for arg in args)
        self._break_off(not is_late)
        return replace(self.mixed(args), is_late=is_late)

    def _break_off(self, is_prompt: bool) -> None:
        self.may_break_off |= is_prompt
        self.may_fail_late = True

    def _send(self, args: Iterable[Arg]) -> None:
        self.may_fail_late = True
        self._use(args)

    def _change_unknown(self, node: Op, target: ValueKind, where: _Where) -> None:
        """In place, on a value that may be the graph's own, or a view of a site that the recorder couldn't see."""
        self.changes_own = True
        self._break_off(where.is_prompt and not target.is_late)
        if not target.is_own:
            self.writes.add(Salt.PROMPT)
            self.first = 0
        self._use([*node.args[1:], *node.kwargs.values()])

    def part(self, target: ValueKind, key: Arg) -> ValueKind | None:
        found = super().part(target, key)
        is_numbered = target.of is Of.ROWS and not target.is_late and not is_counted_from_the_end(key)
        if found is not None and found.of is Of.PART and is_numbered:
            self.has_parts = True
        return found

    # -- values ------------------------------------------------------------------------------------------------------

    def _is_late(self, arg: Arg) -> bool:
        return any(self._values[id].is_late for id in refs(arg) if id in self._values)

    def _use(self, args: Iterable[Arg]) -> None:
        """Something else than the rows themselves comes to depend on these."""
        self.needs = min(self.needs, self.needs_of(args))

    def _hand_on(self, ids: Iterable[int], args: list[Arg]) -> None:
        value = self.mixed(args)
        self._values.update(dict.fromkeys(ids, value))

    def _pass_over(self) -> None:
        """Values go from one iteration to others: rows of one aren't those of another."""
        for id, value in self._values.items():
            if value.of is not Of.CONSTANT:
                self._values[id] = replace(value, of=Of.MIXED)
