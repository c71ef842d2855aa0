"""Random moves: each tick sends some pages, drawn with a fixed seed, to the other of two memory tiers."""

import numpy as np

from tiermem.policy import Plan, View, moves
from tiermem.types import PAGE_BYTES


class RandomMoves:
    period_s = 0.5
    guard_s = 0.0

    def __init__(self) -> None:
        self._random = np.random.default_rng(20)

    def plan(self, view: View) -> Plan:
        fast, slow = view.memory_tiers
        movable = self._random.permutation(np.flatnonzero(view.movable))
        rows = movable[: min(view.quota_bytes // PAGE_BYTES, -(-len(movable) // 2))]
        tier = view.pages.tier[rows]
        down = rows[tier == fast.id][: slow.free_bytes // PAGE_BYTES]
        up = rows[tier == slow.id][: fast.free_bytes // PAGE_BYTES]
        return moves(view, down, slow.id, "drawn") + moves(view, up, fast.id, "drawn")
