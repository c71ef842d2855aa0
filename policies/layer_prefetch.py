"""layer_prefetch: rank pages by the expected time to their next use, which for weights is better known than for memory.

Three facts about weights that no policy for memory in general has:

    leases    who reads a model holds a lease of it. When the last one ends its pages are idle at once, and worth what
              they were read in the long run; when the model is opened again its rates of last time count at once.
    shares    the pages of a model are used in fixed proportions, the model itself in bursts. So the rate of a page is
              its share, learned slowly, times the rate of the model, learned fast.
    cycles    a scan of layers comes round. Where that takes longer than a few views each page's next use is known, and
              pages due next take the places of those just read. In a faster scan all pages are worth the same: those in
              the fast tier stay, and that part of each round is served from there.

While idle pages are in the fast tier some are demoted ahead of need: a burst then costs one move a page, not two.
The router of a mixture of experts is not foreseen: experts rank by rate.

Source: ours. Replacing what is used last: L. A. Belady, "A study of replacement algorithms for a virtual-storage
computer", IBM Systems Journal 5(2), 1966; a part that stays, the rest streamed: Y. Sheng et al., "FlexGen", ICML 2023.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.policy import PageState, Plan, View
from tiermem.policy.exchange import Exchange, Mask, Values, least
from tiermem.types import PAGE_BYTES, TENSOR_CLASSES


class LayerPrefetch:
    period_s = 0.5
    guard_s = 1.0
    forget = 1 / 12
    """Weight of a fresh sample against all older ones."""
    prior = 2.0
    """Samples of a page for which the mean of its model's other pages of that class counts."""
    doubt = 10.0
    """Touches per second that must be fresh for a model's burst to be believed by half."""
    long_half_life_s = 300.0
    edge = 1.2
    reserve_s = 2.0
    """Seconds of quota that are kept free at the cost of idle pages, but no more than an eighth of the tier."""
    ahead = 3.0
    """Views by which a streamed page comes before its use, at most."""
    disorder = 0.05
    """Part of the steps in time along a scan that may run backwards, beside the one where it is."""

    def __init__(self) -> None:
        self._share = PageState(np.float32)  # touches per second while the model is read
        self._seen = PageState(np.float32)  # views with a fresh sample of it
        self._burst = PageState(np.float32, 1)  # of its model: how much more it is read now than usually
        self._long = PageState(np.float32)  # touches per second of all time
        self._last_s = -1e9

    def plan(self, view: View) -> Plan:
        pages = view.pages
        if not len(pages):
            return []
        reading = pages.leased if pages.leased.any() else np.ones(len(pages), np.bool_)
        value = self._expected(view, reading)
        up = reading & (value > 0)
        self._stream(view, value, up)
        exchange = Exchange(view, value, "expected {:.2f}/s".format)
        exchange.settle(up, view.movable, self.edge)
        for fast, slow in exchange.pairs():
            reserve = min(self.reserve_s / view.period_s * view.quota_bytes, (fast.capacity_bytes or 0) // 8)
            lack = min(exchange.budget, int(reserve + fast.low_bytes) // PAGE_BYTES - exchange.free[fast.id])
            exchange.send(least(value, exchange.rows(fast, ~reading), lack, last=True), fast, slow, "idle, room ahead")
        return exchange.plan

    def _expected(self, view: View, reading: Mask) -> Values:
        """Touches per second to be expected of each page."""
        pages, models = view.pages, len(view.models)
        passed_s, self._last_s = max(0.0, view.now_s - self._last_s), view.now_s
        share, seen, burst, long = (state.of(pages) for state in (self._share, self._seen, self._burst, self._long))
        # What was sampled before, or of a model that nobody read, says nothing of now.
        fresh = reading & (pages.sampled_age_s <= passed_s) & (pages.rate >= 0)
        rate = np.where(fresh, pages.rate, 0)
        group = pages.model * np.int32(len(TENSOR_CLASSES)) + pages.tensor_class
        total, count = (np.bincount(group, of, models * len(TENSOR_CLASSES)) for of in (rate, fresh))
        guess = (total + total.sum() / max(1, count.sum())) / (count + 1)
        np.copyto(share, guess.astype(np.float32)[group], where=reading & (seen == 0))
        seen += fresh
        share += fresh * np.maximum(self.forget, 1 / (seen + self.prior)) * (rate - share)
        burst[:] = self._bursts(view, total.reshape(models, -1).sum(1, dtype=np.float32), share * fresh, burst)[
            pages.model
        ]
        value: Values = burst * share * reading
        long += np.float32(1 - 2 ** (-min(passed_s, view.period_s) / self.long_half_life_s)) * (value - long)
        np.maximum(value, long, out=value)
        return value

    def _bursts(self, view: View, now: Values, usual: Values, burst: Values) -> Values:
        """By model: rate of its fresh pages over what is usual of them; 1 where it was just opened."""
        first = np.searchsorted(view.pages.model, np.arange(len(view.models)))
        before: Values = burst[np.minimum(first, len(burst) - 1)]
        before[view.now_s - view.models.last_open_s <= 2 * view.period_s] = 1
        expected = np.bincount(view.pages.model, usual, len(first)).astype(np.float32)
        return np.asarray((now + self.doubt * before) / (expected + self.doubt), np.float32)

    def _stream(self, view: View, value: Values, up: Mask) -> None:
        """Of the pages of scans slower than the views, only those due soon may go up, the soonest first."""
        pages = view.pages
        starts = np.flatnonzero(np.diff(pages.model, prepend=-1))
        ends, age_s = np.append(starts[1:], len(pages)), pages.age_s
        longest, latest = np.fmax.reduceat(age_s, starts), np.fmin.reduceat(age_s, starts)
        slow = (longest > (self.ahead + 2) * view.period_s) & (latest <= 2 * view.period_s) & up[starts]
        # Ages of a scan lie evenly; NaN where a page was never seen.
        slow &= np.abs(np.add.reduceat(age_s, starts) / (ends - starts) - longest / 2) < 0.2 * longest
        for rows, cycle_s in zip(map(slice, starts[slow], ends[slow]), longest[slow], strict=True):
            if self._in_order(pages.last_seen_s[rows][np.argsort(pages.order[rows], kind="stable")]):
                due_s = cycle_s - age_s[rows]
                value[rows] = value[rows].mean() * cycle_s / np.maximum(due_s, view.period_s)
                # What is due before it could have been moved would come too late.
                up[rows] = (due_s >= view.period_s) & (due_s <= self.ahead * view.period_s)

    def _in_order(self, seen_s: npt.NDArray[np.float64]) -> bool:
        """Times in reading order ascend, in several steps, but where the scan is."""
        changes, back = np.count_nonzero(np.diff(seen_s)), np.count_nonzero(np.diff(seen_s) < 0)
        return bool(changes >= 4 and back <= 1 + self.disorder * changes)
