"""Finds the syntax tree of the `with` statement that a frame is just entering.

The frame's current instruction carries the statement's position in the source; the source comes from `linecache`, so
files, notebook cells, doctests and registered generated code all work. Source that no longer belongs to the running
code (the file was edited since it was loaded) is recognised and refused.
"""

from __future__ import annotations

import ast
import dis
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType

from nnsight_vllm.trace.blocks.syntax import first_line, is_silent

SourceSpan = tuple[int | None, int | None, int | None, int | None]
_ENTERS = frozenset({"BEFORE_WITH"})
_MENTIONS = frozenset(dis.hasname + dis.haslocal + dis.hasfree + dis.hasconst)


@dataclass(frozen=True)
class Located:
    """A `with` statement. `body` is what runs after the frame's own item is entered, later items included."""

    statement: ast.With
    item: ast.withitem
    body: list[ast.stmt]
    first_line: int

    def starts_visibly(self) -> bool:
        """Whether the interpreter reports the body's start: on a line of its own, at something that can raise."""
        header = self.item.optional_vars or self.item.context_expr
        return self.first_line > (header.end_lineno or header.lineno) and not is_silent(self.body[0])

    @property
    def last_line(self) -> int:
        return self.statement.end_lineno or self.statement.lineno


def locate(frame: FrameType) -> Located | str:
    """The `with` statement that the frame is entering, or why it can't be had."""
    code = frame.f_code
    if dis.opname[code.co_code[frame.f_lasti]] not in _ENTERS:
        return "the context isn't entered by a `with` statement"
    reason = f"the source of {code.co_filename} can't be had"
    for refresh in (False, True):
        if refresh:
            linecache.checkcache(code.co_filename)
        tree = _parse(code.co_filename, "".join(linecache.getlines(code.co_filename, frame.f_globals)))
        found = _find(tree, code, frame.f_lasti) if tree is not None else None
        if found is not None and tree is not None and _is_current(tree, found, code):
            return found
        reason = f"the source of {code.co_filename} isn't what runs: it was changed" if tree is not None else reason
    return reason


@lru_cache(maxsize=64)
def _parse(filename: str, text: str) -> ast.Module | None:
    try:
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(text, filename, "exec", flags, dont_inherit=True) if text else None
    except (SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.Module) else None


def _find(tree: ast.Module, code: CodeType, offset: int) -> Located | None:
    """The item whose expression was evaluated by the instructions right before `offset`."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    items = {_position(item.context_expr): (node, item) for node in statements for item in node.items}
    headers = {_position(node) for node in statements}
    for position in reversed(list(code.co_positions())[: offset // 2 + 1]):
        if position in items:
            return _located(*items[position])
        if position not in headers:
            return None
    return None


def _position(node: ast.expr | ast.stmt) -> SourceSpan:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _located(statement: ast.With, item: ast.withitem) -> Located:
    rest = statement.items[statement.items.index(item) + 1 :]
    if not rest:
        return Located(statement, item, statement.body, first_line(statement.body[0]))
    inner = ast.copy_location(ast.With(items=rest, body=statement.body), statement)
    return Located(statement, item, [inner], rest[0].context_expr.lineno)


def _is_current(tree: ast.Module, found: Located, code: CodeType) -> bool:
    """Whether the source compiles to what runs, at least to a part of it (test runners add to `assert`, for one)."""
    entry = linecache.cache.get(code.co_filename)
    if entry is None or len(entry) == 1 or entry[1] is None:
        return True
    try:
        module = compile(tree, code.co_filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    twins = [twin for twin in _codes(module) if _identity(twin) == _identity(code)]
    lines = set(range(found.statement.lineno, found.last_line + 1)) - _assert_lines(found.statement)
    return any(_uses(twin, lines) <= _uses(code, lines) for twin in twins)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _identity(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _assert_lines(statement: ast.With) -> set[int]:
    asserts = [node for node in ast.walk(statement) if isinstance(node, ast.Assert)]
    return {line for node in asserts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def _uses(code: CodeType, lines: set[int]) -> set[tuple[int, object]]:
    """The names and plain constants that the instructions of these lines mention."""
    found: set[tuple[int, object]] = set()
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno if instruction.positions else None
        if line in lines and instruction.opcode in _MENTIONS:
            found |= {(line, part) for part in _plain(instruction.argval)}
    return found


def _plain(value: object) -> Sequence[object]:
    parts = value if isinstance(value, tuple) else (value,)
    return [repr(part) for part in parts if isinstance(part, str | int | float | bytes)]
