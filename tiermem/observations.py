"""Observations: what samplers tell of pages, on the way from a sampler to heat. Vocabulary; never samples or sums up.

A page that is in no observation is unknown. Times are CLOCK_MONOTONIC in seconds, which all processes of a host share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Rung(IntEnum):
    """By which means a page was seen; a greater one tells more. Its name in lower case is what users read."""

    NONE = 0
    DECLARED = 1
    ACCESSED = 2
    PRESENT = 3
    PERF = 4


@dataclass(frozen=True, slots=True)
class Bits:
    """One window of one mapping: which of the pages that were sampled were touched. One bit a page, never a count.

    `pages`: int32, ascending page numbers of the model; `touched`: bool, as long.
    """

    rung: Rung
    begin_s: float
    end_s: float
    pages: npt.NDArray[np.int32]
    touched: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples of accesses to one model in one window during which all its pages were watched.

    `pages`: int32, ascending and distinct; `counts`: uint32, as long, the samples on each; one sample stands for
    `period` accesses.
    """

    rung: Rung
    begin_s: float
    end_s: float
    pages: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint32]
    period: float
