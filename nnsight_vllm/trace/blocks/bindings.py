"""The names that a rewritten block reads and binds, where they really live: closure cells, or the module's globals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import CellType


class _Unbound:
    """Stands for the value of a name that has none."""

    def __repr__(self) -> str:
        return "UNBOUND"


UNBOUND = _Unbound()


class Bindings:
    """Names by cell; those without a cell are globals."""

    def __init__(self, cells: Mapping[str, CellType], module: dict[str, object]) -> None:
        self._cells = cells
        self._module = module

    def get(self, names: Iterable[str]) -> dict[str, object]:
        """The names' values now, `UNBOUND` for those that have none."""
        return {name: self._get(name) for name in names}

    def set(self, values: Mapping[str, object]) -> None:
        """Bind the names, or unbind those whose value is `UNBOUND`."""
        for name, value in values.items():
            if name not in self._cells:
                self._set_global(name, value)
            elif value is not UNBOUND:
                self._cells[name].cell_contents = value
            elif _contents(self._cells[name]) is not UNBOUND:
                del self._cells[name].cell_contents

    def _get(self, name: str) -> object:
        return _contents(self._cells[name]) if name in self._cells else self._module.get(name, UNBOUND)

    def _set_global(self, name: str, value: object) -> None:
        if value is UNBOUND:
            self._module.pop(name, None)
        else:
            self._module[name] = value


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return UNBOUND
