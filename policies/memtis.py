"""memtis: the threshold of hotness follows the histogram of counts, so that the hot pages just fill the fast tier.

Source: T. Lee et al., "MEMTIS: Efficient Memory Tiering with Dynamic Page Classification and Page Size Determination",
SOSP 2023; parameters as in its code: 16 bins by powers of two, counts halved every 2,000,000 samples, 3 % of the fast
tier kept free, threshold at least 1. It rises at once and falls by one bin at a cooling, lest pages come and go.

Deviations: the unit is 2 MiB and nothing is split. Few samples, or windows in their place, would never cool: counts are
also halved after 64 samples a page, what the source's number comes to on a machine of its size. Its warm band (pages
one bin below hot go down last) follows from taking the least first. New pages get no bonus: a load would otherwise
push the working set out. With three tiers each has a threshold, by the capacity down to it.
"""

from __future__ import annotations

import numpy as np

from tiermem.policy import PageState, Plan, TierView, View
from tiermem.policy.evidence import Touches, likely_rate
from tiermem.policy.exchange import Exchange
from tiermem.types import PAGE_BYTES


class Memtis:
    period_s = 0.5
    bins = 16
    cool_samples = 2_000_000
    cool_samples_per_page = 64
    kept_free = 0.03
    least_threshold = 1

    def __init__(self) -> None:
        self._touches = Touches()
        self._count = PageState(np.float32)
        self._samples = 0
        self._threshold: dict[str, int] = {}

    def plan(self, view: View) -> Plan:
        pages = view.pages
        count, touches = self._count.of(pages), self._touches.since(pages)
        count += touches
        self._samples += int(touches.sum())
        cooled = self._samples >= min(self.cool_samples, self.cool_samples_per_page * max(1, len(pages)))
        if cooled:
            count *= 0.5
            self._samples = 0
        # Bin b holds counts from 2^b - 1 up; above[b]: pages in it and all greater ones.
        above = [int(np.count_nonzero(count >= 2.0**b - 1)) for b in range(self.bins)]
        # Ties at 0 are broken by what is known of a page: nothing, or that nobody touches it.
        value = np.where(count > 0, count, -1 / (1 + likely_rate(view))).astype(np.float32, copy=False)
        exchange = Exchange(view, value, lambda count: f"{max(0.0, count):.0f} samples")
        exchange.relieve()
        capacity = 0
        for fast, slow in exchange.pairs():
            if slow is view.memory_tiers[-1]:
                capacity += self._capacity(fast)
                self._adapt(fast.name, above, capacity, cooled)
            hot = count >= 2.0 ** self._threshold[fast.name] - 1
            exchange.exchange(fast, slow, hot, ~hot)
        return exchange.plan

    def _capacity(self, tier: TierView) -> int:
        """Pages that may be hot in this tier."""
        return int((tier.capacity_bytes or 0) * (1 - self.kept_free)) // PAGE_BYTES

    def _adapt(self, tier: str, above: list[int], capacity: int, cooled: bool) -> None:
        fits = next((b for b in range(self.least_threshold, self.bins) if above[b] <= capacity), self.bins)
        before = self._threshold.get(tier, self.least_threshold)
        self._threshold[tier] = fits if fits > before else before - (cooled and fits < before)
