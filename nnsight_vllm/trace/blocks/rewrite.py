"""Rewrites a block so that its control flow asks the runtime in `control.py` before it branches.

A syntax tree goes in, one comes out. Each statement keeps its line; what is added is put on the line of the construct
it serves, or on no line at all, so that tracebacks, coverage and breakpoints see the user's source. Over plain Python
values the rewritten code takes the same path and evaluates the same things in the same order.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from nnsight_vllm.trace.blocks.snippets import RUNTIME, assign, at, attribute, call, const, either, name, thunk, when
from nnsight_vllm.trace.blocks.syntax import augmented_names, bound_names, walk

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


def rewrite(block: Sequence[ast.stmt], mangle: Callable[[str], str], first_argument: str | None) -> list[ast.stmt]:
    """The block's rewritten copy. `mangle` gives a name as the frame has it; `first_argument` serves `super()`."""
    return _Statements(mangle, first_argument).block(copy.deepcopy(list(block)))


class _Expressions(ast.NodeTransformer):
    """Expressions, wherever they stand in the block. Bodies of functions, lambdas and classes stay as they are."""

    def __init__(self, mangle: Callable[[str], str], first_argument: str | None) -> None:
        self._mangle = mangle
        self._first_argument = first_argument

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        opened = call("arm", self.visit(node.test), self._bound([node.body, node.orelse]), const(node.lineno))
        first = either(at(opened, node.test), self.visit(node.body))
        second = either(at(call("other_arm"), node.test), self.visit(node.orelse))
        return at(call("choice", first, second), node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        left, rest = node.values[0], node.values[1:]
        right = rest[0] if len(rest) == 1 else at(ast.BoolOp(op=node.op, values=rest), rest[0], rest[-1])
        is_and, bound = const(isinstance(node.op, ast.And)), self._bound([right])
        opened = at(call("operand", self.visit(left), is_and, bound, const(node.lineno)), left)
        return at(call("connective", either(opened, self.visit(right))), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return at(call("negation", node.operand), node) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) > 1:
            return self._chain(node)
        if not isinstance(node.ops[0], ast.In | ast.NotIn):
            return node
        operator = const(_OPERATORS[type(node.ops[0])])
        return at(call("contains", node.left, operator, node.comparators[0], const(node.lineno)), node)

    def visit_comprehension(self, node: ast.comprehension) -> ast.comprehension:
        self.generic_visit(node)
        node.iter = self._plain("a comprehension", node.iter)
        node.ifs = [self._plain("the `if` of a comprehension", test) for test in node.ifs]
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        is_bare_super = isinstance(node.func, ast.Name) and node.func.id == "super" and not (node.args or node.keywords)
        if is_bare_super and self._first_argument is not None:
            node.args = [name("__class__"), name(self._first_argument)]
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        self._defaults(node.args)
        return node

    def _chain(self, node: ast.Compare) -> ast.expr:
        """`a < b < c`. Operands that bind names stay as they are: a lambda would keep the names to itself."""
        later = node.comparators[1:]
        if any(isinstance(part, ast.NamedExpr) for part in walk(later)):
            return node
        operators = const(tuple(_OPERATORS[type(operator)] for operator in node.ops))
        operands = [node.left, node.comparators[0], *(thunk(operand) for operand in later)]
        return at(call("chain", operators, const(node.lineno), *operands), node)

    def _plain(self, construct: str, value: ast.expr) -> ast.expr:
        """The value, which the construct needs while the block is recorded."""
        return at(call("plain", const(construct), value, const(value.lineno)), value)

    def _bound(self, nodes: Sequence[ast.AST]) -> ast.expr:
        """The names that the nodes bind, as a constant of (name, line) pairs."""
        return const(tuple((self._mangle(bound), line) for bound, line in bound_names(nodes).items()))

    def _mangled(self, names: Iterable[str]) -> ast.expr:
        return const(tuple(sorted(map(self._mangle, names))))

    def _defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self.visit(default) for default in arguments.defaults]
        arguments.kw_defaults = [
            self.visit(default) if default is not None else None for default in arguments.kw_defaults
        ]


