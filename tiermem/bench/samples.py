"""Samples: the repetitions of one measurement and what may be said of them. Knows no clock and no unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LARGE_SPREAD = 0.2
"""A range beyond this part of the median says more about the host's other work than about what was measured."""


@dataclass(frozen=True, slots=True)
class Samples:
    """At least one value, in the order in which they were measured."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        return cls(tuple(values))

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p95(self) -> float:
        return self.quantile(0.95)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)

    @property
    def spread(self) -> float:
        """The range as a part of the median."""
        return (self.most - self.least) / self.median if self.median else 0.0

    def quantile(self, fraction: float) -> float:
        """By linear interpolation between the two nearest values (R's type 7)."""
        ordered = sorted(self.values)
        at = fraction * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
