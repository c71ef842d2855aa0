"""Accounts of a replay: what reads and moves came to, tick by tick. Never moves a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tiermem.replay.residency import Moved
from tiermem.replay.tier_model import TierModel
from tiermem.types import PAGE_BYTES


class Accounts:
    """Sums over all ticks: `moved`, `promoted` and `useful` pages, and seconds of reading by the tier model: `spent_s`,
    and `fast_s` had all been in the fastest tier. `bytes_s`: read and moved a second in the last tick, by tier."""

    def __init__(self, pages: int, models: Sequence[TierModel]) -> None:
        self.moved = self.promoted = self.useful = 0
        self.spent_s = self.fast_s = 0.0
        self.bytes_s = np.zeros(len(models))
        self._models = models
        self._fresh = np.zeros(pages, np.bool_)  # promoted, and not read since

    def take(
        self,
        counts: npt.NDArray[np.int64],
        late: npt.NDArray[np.int64],
        tier: npt.NDArray[np.int8],
        moved: Moved,
        seconds: float,
    ) -> int:
        """One tick. `counts`: touches of each page; `late`: of each page in `moved` those after it had arrived; `tier`:
        where the pages are in the end. Returns touches that the fastest tier served."""
        by_tier = np.bincount(tier, counts, len(self._models)).astype(np.int64)
        early = counts[moved.page] - late
        np.add.at(by_tier, moved.source, early)
        np.subtract.at(by_tier, moved.target, early)
        self._judge(counts, late, moved)
        self._charge(by_tier, moved, seconds)
        return int(by_tier[0])

    def _judge(self, counts: npt.NDArray[np.int64], late: npt.NDArray[np.int64], moved: Moved) -> None:
        """A promotion is of use if the page is read in its new tier before it is demoted."""
        up = moved.target < moved.source
        read = counts > 0
        read[moved.page] = counts[moved.page] > late
        used = self._fresh & read
        self._fresh &= ~used
        self._fresh[moved.page] = up & (late == 0)
        self.moved += len(moved)
        self.promoted += int(up.sum())
        self.useful += int(used.sum()) + int((up & (late > 0)).sum())

    def _charge(self, by_tier: npt.NDArray[np.int64], moved: Moved, seconds: float) -> None:
        number = len(self._models)
        moves = np.bincount(moved.source, minlength=number) + np.bincount(moved.target, minlength=number)
        self.bytes_s = (by_tier + moves) * PAGE_BYTES / seconds
        for model, reads, moving in zip(self._models, by_tier.tolist(), moves.tolist(), strict=True):
            self.spent_s += model.read_s(reads * PAGE_BYTES, moving * PAGE_BYTES / seconds)
        self.fast_s += self._models[0].read_s(int(by_tier.sum()) * PAGE_BYTES, 0.0)
