"""Which requests of a run hand values to each other, so that they go to the engine, and start again, together."""

from __future__ import annotations

import secrets
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from nnsight_vllm.graph.links import Links
from nnsight_vllm.trace.backend import Request


@dataclass(frozen=True)
class Tied:
    """Of a request that hands values to others, or gets some: its links in one run, and a seed that makers keep over runs."""

    links: Links | None = None
    seed: int | None = None


class Bundling:
    """The requests by their numbers in the run."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        makers = {key: i for i, links in _linked(requests) for key in links.makes}
        self._makers = {
            i: [makers[need.key] for need in links.needs if need.key in makers] for i, links in _linked(requests)
        }
        self._sets = self._joined()
        self._seeds = {i: secrets.randbits(31) for i, links in _linked(requests) if links.makes}

    def with_makers(self, some: Iterable[int]) -> list[int]:
        """These requests and all that make values for them, directly or over others."""
        found = set(some)
        due = list(found)
        while due:
            more = set(self._makers.get(due.pop(), ())) - found
            found |= more
            due += more
        return sorted(found)

    def in_order(self, some: Iterable[int]) -> list[int]:
        """Makers first: the engine then never waits for what hasn't come, unless two need each other."""
        some, found = set(some), dict[int, None]()
        for i in sorted(some):
            self._put(i, found, set())
        return [i for i in found if i in some]

    def tied(self, some: Iterable[int]) -> dict[int, Tied]:
        """These requests for one run of theirs, in order. What makers draw stays the same if they run again."""
        order = self.in_order(some)
        links = self.links(order)
        return {i: Tied(links.get(i), self._seeds.get(i)) for i in order}

    def links(self, some: Iterable[int]) -> dict[int, Links]:
        """The links of these requests for one run of theirs; those that are tied to each other are a bundle."""
        here = {i: links for i in some if (links := self._requests[i].links) is not None}
        uses: Counter[str] = Counter()
        sizes: Counter[int] = Counter()
        for i, links in here.items():
            num = self._requests[i].sampling.n
            sizes[id(self._sets[i])] += num
            uses.update(dict.fromkeys((need.key for need in links.needs), num))
        names = {tied: uuid.uuid4().hex for tied in sizes}
        return {i: self._of_run(links, uses, id(self._sets[i]), names, sizes) for i, links in here.items()}

    @staticmethod
    def _of_run(links: Links, uses: Counter[str], tied: int, names: dict[int, str], sizes: Counter[int]) -> Links:
        makes = {key: uses[key] for key in links.makes}
        return msgspec.structs.replace(links, bundle=names[tied], size=sizes[tied], makes=makes)

    def _joined(self) -> dict[int, set[int]]:
        sets = {i: {i} for i in self._makers}
        for i, maker in [(i, maker) for i, makers in self._makers.items() for maker in makers]:
            if sets[i] is not sets[maker]:
                small, large = sorted((sets[i], sets[maker]), key=len)
                large |= small
                sets.update(dict.fromkeys(small, large))
        return sets

    def _put(self, i: int, found: dict[int, None], above: set[int]) -> None:
        stack = [(i, iter(self._makers.get(i, ())))]
        above.add(i)
        while stack:
            at, makers = stack[-1]
            maker = next((one for one in makers if one not in found and one not in above), None)
            if maker is None:
                found[at] = None
                stack.pop()
            else:
                above.add(maker)
                stack.append((maker, iter(self._makers.get(maker, ()))))


def _linked(requests: Sequence[Request]) -> Iterable[tuple[int, Links]]:
    return [(i, request.links) for i, request in enumerate(requests) if request.links is not None]
