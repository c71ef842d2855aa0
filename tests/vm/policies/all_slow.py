"""All slow: everything goes to the slowest memory tier, and new pages begin there."""

import numpy as np
import numpy.typing as npt

from tiermem.policy import Plan, Request, View, moves
from tiermem.types import PAGE_BYTES


class AllSlow:
    period_s = 0.2
    guard_s = 0.0

    def plan(self, view: View) -> Plan:
        slowest = view.memory_tiers[-1]
        rows = np.flatnonzero(view.movable & (view.pages.tier != slowest.id))
        room = min(view.quota_bytes, slowest.free_bytes) // PAGE_BYTES
        return moves(view, rows[:room], slowest.id, "everything is slow here")

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        slowest = [tier for tier in request.tiers if tier.is_memory][-1]
        return np.full(len(request), slowest.id, np.int8)
