"""Compiles a rewritten block into a code object that can stand in for the block in its frame.

The block becomes a function inside another one that owns the frame's names, so the compiler treats them as closure
variables; only the inner code is kept. It bears the caller's file, name and lines, and the caller's class for private
names.
"""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType

from nnsight_vllm.trace.blocks.frames import local_names
from nnsight_vllm.trace.blocks.rewrite import rewrite
from nnsight_vllm.trace.blocks.snippets import RUNTIME, call
from nnsight_vllm.trace.blocks.syntax import bound_names

_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"})
_FUTURE_FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_INNER, _OUTER = "body", "names"


@dataclass(frozen=True)
class Built:
    """A rewritten block. `code` takes the runtime; its free variables are names of the frame. `bound` are assigned.

    `entered_as` is the name that the `with` statement's `as` would bind, if that has to be done for it.
    """

    code: CodeType
    bound: tuple[str, ...]
    entered_as: str | None


def is_rewritten(code: CodeType) -> bool:
    """Whether the code is a block's rewritten body."""
    return code.co_varnames[:1] == (RUNTIME,)


def build(block: Sequence[ast.stmt], line: int, caller: CodeType, entered_as: str | None) -> Built:
    """Rewrite and compile the block of the `with` at `line`."""
    owner = _class_around(caller.co_qualname)
    mangle = _mangler(owner)
    own = _own_names(caller)
    entered_as = mangle(entered_as) if entered_as is not None else None
    bound = [mangle(name) for name in bound_names(block)] + ([entered_as] if entered_as is not None else [])
    body = [
        *_declarations(bound, own),
        *rewrite(block, mangle, _first_argument(caller)),
        ast.Expr(value=call("finish")),
    ]
    inner = _function(_INNER, [RUNTIME], body, line)
    outer: ast.stmt = _function(_OUTER, own, [inner], line)
    if owner:
        outer = ast.ClassDef(name=owner, bases=[], keywords=[], body=[outer], decorator_list=[])
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    flags = caller.co_flags & _FUTURE_FLAGS
    compiled = compile(module, caller.co_filename, "exec", flags, dont_inherit=True)
    return Built(_renamed(_body_of(compiled), caller), tuple(bound), entered_as)


def _class_around(qualname: str) -> str:
    """The class whose private names the code uses: the innermost part of its path that isn't a function."""
    parts = qualname.split(".")
    classes = [part for part, after in pairwise(parts) if "<locals>" not in (part, after)]
    return classes[-1] if classes and classes[-1].isidentifier() else ""


def _mangler(owner: str) -> Callable[[str], str]:
    prefix = owner.lstrip("_")

    def mangle(name: str) -> str:
        is_private = bool(prefix) and name.startswith("__") and not name.endswith("__")
        return f"_{prefix}{name}" if is_private else name

    return mangle


def _own_names(caller: CodeType) -> tuple[str, ...]:
    """The function's own names. A comprehension's variable can bear the name of a global: that one isn't."""
    if not caller.co_flags & inspect.CO_OPTIMIZED:
        return ()
    module = {instruction.argval for instruction in dis.get_instructions(caller) if instruction.opname in _GLOBAL_OPS}
    return tuple(name for name in local_names(caller) if name not in module and name.isidentifier())


def _declarations(bound: Iterable[str], own: Sequence[str]) -> list[ast.stmt]:
    local = sorted({name for name in bound if name in own})
    module = sorted({name for name in bound if name not in own})
    declared: list[ast.stmt] = [ast.Nonlocal(names=local)] if local else []
    return declared + ([ast.Global(names=module)] if module else [])


def _function(name: str, arguments: Sequence[str], body: list[ast.stmt], line: int) -> ast.FunctionDef:
    parameters = ast.arguments(
        posonlyargs=[], args=[ast.arg(arg=name) for name in arguments], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    return ast.FunctionDef(
        name=name,
        args=parameters,
        body=body,
        decorator_list=[],
        lineno=line,
        col_offset=0,
        end_lineno=line,
        end_col_offset=0,
    )


def _first_argument(caller: CodeType) -> str | None:
    """What `super()` without arguments takes, if the function has a `super()` at all."""
    return caller.co_varnames[0] if caller.co_argcount and "__class__" in caller.co_freevars else None


def _body_of(code: CodeType) -> CodeType:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return code if is_rewritten(code) else _body_of(inner[0])


def _renamed(code: CodeType, caller: CodeType) -> CodeType:
    """The code under the caller's name, and the functions in it as if they were the caller's."""
    is_function = bool(caller.co_flags & inspect.CO_OPTIMIZED)
    prefix = f"{caller.co_qualname}.<locals>." if is_function else ""
    inner = _moved(code, f"{code.co_qualname}.<locals>.", prefix)
    return inner.replace(co_name=caller.co_name, co_qualname=caller.co_qualname)


def _moved(code: CodeType, old: str, new: str) -> CodeType:
    """The code with the start of its qualified name, and of those inside it, changed."""
    consts = tuple(_moved(const, old, new) if isinstance(const, CodeType) else const for const in code.co_consts)
    qualname = new + code.co_qualname.removeprefix(old) if code.co_qualname.startswith(old) else code.co_qualname
    return code.replace(co_consts=consts, co_qualname=qualname)
