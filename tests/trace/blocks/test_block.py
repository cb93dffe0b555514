"""A rewritten block is the user's code in the user's frame: names, closures, errors, lines, tracing, generators."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import json
import linecache
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_recorder import Trace

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks import block

TESTS = Path(__file__).resolve().parent.parent
module_level = "module"


def always() -> bool:
    return True


# -- which blocks are rewritten ------------------------------------------------------------------------------------------


def test_a_block_without_control_flow_runs_natively() -> None:
    with Trace() as t:
        x = [i for i in range(3)]
        for _ in range(2):
            x.append(0)

        def function(a: int) -> int:
            return a if a else 0

    assert not t.was_rewritten and x == [0, 1, 2, 0, 0] and function(1) == 1


def test_inner_blocks_of_a_rewritten_one_are_not_rewritten_again() -> None:
    with Trace() as t:
        inner = []
        for i in range(3):
            with Trace(t.recorder) as one:
                if one.value(i) > 1:
                    pass
            inner.append(one)
    assert t.was_rewritten and not any(one.was_rewritten for one in inner)
    assert t.recorder.calls == ["cond"] * 3


def test_code_without_source_runs_natively_and_says_why() -> None:
    namespace: dict[str, Any] = {"Trace": Trace}
    exec("with Trace() as t:\n if len('a') == 1:\n  x = 1", namespace)
    assert namespace["x"] == 1 and not namespace["t"].was_rewritten
    with pytest.raises(ControlFlowError, match="the source of <string> can't be had"):
        exec("with Trace() as t:\n if t.value(1) > 0:\n  x = 1", namespace)


def test_generated_code_with_registered_source_is_rewritten() -> None:
    source = "x = 1\nwith Trace() as t:\n    if t.value(1) > 0:\n        x = 2\n"
    linecache.cache["<made>"] = (len(source), None, source.splitlines(True), "<made>")
    namespace: dict[str, Any] = {"Trace": Trace}
    exec(compile(source, "<made>", "exec"), namespace)
    assert namespace["x"] == 2


def test_a_class_body_runs_natively_and_says_why() -> None:
    class Holder:
        with Trace() as t:
            if always():
                x = 1

    assert Holder.x == 1
    with pytest.raises(ControlFlowError, match="class body"):

        class Other:
            with Trace() as t:
                if t.value(1) > 0:
                    x = 1


def test_a_context_entered_without_a_with_statement_runs_natively_and_says_why() -> None:
    with contextlib.ExitStack() as stack:
        t = stack.enter_context(Trace())
        if always():
            x = 1
    assert x == 1 and not t.was_rewritten


def test_control_flow_in_a_called_function_is_native_and_says_so() -> None:
    def helper(value: Any) -> int:
        return 1 if value > 0 else 2

    for is_rewritten in (False, True):
        with pytest.raises(ControlFlowError, match="it is in 'helper', which the block calls"):
            if is_rewritten:
                with Trace() as t:
                    if always():
                        helper(t.value(1))
            else:
                with Trace() as t:
                    helper(t.value(1))


def test_source_that_was_edited_after_loading_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "edited.py"
    text = "def f():\n    with Trace() as t:\n        if t.value(1) > 0:\n            x = 'old'\n    return x\n"
    file.write_text(text)
    namespace: dict[str, Any] = {"Trace": Trace}
    exec(compile(text, str(file), "exec"), namespace)
    file.write_text(text.replace("old", "new"))
    with pytest.raises(ControlFlowError, match="it was changed"):
        namespace["f"]()


@pytest.mark.parametrize("statement", ["return 1", "yield 1", "break", "continue", "await t", "yield from []"])
def test_what_cannot_leave_a_rewritten_block_is_refused_before_anything_runs(statement: str, tmp_path: Path) -> None:
    source = f"""
        {"async " if "await" in statement else ""}def f(ran):
            for _ in range(1):
                with Trace() as t:
                    ran.append(1)
                    if ran:
                        {statement}
    """
    function, ran = _loaded(tmp_path, source)["f"], list[int]()
    with pytest.raises(
        ControlFlowError,
        match=rf"code.py:7: `{statement.removesuffix(' 1').removesuffix(' []').removesuffix(' t')}` can't stand",
    ):
        result = function(ran)
        if inspect.iscoroutine(result):
            asyncio.run(result)
        else:
            list(result)
    assert ran == []


def test_return_in_a_block_without_control_flow_is_fine() -> None:
    def function() -> int:
        with Trace():
            return 1
        return 2

    assert function() == 1


# -- names ---------------------------------------------------------------------------------------------------------------


def test_locals_are_read_and_written_back() -> None:
    a, b = 1, 2
    with Trace() as t:
        if a:
            b += a
            c = b
        import json as module
        from math import pi

        def function() -> int:
            return c

        class Local:
            value = b

        for d in [7]:  # noqa: B007
            pass
        with contextlib.nullcontext(5) as e:
            pass
        try:
            raise KeyError("x")
        except KeyError as error:
            f = error.args
        (g := 9)
        h: int = 10
        [i, *j] = 1, 2, 3
    assert t.was_rewritten
    assert (a, b, c, module, d, e, f, g, h, i, j) == (1, 3, 3, json, 7, 5, ("x",), 9, 10, 1, [2, 3])
    assert 3 < pi < 4 and function() == 3 and Local.value == 3


def test_names_that_were_not_bound_stay_unbound() -> None:
    with Trace() as t:
        if not t:
            never = 1
        try:
            raise KeyError
        except KeyError as error:
            assert error
    assert "never" not in locals() and "error" not in locals()
    with pytest.raises(UnboundLocalError):
        print(never)


def test_reading_an_unbound_name_raises_pythons_own_error() -> None:
    with pytest.raises(NameError, match="late"):
        with Trace():
            if always():
                print(late)  # type: ignore[used-before-def, has-type]  # noqa: F821
    late = 1  # noqa: F841


def test_closure_variables_are_shared_both_ways_while_the_block_runs() -> None:
    count, seen = 0, list[int]()
    later: Callable[[], int]

    def bump() -> None:
        nonlocal count
        count += 1

    def read() -> int:
        return count

    with Trace():
        if always():
            bump()
            seen.append(count)
        count = 10
        seen.append(read())
        later = lambda: count  # noqa: E731
    count = 20
    assert seen == [1, 10] and later() == 20


def test_a_nonlocal_variable_is_assigned_in_the_block() -> None:
    total = 1

    def function() -> int:
        nonlocal total
        with Trace() as t:
            if t.value(5) > 2:
                total = total + 1
        return total

    assert function() == 2 and total == 2


def test_a_nonlocal_or_global_statement_inside_the_block() -> None:
    total = 1

    def function() -> None:
        with Trace():
            nonlocal total
            global module_level
            if always():
                total = 2
                module_level = "changed"

    function()
    assert total == 2 and module_level == "changed"


def test_a_deleted_local_says_so_when_used() -> None:
    x = 1
    with Trace():
        if always():
            del x
    with pytest.raises(Exception, match="it was deleted in the block"):
        print(x)


def test_a_comprehension_variable_does_not_hide_a_global() -> None:
    with Trace():
        if always():
            y = module_level
    assert [module_level for module_level in "ab"] == ["a", "b"] and isinstance(y, str)


def test_functions_and_comprehensions_in_the_body_use_its_names() -> None:
    scale = 3
    double: Callable[[Any], Any]
    with Trace() as t:
        p = t.value(2)
        if p > 1:
            scale = 4
        double = lambda v: v * scale  # noqa: E731
        results = [double(i) for i in range(3) if i]

        def nested() -> list[Any]:
            return [scale * i for i in range(2)]

        more = nested()
    assert t.was_rewritten and len(results) == len(more) == 2
    assert double.__qualname__.endswith("use_its_names.<locals>.<lambda>")
    assert nested.__qualname__.endswith("use_its_names.<locals>.nested")


def test_methods_with_private_names_and_super() -> None:
    class Base:
        def name(self) -> str:
            return "base"

    class Derived(Base):
        def __init__(self) -> None:
            self.__hidden = 1

        def name(self) -> str:
            with Trace():
                __private = self.__hidden
                result = super().name() if always() else ""
                inner = [__class__.__name__ for _ in range(1)]  # type: ignore[name-defined]
            return f"{result} {__private} {self.__hidden} {inner[0]}"

    assert Derived().name() == "base 1 1 Derived"


def test_recursion_through_a_block() -> None:
    def function(n: int) -> int:
        result = 0
        with Trace():
            if n > 0:
                result = n + function(n - 1)
        return result

    assert function(10) == 55


def test_the_entered_name_can_be_any_target() -> None:
    holder: dict[str, Any] = {}
    with Trace() as holder["t"]:
        if always():
            x = 1
    assert x == 1 and holder["t"].was_rewritten


def test_a_block_on_the_line_of_its_with_and_one_that_starts_with_try() -> None:
    with Trace() as t: x = 1 if t.value(1) > 0 else 2  # fmt: skip  # noqa: E701
    with Trace() as u:
        try:
            y = 1 if u.value(1) > 0 else 2
        finally:
            z = 3
    with Trace() as v:
        while True:
            try:
                break
            finally:
                w = 4
    assert (x, y, z, w) == (1, 1, 3, 4) and t.was_rewritten and u.was_rewritten and v.was_rewritten


def test_several_contexts_in_one_with() -> None:
    entered = []

    @contextlib.contextmanager
    def other(name: str) -> Iterator[str]:
        entered.append(name)
        yield name
        entered.append("-" + name)

    with other("a") as a, Trace() as t, other("b") as b:
        x = 1 if t.value(1) > 0 else 2
    with (
        other("c"),
        Trace() as u,
        other("d"),
    ):
        y = 1 if u.value(1) > 0 else 2
    assert (a, b, x, y) == ("a", "b", 1, 1) and entered == ["a", "b", "-b", "-a", "c", "d", "-d", "-c"]


# -- errors --------------------------------------------------------------------------------------------------------------


def test_an_error_shows_the_users_line_and_the_frame_is_written_back() -> None:
    x, first = 1, inspect.currentframe().f_lineno  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError) as caught:
        with Trace():
            if always():
                x = 2
                x / 0
    last = traceback.extract_tb(caught.tb)[-1]
    assert (last.filename, last.lineno, last.name) == (__file__, first + 5, inspect.currentframe().f_code.co_name)  # type: ignore[union-attr]
    assert x == 2 and caught.value.__context__ is None


def test_an_error_in_a_handler_has_the_context_it_would_have_natively() -> None:
    try:
        raise KeyError("outer")
    except KeyError as outer:
        with pytest.raises(ValueError) as caught:
            with Trace():
                if always():
                    assert sys.exception() is outer
                    raise ValueError("inner")  # noqa: B904
        assert caught.value.__context__ is outer and sys.exception() is outer


def test_a_bare_raise_in_the_block_raises_what_is_being_handled() -> None:
    with pytest.raises(KeyError, match="outer"):
        try:
            raise KeyError("outer")
        except KeyError:
            with Trace():
                if always():
                    raise


def test_an_assert_of_plain_values_fails_as_always() -> None:
    with pytest.raises(AssertionError, match="message"):
        with Trace():
            assert not always(), "message"


# -- kinds of functions --------------------------------------------------------------------------------------------------


def test_a_generator_may_hold_the_block() -> None:
    def numbers() -> Iterator[int]:
        for i in range(3):
            yield i
            with Trace() as t:
                x = i * 10 if t.value(1) > 0 else i
            yield x

    assert list(numbers()) == [0, 0, 1, 10, 2, 20]


def test_a_coroutine_may_hold_the_block() -> None:
    async def function() -> int:
        x = 0
        await asyncio.sleep(0)
        with Trace() as t:
            if t.value(1) > 0:
                x = 1
        await asyncio.sleep(0)
        return x

    assert asyncio.run(function()) == 1


def test_threads_run_the_same_block_at_once() -> None:
    results: list[int] = []

    def function(n: int) -> None:
        for _ in range(20):
            x = 0
            with Trace() as t:
                for i in range(10):
                    if t.value(i) > 4:
                        x = x + n
            assert x == 5 * n
        results.append(n)

    threads = [threading.Thread(target=function, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))


def test_module_level_code(tmp_path: Path) -> None:
    source = """
        x = 1
        def read():
            return x
        with Trace() as t:
            p = t.value(5)
            if p > 2:
                x = p + 1
            for i in range(3):
                if i == 1:
                    break
            later = lambda: x
            def function(): pass
            seen = read() is x
        with Trace() as t:
            if t.value(5) > 2:
                y = 1
    """
    names = _loaded(tmp_path, source)
    assert names["x"] == 6 and names["later"]() == 6 and names["i"] == 1 and names["seen"] is True
    assert names["later"].__qualname__ == "<lambda>" and names["function"].__qualname__ == "function"
    assert not any(name.startswith(("_nns", "__nns")) for name in names)


def test_future_annotations_are_kept(tmp_path: Path) -> None:
    source = """
        from __future__ import annotations
        def f():
            with Trace():
                if True:
                    def g(a: Undefined) -> Missing: ...
            return g
    """
    assert _loaded(tmp_path, source)["f"]().__annotations__ == {"a": "Undefined", "return": "Missing"}


def test_ipython_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own there
    shell = interactive.InteractiveShell.instance()
    shell.user_ns["Trace"] = Trace
    try:
        first = (
            "x = 1\n%precision 3\nwith Trace() as t:\n    if t.value(3) > 2:\n        x = 5\n    else:\n        y = 1"
        )
        assert shell.run_cell(first).success
        second = "def f():\n    z = 0\n    with Trace() as t:\n        for i in t.value([1, 2]):\n            z = z + i\n    return z\nz = f()"
        assert shell.run_cell(second).success
        assert (shell.user_ns["x"], shell.user_ns["z"]) == (5, 3)
    finally:
        shell.atexit_operations()
        atexit.unregister(shell.atexit_operations)
        interactive.InteractiveShell.clear_instance()


def _loaded(folder: Path, source: str) -> dict[str, Any]:
    file = folder / "code.py"
    file.write_text(textwrap.dedent(source))
    namespace: dict[str, Any] = {"Trace": Trace, "__name__": "code"}
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    return namespace


def test_prepare_is_cached_per_place() -> None:
    bodies = []
    for _ in range(2):
        with Trace() as t:
            if always():
                pass
        bodies.append(t.body)
    assert isinstance(bodies[0], block.Body) and bodies[0]._built is bodies[1]._built  # type: ignore[union-attr]
