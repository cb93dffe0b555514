"""The caller's names, cells and handled exception, seen and changed from a function that it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CellType, FrameType

import pytest

from nnsight_vllm.errors import ControlFlowError
from nnsight_vllm.trace.blocks import frames


def caller() -> FrameType:
    return sys._getframe(1)


def test_names_has_locals_cells_and_closure_variables() -> None:
    outer = 1

    def function(argument: int) -> tuple[dict[str, object], Callable[[], tuple[int, int]]]:
        own = 3
        return frames.names(caller()), lambda: (own, outer)

    found, _ = function(2)
    assert found == {"argument": 2, "own": 3, "outer": 1}


def test_names_of_a_module_is_its_own_dict() -> None:
    namespace: dict[str, object] = {"frames": frames, "caller": caller}
    exec("found = frames.names(caller())", namespace)
    assert namespace["found"] is namespace


def test_written_names_are_seen_by_the_frame_and_its_closures() -> None:
    plain, cell, argument_cell = _write()
    assert (plain, cell, argument_cell) == (10, 20, 30)


def _write(argument: int = 3) -> tuple[int, int, int]:
    plain, cell = 1, 2

    def read() -> tuple[int, int]:
        return cell, argument

    frames.write_names(caller(), {"plain": 10, "cell": 20, "argument": 30})
    assert read() == (20, 30)
    return plain, cell, argument


def test_a_written_name_reaches_the_outer_functions_variable() -> None:
    shared = 1

    def function() -> None:
        nonlocal shared
        shared += 1
        frames.write_names(caller(), {"shared": 7})

    function()
    assert shared == 7


def test_an_unbound_local_can_be_written() -> None:
    if not sys.argv:
        late = 1
    frames.write_names(caller(), {"late": 5})
    assert late == 5


def test_a_name_that_is_not_the_functions_own_is_written_to_its_module() -> None:
    namespace: dict[str, object] = {"frames": frames, "caller": caller}
    exec("def f():\n global g\n frames.write_names(caller(), {'g': 4})\n return g\nx = f()", namespace)
    assert namespace["x"] == namespace["g"] == 4


def test_writing_in_a_module_binds_globals() -> None:
    namespace: dict[str, object] = {"frames": frames, "caller": caller}
    exec("frames.write_names(caller(), {'a': 1})\nb = a + 1", namespace)
    assert namespace["b"] == 2


def test_cells_are_the_live_ones() -> None:
    outer = 1

    def function(argument: int) -> int:
        own = 3
        unused = 4

        def inner() -> int:
            return own + argument + outer

        cells = frames.cells(caller())
        assert set(cells) == {"own", "argument", "outer"} and unused
        assert all(isinstance(cell, CellType) for cell in cells.values())
        assert inner.__closure__ is not None and set(map(id, inner.__closure__)) == set(map(id, cells.values()))
        cells["own"].cell_contents = 100
        return own + inner()

    assert function(2) == 203


def test_an_unbound_cell_is_found_empty() -> None:
    def inner() -> object:
        return late

    cell = frames.cells(caller())["late"]
    with pytest.raises(ValueError, match="empty"):
        _ = cell.cell_contents
    late = 1
    assert cell.cell_contents == inner() == 1


def test_cells_in_generators_and_methods() -> None:
    class Holder:
        def numbers(self, start: int) -> object:
            def inner() -> tuple[object, int]:
                return self, start

            yield frames.cells(caller())["start"].cell_contents
            start += 1
            yield frames.cells(caller())["start"].cell_contents
            yield inner()

    holder = Holder()
    assert list(holder.numbers(5)) == [5, 6, (holder, 6)]  # type: ignore[call-overload]


def test_a_frame_of_unknown_layout_is_refused_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner() -> object:
        return monkeypatch

    monkeypatch.setattr(frames, "_CODE", frames._FRAME)
    with pytest.raises(
        ControlFlowError, match=r"test_frames.py:\d+: this Python .* doesn't show the closure variables"
    ):
        frames.cells(caller())
    assert inner() is monkeypatch


def test_set_handled_changes_what_raise_and_contexts_see() -> None:
    try:
        raise KeyError
    except KeyError as error:
        frames.set_handled(None)
        assert sys.exception() is None
        with pytest.raises(ValueError) as caught:
            raise ValueError  # noqa: B904
        assert caught.value.__context__ is None
        frames.set_handled(error)
        assert sys.exception() is error
    assert sys.exception() is None
