"""From paired seconds to a ratio with an interval. Ratios are throughputs: above one means faster than the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
from msgspec import Struct

RESAMPLES = 10_000


class Ratio(Struct, frozen=True):
    """The median of paired ratios, the 95 % interval of that median (bootstrap), and the smallest and largest."""

    median: float
    low: float
    high: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    """How much faster `ours` is than `baseline`, both in seconds, round by round."""
    ratios = np.array([base / own for base, own in zip(baseline, ours, strict=True)])
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Ratio(median(ratios.tolist()), float(low), float(high), float(ratios.min()), float(ratios.max()))
