"""Bench of the shipped policies: what one view of a full pool costs each. `python -m tests.bench.policies [PAGES]`.

Views are made from a seed: three memory tiers 90 % full, new touches and ages from each to the next, 2 GiB of quota.
Every plan is checked. Processor time of the one thread that plans; the median has a limit, and exit code 1 says that it
was exceeded.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np

from tiermem.policy import View, check_plan, load_policy
from tiermem.policy.sample import sample_view
from tiermem.units import format_bytes, format_seconds

POLICIES = ("lru", "hemem", "memtis", "tpp", "colloid", "layer_prefetch", "static_interleave")
PAGES = 1_000_000
VIEWS = 7
LIMIT_S = 0.1


def views_of(pages: int) -> list[View]:
    """A sequence of views, a second apart, in each of which every page was touched by chance as its rate says."""
    view = sample_view(pages, 1, memory_tiers=3, quota_bytes=2 << 30)
    views = [view]
    for number in range(1, VIEWS):
        random = np.random.default_rng(number)
        touches = random.poisson(np.nan_to_num(view.pages.rate)).astype(np.uint32)
        age_s = np.where(touches > 0, random.random(pages), view.pages.age_s + 1).astype(np.float32)
        view = replace(
            view,
            now_s=view.now_s + 1,
            pages=replace(view.pages, observed=view.pages.observed + touches, age_s=age_s),
        )
        views.append(view)
    return views


def main() -> int:
    pages = int(sys.argv[1]) if len(sys.argv) > 1 else PAGES
    views = views_of(pages)
    worst = 0.0
    print(
        f"{pages} pages, {len(views[0].models)} models, 3 memory tiers; limit {format_seconds(LIMIT_S)} in the median"
    )
    print(f"{'policy':<18} {'median':>9} {'longest':>9} {'moved':>9} {'moves':>6}")
    for name in POLICIES:
        policy, spent_s = load_policy(name), []
        for view in views:
            begin = time.thread_time()
            plan = policy.plan(view)
            spent_s.append(time.thread_time() - begin)
            check_plan(view, plan)
        median = float(np.median(spent_s))
        worst = max(worst, median)
        moved = format_bytes(sum(move.pages for move in plan) * 2.0**21)
        print(f"{name:<18} {format_seconds(median):>9} {format_seconds(max(spent_s)):>9} {moved:>9} {len(plan):>6}")
    return int(worst > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
