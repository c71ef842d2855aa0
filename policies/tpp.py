"""tpp: demote ahead of need what was untouched for two passes, promote on the second touch.

Source: H. Al Maruf et al., "TPP: Transparent Page Placement for CXL-Enabled Tiered Memory", ASPLOS 2023; the threshold
of latency is that of Linux's NUMA balancing mode 2 (kernel/sched/fair.c since 6.1): a page is promoted if it is touched
again within 1 s on average, adapted every 60 s in 16 steps so that candidates come to the quota within 10 %.

Deviations: a touch is a sampler's window or sample in the place of a hint fault, and a pass is one in which the page
was sampled. Time to a touch is the inverse of the rate. Where nothing is free and inactive pages are left in the fast
tier, they are demoted for what is promoted; the kernel would fail that promotion and wake its reclaim.
"""

from __future__ import annotations

import numpy as np

from tiermem.policy import PageState, Plan, View
from tiermem.policy.evidence import Touches, idle_s
from tiermem.policy.exchange import Exchange
from tiermem.types import PAGE_BYTES


class Tpp:
    default_latency_s = 1.0
    steps = 16
    adapt_s = 60.0
    band = 0.1
    passes = 0b11
    """The last two."""

    def __init__(self) -> None:
        self._touches = Touches()
        self._history = PageState(np.uint8)  # bit i: touched i passes ago
        self._latency_s = self.default_latency_s
        self._last_s = self._adapted_s = float("nan")
        self._candidates = self._quota = 0

    def plan(self, view: View) -> Plan:
        pages = view.pages
        history, touched = self._history.of(pages), self._touches.since(pages) > 0
        passed = touched | ~pages.leased | (pages.sampled_age_s <= max(view.period_s, view.now_s - self._last_s))
        active = history & self.passes != 0
        np.left_shift(history, 1, out=history, where=passed)
        np.bitwise_or(history, touched.view(np.uint8), out=history)
        self._last_s = view.now_s
        slow = view.movable & (pages.tier != view.memory_tiers[0].id if view.memory_tiers else False)
        again = touched & active & ~(pages.rate * self._latency_s < 1)
        self._adapt(view, int(np.count_nonzero(again & slow)))
        inactive = (history & self.passes == 0) & (pages.known | ~pages.leased)
        return Exchange(view, -idle_s(view), lambda value: f"touched {-value:.1f} s ago").settle(again, inactive)

    def _adapt(self, view: View, candidates: int) -> None:
        """Fewer candidates than may move lengthen the time that counts as hot, more shorten it."""
        if not view.now_s >= self._adapted_s:
            self._adapted_s = view.now_s
        self._candidates += candidates
        self._quota += view.quota_bytes // PAGE_BYTES
        if view.now_s - self._adapted_s < self.adapt_s:
            return
        step_s = 2 * self.default_latency_s / self.steps
        if self._candidates > (1 + self.band) * self._quota:
            self._latency_s = max(step_s, self._latency_s - step_s)
        elif self._candidates < (1 - self.band) * self._quota:
            self._latency_s = min(2 * self.default_latency_s, self._latency_s + step_s)
        self._candidates = self._quota = 0
        self._adapted_s = view.now_s
