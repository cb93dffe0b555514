"""Small pieces of syntax tree that the rewriter adds to the user's code, each put at a place of the user's source.

`nowhere` marks code of no line: the interpreter runs it without telling tracers, so coverage and debuggers don't see it.
"""

from __future__ import annotations

import ast
from typing import TypeVar

RUNTIME = "__nns__"
SyntaxNode = TypeVar("SyntaxNode", bound=ast.stmt | ast.expr)


def at(node: SyntaxNode, start: ast.stmt | ast.expr, end: ast.stmt | ast.expr | None = None) -> SyntaxNode:
    """Put a new node at the place of `start`, or at the stretch from it to the end of `end`."""
    last = end or start
    node.lineno, node.col_offset = start.lineno, start.col_offset
    node.end_lineno, node.end_col_offset = last.end_lineno, last.end_col_offset
    return node


def nowhere(node: SyntaxNode) -> SyntaxNode:
    """Put a new node at no line."""
    node.lineno = node.end_lineno = node.col_offset = node.end_col_offset = -1
    return node


def const(value: object) -> ast.expr:
    return ast.Constant(value=value)  # type: ignore[arg-type]  # a tuple of tuples is a constant as well


def name(identifier: str) -> ast.expr:
    return ast.Name(id=identifier, ctx=ast.Load())


def attribute(variable: str, attr: str) -> ast.expr:
    return ast.Attribute(value=name(variable), attr=attr, ctx=ast.Load())


def assign(variable: str, value: ast.expr) -> ast.stmt:
    return ast.Assign(targets=[ast.Name(id=variable, ctx=ast.Store())], value=value)


def call(method: str, *arguments: ast.expr, on: str = RUNTIME) -> ast.expr:
    """`on.method(arguments)`; without `on` a call of the runtime."""
    return ast.Call(func=attribute(on, method), args=list(arguments), keywords=[])


def when(variable: str, flag: str, body: list[ast.stmt]) -> ast.stmt:
    """`if variable.flag: body`, where the test is on no line."""
    return nowhere(ast.If(test=nowhere(attribute(variable, flag)), body=body, orelse=[]))


def either(test: ast.expr, value: ast.expr) -> ast.expr:
    """`value if test else None`."""
    return at(ast.IfExp(test=test, body=value, orelse=const(None)), value)


def thunk(value: ast.expr) -> ast.expr:
    """`lambda: value`."""
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return at(ast.Lambda(args=nothing, body=value), value)
