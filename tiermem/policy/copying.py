"""Copying: a policy of memory tiers, asked which pages a device should hold copies of. Never judges a page.

Such a policy says where each page lies. So it is shown the device's tier as its fastest memory tier, and in it the
pages that have a copy there; what it moves in is a `copy`, what it moves out a `drop`. The page itself stays where it
is, and giving a copy up moves no bytes, so that drops which make room for no copy are left out: they can wait for one.
What it would move between other tiers is left out too: it was shown more room there than there is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tiermem.policy.plan import Plan
from tiermem.policy.view import View
from tiermem.types import PAGE_BYTES


def as_memory(view: View, device: int) -> View:
    """The view in which the pages that have a copy in tier `device` lie there, and leave room where they are."""
    pages, bit = view.pages, np.uint8(1 << device)
    copied = (pages.replicas & bit) != 0
    left = np.bincount(pages.tier[copied & (pages.tier >= 0)], minlength=len(view.tiers)) * PAGE_BYTES
    tiers = (replace(tier, used_bytes=tier.used_bytes - int(left[tier.id])) for tier in view.tiers)
    columns = {"tier": np.where(copied, np.int8(device), pages.tier), "replicas": pages.replicas & ~bit}
    for column in columns.values():
        column.flags.writeable = False
    shown = tuple(replace(tier, kind="dram") if tier.id == device else tier for tier in tiers)
    return replace(view, tiers=shown, pages=replace(pages, **columns))


def as_copies(plan: Plan, device: int) -> Plan:
    """What the plan of such a view wants of the device, in copies and drops."""
    made = [
        replace(move, kind="copy" if move.target == device else "drop")
        for move in plan
        if device in (move.source, move.target)
    ]
    while made and made[-1].kind == "drop":
        made.pop()
    return made
