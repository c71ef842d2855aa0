"""Result: the figures of one replay, and how they come of its ticks. Never simulates.

Times and slowdowns are of the tier model, not of any machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

STEADY = 0.95
"""Part of the hit ratio that follows which counts as having settled."""

_SPAN_S = 5.0
"""What a hit ratio is averaged over to tell whether it has settled."""


@dataclass(frozen=True)
class Ticks:
    """Columns with one row a tick: when it began, pages read, of these from the fastest tier; pages moved."""

    begin_s: npt.NDArray[np.float64]
    reads: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    moved: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """One row of the table. Ratios are NaN where there is nothing to divide by.

    hit_ratio          bytes read from the fastest tier, of all that were read
    oracle_share       of what the oracle would have read there
    slowdown           time to read what was read, against a fast tier that is large enough (tier model)
    moved_bytes        by the policy; `promoted_bytes` of them to a faster tier, of which `useful_bytes` were read there
    ping_pongs         moves that took a page back where it came from within a minute
    convergence_s      after the trace's marked shift (None without): until the hit ratio of 5 s first reached 95 % of
                       the one in the second half of what follows
    policy_s, policy_max_s   CPU time of a plan: mean and most
    failure            why the policy was replaced by hold; empty: it was not
    """

    policy: str
    hit_ratio: float
    slowdown: float
    oracle_share: float = math.nan
    moved_bytes: int = 0
    promoted_bytes: int = 0
    useful_bytes: int = 0
    ping_pongs: int = 0
    convergence_s: float | None = None
    ticks: int = 0
    policy_s: float = 0.0
    policy_max_s: float = 0.0
    failure: str = ""
    refused: Mapping[str, int] = field(default_factory=dict)
    timeline: Ticks | None = field(default=None, repr=False, compare=False)

    def facts(self) -> dict[str, Any]:
        """Everything but the timeline, for JSON: NaN becomes None."""
        told = {name: value for name, value in vars(self).items() if name != "timeline"}
        return {name: None if isinstance(value, float) and value != value else value for name, value in told.items()}


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def convergence_s(ticks: Ticks, shift_s: float, end_s: float) -> float | None:
    """Seconds after `shift_s` until reads were served as well as they are in the end; None where it cannot be told."""
    after = ticks.begin_s >= shift_s
    late = ticks.begin_s >= (shift_s + end_s) / 2
    steady = ratio(ticks.hits[late].sum(), ticks.reads[late].sum())
    if not after.any() or not steady > 0:
        return None
    begin_s = ticks.begin_s[after]
    hits, reads = (np.concatenate(([0], np.cumsum(column[after]))) for column in (ticks.hits, ticks.reads))
    last = np.searchsorted(begin_s, begin_s + _SPAN_S)
    there = np.arange(len(begin_s))
    settled = (hits[last] - hits[there]) >= STEADY * steady * (reads[last] - reads[there])
    settled &= reads[last] > reads[there]
    return float(begin_s[settled.argmax()] - shift_s) if settled.any() else None
