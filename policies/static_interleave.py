"""static_interleave: spread new pages over the memory tiers in proportion to their bandwidth, and move nothing.

Source: weighted interleaving, as by Linux (MPOL_WEIGHTED_INTERLEAVE, 6.9) and by Y. Sun et al., "Demystifying CXL
Memory with Genuine CXL-Ready Systems and Devices", MICRO 2023: reading all tiers at once adds their bandwidths up.

Deviations: by pages of 2 MiB, not 4 KiB. Where a bandwidth is unknown the weight is the capacity.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.policy import Plan, Request, View, evictions, fill_fastest
from tiermem.types import PAGE_BYTES


class StaticInterleave:
    def plan(self, view: View) -> Plan:
        return evictions(view)

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        """Tier of each page; what fits below no watermark goes where the pool would have put it."""
        tiers = [tier for tier in request.tiers if tier.is_memory]
        room = np.array([max(0, tier.free_bytes - tier.low_bytes) // PAGE_BYTES for tier in tiers])
        if len(request) > room.sum():
            return fill_fastest(request)
        weight = np.array([tier.bandwidth_bytes_s for tier in tiers])
        if not (weight > 0).all():
            weight = np.array([float(tier.capacity_bytes or 0) for tier in tiers])
        count = _shares(len(request), weight, room)
        # Page i of n in one tier belongs at (i + 1/2) / n of the way: so the tiers alternate evenly.
        at = np.concatenate([(np.arange(n) + 0.5) / n for n in count.tolist() if n] or [np.empty(0)])
        code = np.repeat(np.array([tier.id for tier in tiers], np.int8), count)
        return code[np.argsort(at, kind="stable")]


def _shares(total: int, weight: npt.NDArray[np.float64], room: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`total` pages by weight, none more than its room, which holds them all: what one cannot take the others share."""
    count = np.zeros(len(room), np.int64)
    while (left := total - int(count.sum())) > 0:
        part = np.where(count < room, weight, 0)
        part = part if part.any() else (count < room).astype(float)
        wanted = np.ceil(left * part / part.sum()).astype(np.int64)
        # Rounded up, so each turn places pages; the first tiers have the page that is too many.
        added = np.minimum(np.diff(np.minimum(np.cumsum(wanted), left), prepend=0), room - count)
        count += added
    return count
