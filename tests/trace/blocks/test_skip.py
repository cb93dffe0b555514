"""Skipping the native body leaves no trace: coverage, debuggers and trace functions go on as they were."""

from __future__ import annotations

import bdb
import contextlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fake_recorder import Trace

from nnsight_vllm.errors import ControlFlowError

TESTS = Path(__file__).resolve().parent.parent


def always() -> bool:
    return True


PROGRAM = """
    import sys
    sys.path.insert(0, {tests!r})
    from contextlib import nullcontext
    from fake_recorder import Trace

    def helper(x):
        y = x
        return y

    def f(trace, n):
        a = helper(n)
        with trace as t:
            a = helper(a)
            if n > 1:
                b = 1
            elif n > 2:
                b = 2
            for i in range(3):
                if i == 1:
                    continue
                b = i
            else:
                b = helper(4)
            while a > 0:
                a -= 1
            try:
                c = 1 // n
            except ZeroDivisionError:
                c = 0
            if not n:
                d = [x for x in range(3) if x]
        if n == 7:
            return 7
        return helper(b)

    def g(trace):
        return 1

    for n in (0, 5):
        f({trace}, n)
        helper(n)
    print("done")
"""


@pytest.mark.parametrize("core", ["ctrace", "sysmon", "pytrace"])
@pytest.mark.parametrize("branch", [False, True])
def test_coverage_sees_the_lines_of_the_block_as_if_it_ran_natively(core: str, branch: bool, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    if core == "sysmon" and (sys.version_info < (3, 12) or (branch and sys.version_info < (3, 14))):
        pytest.skip("this Python has no such core")
    rewritten = _coverage(tmp_path / "a", "Trace()", core, branch)
    native = _coverage(tmp_path / "b", "nullcontext()", core, branch)
    assert rewritten == native


@pytest.mark.parametrize("core", ["ctrace", "pytrace"])
def test_coverage_of_recorded_control_flow_covers_both_branches(core: str, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    program = """
        import sys
        sys.path.insert(0, {tests!r})
        from fake_recorder import Trace
        def f():
            with {trace} as t:
                p = t.value(1)
                if p > 1:
                    x = 1
                elif p > 2:
                    x = 2
                else:
                    x = 3
                if p > 1:
                    y = 1
                z = 4
        f()
    """
    summary = _coverage(tmp_path, "Trace()", core, True, program)
    assert summary["missing_lines"] == [] and summary["missing_branches"] == []


def _coverage(folder: Path, trace: str, core: str, branch: bool, program: str = PROGRAM) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(textwrap.dedent(program).format(tests=str(TESTS), trace=trace))
    coverage = [sys.executable, "-m", "coverage"]
    environment = {"COVERAGE_CORE": core, "PYTHONPATH": str(TESTS.parent), "PATH": ""}
    run = [*coverage, "run", *(["--branch"] if branch else []), "--include=program.py", "program.py"]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    subprocess.run([*coverage, "json", "-q"], cwd=folder, env=environment, timeout=60, check=True)
    summary: dict[str, Any] = json.loads((folder / "coverage.json").read_text())["files"]["program.py"]
    keys = ("executed_lines", "missing_lines", "missing_branches", "executed_branches")
    return {key: summary[key] for key in keys if key in summary}


class Debugger(bdb.Bdb):
    """Notes the lines of `debugged` at which it stops; `command` is what it does then."""

    def __init__(self, command: Callable[[Debugger, FrameType], None]) -> None:
        super().__init__(skip=["nnsight_vllm.*", "fake_recorder", "contextlib", "linecache", "ast", "dis", "weakref"])
        self.lines: list[int] = []
        self._command = command

    def user_line(self, frame: FrameType) -> None:
        if frame.f_code.co_filename == __file__:
            self.lines.append(frame.f_lineno - debugged.__code__.co_firstlineno)
        self._command(self, frame)


def debugged(n: int) -> int:
    x = n
    with Trace():
        x = x + 1
        if x > 2:
            x = x + 2
        x = x * 2
    return x + 1


def debug(debugger: Debugger) -> object:
    before = sys.gettrace()
    try:
        return debugger.runcall(debugged, 3)
    finally:
        sys.settrace(before)


def test_a_debugger_stops_at_breakpoints_in_the_block_and_goes_on_after_it() -> None:
    debugger = Debugger(lambda self, frame: self.set_continue())
    for offset in (4, 6, 7):
        debugger.set_break(__file__, debugged.__code__.co_firstlineno + offset)
    assert debug(debugger) == 13
    debugger.clear_all_breaks()
    assert debugger.lines == [1, 4, 6, 7]


def test_stepping_goes_through_the_block() -> None:
    debugger = Debugger(lambda self, frame: self.set_step())
    assert debug(debugger) == 13
    assert debugger.lines == [1, 2, 3, 4, 5, 6, 2, 7]


def test_stepping_over_the_block_stops_after_it() -> None:
    debugger = Debugger(lambda self, frame: self.set_next(frame))
    assert debug(debugger) == 13
    assert debugger.lines == [1, 2, 7]


def test_a_trace_function_is_the_same_after_the_block() -> None:
    with _traced() as own:
        frame = sys._getframe()
        frame.f_trace, frame.f_trace_lines = own, False
        with Trace():
            inside = sys.gettrace() if always() else None
        switches = frame.f_trace is own, frame.f_trace_lines, frame.f_trace_opcodes
        frame.f_trace_lines = True
    assert inside is own and switches == (True, False, False)


def test_no_trace_function_is_left_behind() -> None:
    before = sys.gettrace()
    with Trace():
        inside = sys.gettrace() if always() else None
    assert inside is before and sys.gettrace() is before


def test_an_error_before_the_body_starts_gives_tracing_back() -> None:
    class Refuses:
        def __setitem__(self, key: str, value: object) -> None:
            raise KeyError("target")

    target = Refuses()
    with _traced(), pytest.raises(KeyError, match="target"):
        with Trace() as target["x"]:
            if always():
                pass


def test_a_block_inside_a_trace_function_runs_natively_and_leaves_it_alone() -> None:
    results: list[object] = []

    def prompt(frame: FrameType, event: str, argument: object) -> None:
        results.append(debugged(3))
        try:
            with Trace() as t:
                if t.value(1) > 0:
                    results.append(1)
        except ControlFlowError as error:
            results.append(str(error))
        results.append(sys.gettrace())

    before = sys.gettrace()
    sys.settrace(prompt)
    always()
    sys.settrace(before)
    assert results[0] == 13 and "inside a debugger's prompt" in str(results[1]) and results[2] == prompt


@contextlib.contextmanager
def _traced() -> Iterator[Callable[..., Any]]:
    """Trace the thread; at the end the trace function has to be the same."""

    def own(frame: FrameType, event: str, argument: object) -> Any:
        return own

    before = sys.gettrace()
    sys.settrace(own)
    try:
        yield own
        assert sys.gettrace() is own
    finally:
        sys.settrace(before)
