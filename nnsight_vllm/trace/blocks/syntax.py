"""What a block's syntax tree says about it: whether control flow could be over a proxy, and which names it binds.

Only the block's own scope counts. The bodies of functions, lambdas and classes defined inside it belong to others;
their decorators, defaults and bases run in the block. Comprehensions run in the block but keep their loop variables.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence

Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
SCOPE_METHODS = frozenset({"cond", "else_"})
_SUSPENDS = {
    ast.Return: "return",
    ast.Yield: "yield",
    ast.YieldFrom: "yield from",
    ast.Await: "await",
    ast.AsyncFor: "async for",
    ast.AsyncWith: "async with",
}


def walk(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Every node that runs in the block itself, in source order."""
    for node in nodes:
        yield node
        yield from walk(_own_children(node))


def needs_rewriting(block: Sequence[ast.stmt]) -> bool:
    """Whether the block holds control flow that could be over a proxy."""
    return any(_could_branch(node) for node in walk(block))


def bound_names(nodes: Sequence[ast.AST]) -> dict[str, int]:
    """The names that the nodes bind or delete in the block's scope, each with the first line that does."""
    found: dict[str, int] = {}
    for name, line in _bindings(nodes):
        found.setdefault(name, line)
    return found


def augmented_names(nodes: Sequence[ast.AST]) -> set[str]:
    """The names that the nodes bind by `name += ...` and its kind only."""
    targets = [node.target for node in walk(nodes) if isinstance(node, ast.AugAssign)]
    augmented = Counter(target.id for target in targets if isinstance(target, ast.Name))
    everywhere = Counter(name for name, _ in _bindings(nodes))
    return {name for name, times in augmented.items() if times == everywhere[name]}


def obstacle(block: Sequence[ast.stmt]) -> tuple[str, int] | None:
    """The first thing, with its line, that only runs in the user's own frame: `return`, `yield`, a `break` outwards."""
    for node in walk(block):
        if type(node) in _SUSPENDS:
            return _SUSPENDS[type(node)], _line(node)
        if isinstance(node, ast.comprehension) and node.is_async:
            return "an asynchronous comprehension", _line(node.target)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            return "import *", node.lineno
    return _loose_jump(block)


def first_line(statement: ast.AST) -> int:
    """The line at which the statement starts to run: its first decorator's, or its own."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([_line(statement), *(decorator.lineno for decorator in decorators)])


def is_silent(statement: ast.stmt) -> bool:
    """Whether the statement itself runs nothing before what is inside it or follows it."""
    match statement:
        case ast.Try() | ast.TryStar() | ast.Global() | ast.Nonlocal() | ast.AnnAssign(value=None):
            return True
        case ast.While(test=ast.Constant()) | ast.If(test=ast.Constant()):
            return True
    return False


def _own_children(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [*node.decorator_list, *_defaults(node.args)]
    if isinstance(node, ast.Lambda):
        return _defaults(node.args)
    if isinstance(node, ast.ClassDef):
        return [*node.decorator_list, *node.bases, *node.keywords]
    return list(ast.iter_child_nodes(node))


def _defaults(arguments: ast.arguments) -> list[ast.AST]:
    return [*arguments.defaults, *(default for default in arguments.kw_defaults if default is not None)]


def _could_branch(node: ast.AST) -> bool:
    match node:
        case ast.If() | ast.While() | ast.IfExp() | ast.BoolOp() | ast.Assert() | ast.Match():
            return True
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Compare():
            return len(node.ops) > 1 or isinstance(node.ops[0], ast.In | ast.NotIn)
        case ast.For() | ast.comprehension():
            return not _is_plain_iterable(node.iter) or bool(getattr(node, "ifs", None))
        case ast.With():
            return any(_is_scope(item.context_expr) for item in node.items)
    return False


def _is_plain_iterable(node: ast.expr) -> bool:
    """`range(...)`, a display or a literal: never a proxy."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "range"
    return isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict | ast.Constant)


def _is_scope(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SCOPE_METHODS


def _bindings(nodes: Sequence[ast.AST]) -> Iterator[tuple[str, int]]:
    for node in nodes:
        yield from _bound_by(node)
        if isinstance(node, Comprehension):
            inner = (part for part in walk([node]) if isinstance(part, ast.NamedExpr))
            yield from ((part.target.id, part.lineno) for part in inner)
        else:
            yield from _bindings(_own_children(node))


def _bound_by(node: ast.AST) -> Iterator[tuple[str, int]]:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name, node.lineno
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name, node.lineno
        case ast.alias():
            yield node.asname or node.name.partition(".")[0], node.lineno
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name, _line(node)
        case ast.MatchMapping(rest=str(name)):
            yield name, node.lineno


def _loose_jump(block: Sequence[ast.stmt]) -> tuple[str, int] | None:
    """A `break` or `continue` whose loop isn't inside the block."""
    for node in block:
        if isinstance(node, ast.Break | ast.Continue):
            return type(node).__name__.lower(), node.lineno
        inner = node.orelse if isinstance(node, ast.For | ast.While) else _statements(node)
        if (found := _loose_jump(inner)) is not None:
            return found
    return None


def _statements(node: ast.AST) -> list[ast.stmt]:
    """The statements nested in this one, at any depth of handlers and cases, that run in the same scope."""
    found: list[ast.stmt] = []
    for child in _own_children(node):
        found += [child] if isinstance(child, ast.stmt) else []
        if isinstance(child, ast.ExceptHandler | ast.match_case):
            found += child.body
    return found


def _line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 0))
