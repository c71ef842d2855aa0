"""Exchange: what a policy thinks of each page, turned into moves that fit. Never judges a page itself.

A policy gives each page a value (the greater, the faster its tier should be) and says which pages may go up and down;
the exchange knows watermarks, free room, quota and order:

    room first     a tier with less than `low_bytes` free gives its least pages down until `high_bytes` are free
    free room      above `high_bytes` any page that may go up takes it; between the watermarks only one that is worth
                   more than the tier's least: else the pages that made room would come back
    in pairs       where there is no room, a page goes up in place of one that goes down and is worth less
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tiermem.policy.plan import Plan, evictions, moves
from tiermem.policy.view import TierView, View
from tiermem.types import PAGE_BYTES

MAX_PAGES = 1 << 14
"""Pages of one plan: 32 GiB; no link moves more in a second, and what is planned must be sorted and told."""

_CHUNK = 64
"""Pages that change places at once: the most valuable first, and within a chunk in row order, as long runs."""

Rows = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def least(key: Values, rows: Rows, count: int, last: bool = False) -> Rows:
    """The `count` of these ascending rows that have the least key, in that order; among equals the first rows come
    first, or the last."""
    if count <= 0:
        return rows[:0]
    if count < len(rows):
        keys = key[rows]
        limit = np.partition(keys, count - 1)[count - 1]
        below, ties = rows[keys < limit], rows[keys == limit]
        missing = count - len(below)
        rows = np.concatenate((below, ties[len(ties) - missing :] if last else ties[:missing]))
    return rows[np.lexsort((-rows if last else rows, key[rows]))]


class Exchange:
    """The plan of one view, as it grows: evictions where a load waits for room, then moves between memory tiers.

    `tell` writes a value as text, for the reasons.
    """

    def __init__(self, view: View, value: Values, tell: Callable[[float], str]) -> None:
        self.view = view
        self.value = value
        self.plan: Plan = evictions(view)
        self.budget = min(view.quota_bytes // PAGE_BYTES, MAX_PAGES)
        self.free = {tier.id: max(0, tier.free_bytes) // PAGE_BYTES for tier in view.tiers}
        self._tell = tell
        self._unmoved = view.movable.copy()
        for move in self.plan:
            self._unmoved[move.first : move.first + move.pages] = False

    def settle(self, up: Mask, down: Mask, edge: float = 1.0) -> Plan:
        """The whole plan: relieve every tier, then exchange every two. `edge`: how many times the value of the page
        that goes down the other one must exceed."""
        self.relieve()
        for fast, slow in self.pairs():
            self.exchange(fast, slow, up, down, edge)
        return self.plan

    def pairs(self) -> Iterator[tuple[TierView, TierView]]:
        """(faster, slower) memory tiers: the fastest first, and for each the slowest first, where most is gained."""
        memory = self.view.memory_tiers
        for number, fast in enumerate(memory):
            for slow in reversed(memory[number + 1 :]):
                yield fast, slow

    def rows(self, tier: TierView, mask: Mask | None = None) -> Rows:
        """Rows of pages in this tier that no move of the plan has."""
        there = (self.view.pages.tier == tier.id) & self._unmoved
        return np.flatnonzero(there if mask is None else there & mask)

    def relieve(self) -> None:
        """The slower tiers first: what they give down is room for the faster ones."""
        memory = self.view.memory_tiers
        for number in range(len(memory) - 2, -1, -1):
            fast = memory[number]
            if self.free[fast.id] * PAGE_BYTES >= fast.low_bytes:
                continue
            for slow in memory[number + 1 :]:
                lack = -(-fast.high_bytes // PAGE_BYTES) - self.free[fast.id]
                count = min(lack, self.free[slow.id], self.budget)
                rows = least(self.value, self.rows(fast), count, last=True)
                self._move_all(rows, fast, slow, "room is needed")

    def exchange(self, fast: TierView, slow: TierView, up: Mask, down: Mask, edge: float = 1.0) -> None:
        """Pages of `slow` that may go up take the room of `fast`, and then the places of those that may go down."""
        hot = self.rows(slow, up)
        if not len(hot) or not self.budget:
            return
        marks = (-(-mark // PAGE_BYTES) for mark in (fast.high_bytes, fast.low_bytes))
        above, between = (max(0, self.free[fast.id] - mark) for mark in marks)
        hot = least(-self.value, hot, min(self.budget, between + self.budget // 2))
        there = self.rows(fast)
        better = int(np.count_nonzero(self.value[hot] > self.value[there].min())) if len(there) else len(hot)
        alone = min(len(hot), max(above, min(between, better)))
        self._move_all(hot[:alone], slow, fast, "there is room")
        hot = hot[alone:]
        cold = least(self.value, there[down[there]], min(len(hot), self.budget // 2), last=True)
        hot = hot[: len(cold)]
        gains = int(np.count_nonzero(self.value[hot] > edge * self.value[cold[: len(hot)]]))
        self.swap(fast, slow, hot[:gains], cold[:gains])

    def swap(self, fast: TierView, slow: TierView, ups: Rows, downs: Rows) -> None:
        """ups[i] and downs[i] change places, as far as budget and room for the step between allow."""
        pairs = min(len(ups), len(downs), self.budget // 2)
        first = 0
        while first < pairs:
            down_first = self.free[slow.id] > 0
            count = min(_CHUNK, pairs - first, self.free[slow.id if down_first else fast.id])
            if not count:
                return
            higher, lower = ups[first : first + count], downs[first : first + count]
            steps = [
                (lower, fast, slow, f"gives way to {self._span(higher)}"),
                (higher, slow, fast, f"in place of {self._span(lower)}"),
            ]
            for step in steps if down_first else reversed(steps):
                self._move(*step)
            first += count

    def send(self, rows: Rows, source: TierView, target: TierView, why: str) -> None:
        """These rows, in this order, as far as budget and room allow."""
        self._move_all(rows[: min(self.budget, self.free[target.id])], source, target, why)

    def _move_all(self, rows: Rows, source: TierView, target: TierView, why: str) -> None:
        for first in range(0, len(rows), _CHUNK):
            self._move(rows[first : first + _CHUNK], source, target, why)

    def _move(self, rows: Rows, source: TierView, target: TierView, why: str) -> None:
        self.plan += moves(self.view, np.sort(rows), target.id, f"{self._span(rows)}, {why}")
        self.budget -= len(rows)
        self.free[source.id] += len(rows)
        self.free[target.id] -= len(rows)
        self._unmoved[rows] = False

    def _span(self, rows: Rows) -> str:
        values = self.value[rows]
        least, most = self._tell(float(values.min())), self._tell(float(values.max()))
        return least if least == most else f"{least} to {most}"