class _Statements(_Expressions):
    """Statements. A construct over a proxy opens a block in the runtime; jumps out of one are checked as they run."""

    def __init__(self, mangle: Callable[[str], str], first_argument: str | None) -> None:
        super().__init__(mangle, first_argument)
        self._numbers = count()
        # The variables that hold how many blocks were open where the enclosing loops, and `try` statements, start.
        self._loops: list[str] = []
        self._tries: list[str] = []

    def block(self, statements: Iterable[ast.stmt]) -> list[ast.stmt]:
        """A suite. A `with ... as c` and the `with c.else_()` right after it become one construct."""
        rest, done = list(statements), list[ast.stmt]()
        while rest:
            statement = rest.pop(0)
            if isinstance(statement, ast.With):
                following = rest[0] if rest else None
                other = following if isinstance(following, ast.With) and _is_else_of(following, statement) else None
                del rest[: other is not None]
                done += self._with(statement, other)
            else:
                visited = self.visit(statement)
                done += visited if isinstance(visited, list) else [visited]
        return done

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        branch, bound = self._temp(), self._bound([*node.body, *node.orelse])
        test = at(call("branch", self.visit(node.test), bound, const(node.lineno)), node, node.test)
        then = ast.If(test=at(attribute(branch, "then"), node, node.test), body=self.block(node.body), orelse=[])
        statements = [at(assign(branch, test), node, node.test), at(then, node), _ask(branch, "switch", node)]
        if node.orelse:
            statements.append(when(branch, "other", self.block(node.orelse)))
        return [*statements, _ask(branch, "done", node)]

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        bound, targets = self._bound([node.target, *node.body]), self._mangled(bound_names([node.target]))
        augmented = self._mangled(augmented_names([node.target, *node.body]))
        arguments = [self.visit(node.iter), bound, targets, augmented, const(bool(node.orelse)), const(node.lineno)]
        node.iter = at(call("loop", *arguments), node.iter)
        node.target = self.visit(node.target)
        return self._looping(node)

    def visit_While(self, node: ast.While) -> list[ast.stmt]:
        node.test = self._plain("`while`", self.visit(node.test))
        return self._looping(node)

    def visit_Break(self, node: ast.Break) -> list[ast.stmt]:
        return [self._leave("break", self._loops, node), node]

    def visit_Continue(self, node: ast.Continue) -> list[ast.stmt]:
        return [self._leave("continue", self._loops, node), node]

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        self.generic_visit(node)
        return [self._leave("raise", self._tries, node), node]

    def visit_Try(self, node: ast.Try) -> list[ast.stmt]:
        return self._trying(node)

    def visit_TryStar(self, node: ast.TryStar) -> list[ast.stmt]:
        return self._trying(node)

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        node.test = self._plain("`assert`", self.visit(node.test))
        node.msg = self.visit(node.msg) if node.msg is not None else None
        return node

    def visit_Match(self, node: ast.Match) -> ast.stmt:
        node.subject = self._plain("`match`", self.visit(node.subject))
        for case in node.cases:
            case.guard = self._plain("a `case` guard", self.visit(case.guard)) if case.guard is not None else None
            case.body = self.block(case.body)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        """An annotated name can't be declared `nonlocal`: only the assignment stays."""
        if not isinstance(node.target, ast.Name):
            self.generic_visit(node)
            return node
        if node.value is None:
            return at(ast.Pass(), node)
        return at(ast.Assign(targets=[node.target], value=self.visit(node.value)), node)

    def visit_Global(self, node: ast.Global) -> ast.stmt:
        return at(ast.Pass(), node)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.stmt:
        return at(ast.Pass(), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.stmt:
        return self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.bases = [self.visit(base) for base in node.bases]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        self._defaults(node.args)
        return node

    def _with(self, node: ast.With, other: ast.With | None) -> list[ast.stmt]:
        """`with`, and the `.else_()` block that belongs to it."""
        scope, bodies = self._temp(), [*node.items[1:], *node.body, *(other.body if other is not None else [])]
        opened = at(call("scope", self._bound(bodies), const(node.lineno)), node, node.items[0].context_expr)
        statements = [at(assign(scope, opened), opened), self._watched(scope, node)]
        if other is not None:
            statements += [_ask(scope, "switch", other), self._watched(scope, other)]
        return [*statements, _ask(scope, "done", other or node)]

    def _watched(self, scope: str, node: ast.With) -> ast.stmt:
        """The statement with its first context shown to the runtime, and further ones nested inside it."""
        first, rest = node.items[0], node.items[1:]
        context = first.context_expr
        first.context_expr = at(call("watch", self.visit(context), on=scope), context)
        first.optional_vars = self.visit(first.optional_vars) if first.optional_vars is not None else None
        inner: list[ast.stmt] = [at(ast.With(items=rest, body=node.body), node)] if rest else node.body
        return at(ast.With(items=[first], body=self.block(inner)), node)

    def _looping(self, node: ast.For | ast.While) -> list[ast.stmt]:
        depth = self._temp()
        self._loops.append(depth)
        node.body = self.block(node.body)
        self._loops.pop()
        node.orelse = self.block(node.orelse)
        return [_remember_depth(depth, node), node]

    def _trying(self, node: ast.Try | ast.TryStar) -> list[ast.stmt]:
        depth = self._temp()
        self._tries += [depth] if node.handlers else []
        node.body = self.block(node.body)
        del self._tries[len(self._tries) - bool(node.handlers) :]
        for handler in node.handlers:
            handler.type = self.visit(handler.type) if handler.type is not None else None
            caught = at(call("caught", name(depth)), handler.body[0])
            handler.body = [at(ast.Expr(value=caught), caught), *self.block(handler.body)]
        node.orelse, node.finalbody = self.block(node.orelse), self.block(node.finalbody)
        return [_remember_depth(depth, node), node]

    def _leave(self, keyword: str, depths: list[str], node: ast.stmt) -> ast.stmt:
        depth = name(depths[-1]) if depths else const(0)
        return at(ast.Expr(value=at(call("leave", const(keyword), depth, const(node.lineno)), node)), node)

    def _temp(self) -> str:
        return f"_nns_{next(self._numbers)}"


def _ask(variable: str, method: str, node: ast.stmt) -> ast.stmt:
    """`if variable.symbolic: variable.method()`; only the call is on the node's line."""
    asked = at(call(method, on=variable), node)
    asked.end_lineno, asked.end_col_offset = node.lineno, node.col_offset
    return when(variable, "symbolic", [at(ast.Expr(value=asked), asked)])


def _remember_depth(variable: str, node: ast.stmt) -> ast.stmt:
    return at(assign(variable, at(attribute(RUNTIME, "depth"), node)), node)


def _is_else_of(node: ast.With, previous: ast.With) -> bool:
    """Whether `node` is `with c.else_():` where `previous` is `with ... as c:` or `with c:`."""
    last, call = previous.items[-1], node.items[0].context_expr
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "else_"):
        return False
    known = [part.id for part in (last.context_expr, last.optional_vars) if isinstance(part, ast.Name)]
    single = len(previous.items) == len(node.items) == 1
    return single and isinstance(call.func.value, ast.Name) and call.func.value.id in known
