"""Observer of a replay: what samplers would tell of its touches. Feeds heat; never sees where a page is.

exact     every touch is counted, of every page: more than any hardware tells
present   one bit a page and window, of the pages whose turn it is, as without a PMU: of each 100 ms, 512 pages
          (what 1 % of a client's time pays for, at 2 us a fault)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.heat import Heat
from tiermem.observations import Bits, Counts, Rung
from tiermem.replay.trace import Trace

SAMPLINGS = ("exact", "present")
EPOCH_S, TURN_PAGES = 0.1, 512


class Observer:
    """Of one replay; `seed` decides in which order pages have their turn."""

    def __init__(self, trace: Trace, sampling: str, seed: int) -> None:
        self._trace, self._exact = trace, sampling == "exact"
        self._order = np.random.default_rng(seed).permutation(trace.pages).astype(np.int32)
        self._epochs = 0

    def observe(
        self, heat: Heat, begin: int, end: int, begin_s: float, end_s: float, counts: npt.NDArray[np.int64]
    ) -> None:
        """Visits [begin, end) of this time; `counts`: touches of each page in them."""
        if self._exact:
            seen = np.flatnonzero(counts).astype(np.int32)
            heat.add_counts(Counts(Rung.PERF, begin_s, end_s, seen, counts[seen].astype(np.uint32), 1.0))
            return
        trace = self._trace
        while (self._epochs + 1) * EPOCH_S <= end_s + 1e-9:
            window = (self._epochs * EPOCH_S, (self._epochs + 1) * EPOCH_S)
            first, last = trace.first[np.searchsorted(trace.visit_s, window)]
            touched = np.zeros(trace.pages, np.bool_)
            touched[trace.page[first:last]] = True
            turn = np.arange(self._epochs * TURN_PAGES, (self._epochs + 1) * TURN_PAGES) % trace.pages
            pages = np.unique(self._order[turn])
            heat.add_bits(Bits(Rung.PRESENT, *window, pages, touched[pages]))
            self._epochs += 1
