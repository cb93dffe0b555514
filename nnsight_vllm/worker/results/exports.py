"""Values that requests keep for others of their bundle: on the device, from the step that made them to their last use.

How often a value will be used is known before it is made: `Links.makes` of its maker. A use is over when a consumer drew the
value, or ended without; what the scheduler ends before the worker knew it comes as `Released`. Nothing outlives its bundle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.links import Links
from nnsight_vllm.wire.step_output import Address, Released
from nnsight_vllm.worker.results.outbox import frozen_copy, size_of


@dataclass
class _Kept:
    value: Any
    uses: int
    num_bytes: int


class Exports:
    """All values that wait for a use: at most so many bytes of one bundle, and of all together."""

    def __init__(self, max_bytes: int, max_bytes_in_all: int) -> None:
        self._max_bytes, self._max_in_all = max_bytes, max_bytes_in_all
        self._kept: dict[Address, _Kept] = {}
        self._unused: dict[str, Counter[str]] = {}  # uses that were over before the value was there, by bundle
        self._made: list[Address] = []
        self._of_bundle: Counter[str] = Counter()  # bytes
        self.num_bytes = 0
        self.num_made = 0
        self.num_drawn = 0

    def __len__(self) -> int:
        return len(self._kept)

    def make(self, links: Links | None, key: str, value: Any) -> None:
        """Keep a copy of the value. Raises what fails the request that made it."""
        if links is None or key not in links.makes:
            raise InterventionError(f"the request exports {key!r}, which its links don't name")
        address = links.bundle, key
        if address in self._kept or address in self._made:
            raise InterventionError(f"another request of the bundle exports {key!r} already")
        uses = links.makes[key] - self._unused.get(links.bundle, Counter())[key]
        num_bytes = size_of(value)
        if uses > 0:
            self._keep(address, _Kept(frozen_copy(value), uses, num_bytes))
        self._made.append(address)
        self.num_made += 1

    def draw(self, links: Links | None, key: str) -> Any:
        """The value, for one of its uses. It is everybody's: nobody may change it. Raises where there is none."""
        kept = None if links is None else self._kept.get((links.bundle, key))
        if kept is None or links is None:
            raise InterventionError(f"no request of the bundle has exported {key!r} by now")
        self._use((links.bundle, key))
        self.num_drawn += 1
        return kept.value

    def release(self, released: Released) -> None:
        for bundle, key in released.unused:
            if (bundle, key) in self._kept:
                self._use((bundle, key))
            else:
                self._unused.setdefault(bundle, Counter())[key] += 1
        over = set(released.bundles)
        for address in [address for address in self._kept if address[0] in over]:
            self._drop(address)
        for bundle in over:
            self._unused.pop(bundle, None)

    def take_made(self) -> list[Address]:
        """What was made since this was asked last."""
        made, self._made = self._made, []
        return made

    def end(self) -> None:
        """No bundle has a request any more."""
        self.release(Released(bundles=[bundle for bundle, _ in self._kept] + list(self._unused)))

    def leftovers(self) -> list[str]:
        """What isn't counted right. Who of a bundle's requests still lives isn't known here."""
        num_bytes = sum(kept.num_bytes for kept in self._kept.values())
        counted = f"{self.num_bytes} bytes of values for other requests are counted; they have {num_bytes}"
        return [counted] if num_bytes != self.num_bytes or num_bytes != self._of_bundle.total() else []

    def _keep(self, address: Address, kept: _Kept) -> None:
        of_bundle = self._of_bundle[address[0]] + kept.num_bytes
        if of_bundle > self._max_bytes:
            raise InterventionError(
                f"the values that requests of the bundle keep for each other have {of_bundle} bytes; max_saved_bytes is "
                f"{self._max_bytes}"
            )
        if self.num_bytes + kept.num_bytes > self._max_in_all:
            raise InterventionError(
                f"the values that requests keep for others have {self.num_bytes + kept.num_bytes} bytes; max_saved_bytes_in_all is "
                f"{self._max_in_all}"
            )
        self._kept[address] = kept
        self._of_bundle[address[0]] = of_bundle
        self.num_bytes += kept.num_bytes

    def _use(self, address: Address) -> None:
        kept = self._kept[address]
        kept.uses -= 1
        if kept.uses <= 0:
            self._drop(address)

    def _drop(self, address: Address) -> None:
        kept, bundle = self._kept.pop(address), address[0]
        self.num_bytes -= kept.num_bytes
        self._of_bundle[bundle] -= kept.num_bytes
        if not self._of_bundle[bundle]:
            del self._of_bundle[bundle]
