"""Residency of a replay: which tier each page is in, and the moves of a plan done as a pool would. Never plans.

Pages are moved one after another, at the pace of the quota or of the slower of the two tiers. A page that cannot be
moved is refused, for the causes that a pool has, and the rest of the plan goes on until the time of the tick is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.migrator.log import ELSEWHERE, LATE, NO_SPACE, PING_PONG
from tiermem.policy import Plan
from tiermem.tier import Tiers
from tiermem.types import PAGE_BYTES

NO_DISK = "not between memory tiers"
PING_PONG_S = 60.0
"""A page that goes back where it came from within so long is counted."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Pages that were moved in one tick, each at most once, in the order of `at_s`, when each had arrived."""

    page: npt.NDArray[np.int64]
    source: npt.NDArray[np.int8]
    target: npt.NDArray[np.int8]
    at_s: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.page)


class Residency:
    """`tier[page]`, counted in `tiers`. `refused`: pages by cause; `ping_pongs`: see PING_PONG_S."""

    def __init__(self, tier: npt.NDArray[np.int8], tiers: Tiers) -> None:
        self.tier, self.tiers = tier, tiers
        self.refused: Counter[str] = Counter()
        self.ping_pongs = 0
        self._came_from = np.full(len(tier), -1, np.int8)
        self._moved_s = np.full(len(tier), -np.inf)
        for number, pages in enumerate(np.bincount(tier, minlength=len(tiers.memory)).tolist()):
            tiers[number].used_bytes = pages * PAGE_BYTES

    def execute(self, plan: Plan, now_s: float, period_s: float, quota_bytes: int, guard_s: float) -> Moved:
        """Do the plan's moves in its order until the period has passed, at most `quota_bytes` of them."""
        asked = self._admitted(plan, now_s, guard_s)
        done, arrivals = [], []
        at_s = now_s
        pace_s = {way: self._pace_s(way, period_s * PAGE_BYTES / quota_bytes) for way in set(self._ways(asked))}
        room = {tier.id: (tier.free_bytes or 0) // PAGE_BYTES for tier in self.tiers.memory}
        # Promotions leave alone the reserve that new loads and demotions live on.
        kept = {tier.id: tier.low_bytes // PAGE_BYTES for tier in self.tiers.memory}
        for row, (source, target) in enumerate(self._ways(asked)):
            arrives_s = at_s + pace_s[source, target]
            if arrives_s > now_s + period_s + 1e-9:
                self.refused[LATE] += len(asked) - row
                break
            if room[target] <= (kept[target] if target < source else 0):
                self.refused[NO_SPACE] += 1
                continue
            at_s = arrives_s
            room[source] += 1
            room[target] -= 1
            done.append(row)
            arrivals.append(at_s)
        moved = Moved(asked.page[done], asked.source[done], asked.target[done], np.array(arrivals, np.float64))
        self._take(moved, now_s)
        return moved

    def _admitted(self, plan: Plan, now_s: float, guard_s: float) -> Moved:
        """The pages of a plan that may be moved as of now, in its order; when they arrive is left open."""
        memory = {tier.id for tier in self.tiers.memory}
        between = [move for move in plan if move.kind == "move" and {move.source, move.target} <= memory]
        lengths = [move.pages for move in between]
        page = np.concatenate([np.empty(0, np.int64), *(np.arange(m.first, m.first + m.pages) for m in between)])
        source, target = (np.repeat(np.array([getattr(move, end) for move in between], np.int8), lengths)
                          for end in ("source", "target"))  # fmt: skip
        again = np.ones(len(page), np.bool_)
        again[np.unique(page, return_index=True)[1]] = False
        bounces = again | ((self._came_from[page] == target) & (now_s - self._moved_s[page] < guard_s))
        elsewhere = (self.tier[page] != source) & ~bounces
        for cause, count in ((PING_PONG, int(bounces.sum())), (ELSEWHERE, int(elsewhere.sum())),
                             (NO_DISK, sum(move.pages for move in plan) - len(page))):  # fmt: skip
            if count:
                self.refused[cause] += count
        rows = ~bounces & ~elsewhere
        return Moved(page[rows], source[rows], target[rows], np.empty(0))

    @staticmethod
    def _ways(moved: Moved) -> Iterator[tuple[int, int]]:
        return zip(moved.source.tolist(), moved.target.tolist(), strict=True)

    def _pace_s(self, way: tuple[int, int], quota_s: float) -> float:
        """Seconds that a page takes this way."""
        source, target = (self.tiers.memory[tier].speed.bandwidth_bytes_s for tier in way)
        return max(quota_s, PAGE_BYTES / min(source, target))

    def _take(self, moved: Moved, now_s: float) -> None:
        back = (self._came_from[moved.page] == moved.target) & (now_s - self._moved_s[moved.page] < PING_PONG_S)
        self.ping_pongs += int(back.sum())
        self.tier[moved.page] = moved.target
        self._came_from[moved.page] = moved.source
        self._moved_s[moved.page] = moved.at_s
        for tier in self.tiers.memory:
            tier.count(int((moved.target == tier.id).sum() - (moved.source == tier.id).sum()) * PAGE_BYTES)

    def check(self) -> None:
        """Raises AssertionError unless what is counted by tier is what is there, and no tier holds more than it can."""
        for tier in self.tiers.memory:
            there = int((self.tier == tier.id).sum()) * PAGE_BYTES
            assert there == tier.used_bytes, f"tier {tier.name}: {there} bytes are there, {tier.used_bytes} are counted"
            assert there <= (tier.capacity_bytes or 0), f"tier {tier.name} holds {there} of {tier.capacity_bytes} bytes"
