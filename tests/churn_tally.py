"""What a fuzzer's scenarios were: counts by class, for its report and for the test that every class comes up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

CLASSES = {
    "scenarios": "scenarios",
    "requests": "requests in them",
    "graphs": "requests with graphs",
    "front": "scenarios through the front end's own run",
    "samples": "requests of several samples",
    "sampled": "requests with a temperature",
    "waited": "requests that came while others ran",
    "refused": "requests with graphs refused for the length of their prompts",
    "cut": "prompts computed in pieces",
    "cut graphs": "of those, prompts with graphs",
    "hits": "requests that found blocks in the prefix cache",
    "hits of edits": "of those, requests that change rows",
    "evicted plain": "evictions of requests without graphs",
    "evicted graphs": "evictions of requests with graphs, which started again",
    "aborts": "requests aborted before their end",
    "stops": "samples that their graph stopped",
    "texts": "samples that ended by a stop string",
    "failures": "samples whose graph failed",
    "grouped": "scenarios in which requests ran as one group",
    "same bits": "requests whose steps had the same rows as alone: equal bit for bit",
    "plain bits": "requests without graphs beside others' graphs: steps equal bit for bit to those without any graph",
    "ties": "samples whose token or branch was decided by rounding: two were as good within the tolerance",
}


class Tally(Counter[str]):
    """Counts by class. Unknown classes are refused: a misspelt one would never be missed."""

    def note(self, name: str, count: int = 1) -> None:
        if name not in CLASSES:
            raise KeyError(name)
        self[name] += count

    def require(self, names: Iterable[str]) -> None:
        """Raise `AssertionError` for classes that never came up."""
        missing = [name for name in names if not self[name]]
        assert not missing, f"never drawn: {missing}; {self.report()}"

    def require_few_ties(self) -> None:
        """One request in a hundred at most: more would hide mistakes."""
        assert self["ties"] * 100 <= self["requests"], self.report()

    def report(self) -> str:
        """One line a class."""
        return "\n".join(f"{self[name]:>8}  {text}" for name, text in CLASSES.items())
