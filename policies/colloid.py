"""colloid: move pages until the tiers' latencies under load are equal; packing the hottest is right only without load.

Source: M. Vuppalapati and R. Agarwal, "Tiered Memory Management: Access Latency is the Key!", SOSP 2024; parameters as
in its code: delta 0.05 (latencies that differ by less are equal), epsilon 0.01 (a bracket narrower than that is opened
again). p is the part of all accesses that the faster tier serves; a bracket [p_lo, p_hi] closes on the p at which
latencies are equal, and pages change places whose shares of the accesses come to the distance from its middle.

Deviations: latencies are those of the view and not smoothed again; shares come from rates. The limit of moves is the
quota. Pairs are taken greatest difference first while their sum fits, in one pass of sorted arrays. With three tiers
each two neighbours are balanced. Where a latency is unknown the tiers are not balanced but packed: the hottest go up,
with a third more rate than what goes down for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiermem.policy import Plan, TierView, View
from tiermem.policy.evidence import likely_rate
from tiermem.policy.exchange import Exchange, Rows, Values, least
from tiermem.types import PAGE_BYTES


@dataclass(slots=True)
class _Bracket:
    low: float = 0.0
    high: float = 1.0

    def shift(self, part: float, faster: bool, epsilon: float) -> float:
        """How much of all accesses is to go to the faster tier, or negative, to the slower one; `faster`: it is."""
        if faster:
            self.low = part
            if self.high <= part or self.high - part < epsilon:
                self.high = 1.0
        else:
            self.high = part
            if self.low >= part or part - self.low < epsilon:
                self.low = 0.0
        return (self.low + self.high) / 2 - part


class Colloid:
    delta = 0.05
    epsilon = 0.01
    edge = 4 / 3

    def __init__(self) -> None:
        self._brackets: dict[tuple[str, str], _Bracket] = {}

    def plan(self, view: View) -> Plan:
        rate = likely_rate(view)
        exchange = Exchange(view, rate, lambda rate: f"rate {rate:.2f}/s")
        exchange.relieve()
        for fast, slow in zip(view.memory_tiers, view.memory_tiers[1:], strict=False):
            if np.isfinite(fast.latency_s) and np.isfinite(slow.latency_s):
                self._balance(exchange, fast, slow, rate)
            else:
                exchange.exchange(fast, slow, rate > 0, view.movable, self.edge)
        return exchange.plan

    def _balance(self, exchange: Exchange, fast: TierView, slow: TierView, rate: Values) -> None:
        high, low = exchange.rows(fast), exchange.rows(slow)
        served, total = float(rate[high].sum()), float(rate[high].sum() + rate[low].sum())
        if total <= 0 or abs(fast.latency_s - slow.latency_s) <= self.delta * fast.latency_s:
            return
        bracket = self._brackets.setdefault((fast.name, slow.name), _Bracket())
        shift = bracket.shift(served / total, fast.latency_s < slow.latency_s, self.epsilon) * total
        if shift > 0:
            room = exchange.free[fast.id] - -(-fast.low_bytes // PAGE_BYTES)
            self._shift(exchange, slow, fast, low, high, shift, room)
        else:
            self._shift(exchange, fast, slow, high, low, -shift, exchange.free[slow.id])

    def _shift(
        self, exchange: Exchange, source: TierView, target: TierView, rows: Rows, others: Rows, shift: float, room: int
    ) -> None:
        """Touches per second worth `shift` go from source to target: into its room, then for its least pages."""
        rate = exchange.value
        hot = least(-rate, rows[(rate[rows] > 0) & (rate[rows] <= shift)], exchange.budget)
        alone = hot[: max(0, room)]
        alone = alone[np.cumsum(rate[alone], dtype=np.float64) <= shift]
        why = f"{target.latency_s * 1e9:.0f} ns there, {source.latency_s * 1e9:.0f} ns here"
        exchange.send(alone, source, target, why)
        hot, shift = hot[len(alone) :], shift - float(rate[alone].sum())
        cold = least(rate, others, min(len(hot), exchange.budget // 2))
        hot = hot[: len(cold)]
        gain = (rate[hot] - rate[cold[: len(hot)]]).astype(np.float64)
        count = int(np.count_nonzero((gain > 0) & (np.cumsum(gain) <= shift)))
        if target.id < source.id:
            exchange.swap(target, source, hot[:count], cold[:count])
        else:
            exchange.swap(source, target, cold[:count], hot[:count])
