"""Who waits at which tap, in a step: the sites that a tap serves are where programs go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

from nnsight_vllm.worker.batch.group import Unit
from nnsight_vllm.worker.batch.request_nodes import ModuleCalls
from nnsight_vllm.worker.model.sites import Site
from nnsight_vllm.worker.model.taps import Handler, Tensors


@dataclass(frozen=True)
class SiteTable:
    """What the executor knows of the model. `orders`: where in the firing order a site comes."""

    sites: Mapping[str, Site]
    orders: Mapping[str, int]
    calls: ModuleCalls
    active: MutableMapping[int, Handler]


class Waiting:
    """A tap has a handler in `table.active` exactly where somebody waits."""

    def __init__(self, table: SiteTable) -> None:
        self._table = table
        self._units: dict[int, list[Unit]] = {}

    def add(self, unit: Unit, at_tap: Callable[[int, Tensors], None]) -> None:
        """Have the tap of the site that a program waits for call `at_tap`, if it's one of this iteration."""
        if unit.site is None or unit.lag or unit.is_over:
            return
        tap = self._table.sites[unit.site].tap
        self._units.setdefault(tap, []).append(unit)
        self._table.active[tap] = partial(at_tap, tap)

    def due(self, tap: int, is_ranked: bool) -> list[Unit]:
        """Who runs next at a tap: all, or where programs of one request may be among them the first ones. The tap needn't call."""
        self._table.active.pop(tap, None)
        units = self._units.pop(tap, [])
        if not is_ranked or not units:
            return units
        ranks = [self._rank(unit) for unit in units]
        later = [unit for unit, rank in zip(units, ranks, strict=True) if rank > min(ranks)]
        if later:
            self._units[tap] = later
        return [unit for unit, rank in zip(units, ranks, strict=True) if rank == min(ranks)]

    def give_up(self, but: int) -> list[Unit]:
        """Nobody waits any more but at this tap. Returns who did."""
        found: list[Unit] = []
        for tap in self._units.keys() - {but}:
            self._table.active.pop(tap, None)
            found += self._units.pop(tap)
        return found

    def clear(self) -> None:
        for tap in self._units:
            self._table.active.pop(tap, None)
        self._units.clear()

    def leftovers(self) -> list[str]:
        return [f"a handler at tap {tap}" for tap in self._table.active] + [
            f"requests waiting at tap {tap}" for tap in self._units
        ]

    def _rank(self, unit: Unit) -> tuple[int, int]:
        assert unit.site is not None
        return self._table.orders[unit.site], unit.number
