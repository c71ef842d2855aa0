"""lru: under pressure, evict the segments that were used longest ago, until what is needed fits.

Source: least recently used by segment, as in R. L. Mattson et al., "Evaluation techniques for storage hierarchies",
IBM Systems Journal 9(2), 1970. Segments used at one time go last layer first: the first layers are needed first when
the model is opened again, and the rest can stream in behind them.
"""

from __future__ import annotations

from tiermem.policy import Move, Plan, View


class Lru:
    def plan(self, view: View) -> Plan:
        plan: Plan = []
        slowest = view.tiers[-1].id
        for tier in view.tiers[:-1]:
            needed = tier.needed_bytes
            for run in sorted(view.segments(tier.id), key=lambda run: (run.last_used_s, -run.first)):
                if needed <= 0:
                    break
                idle_s = view.now_s - run.last_used_s
                plan.append(Move(run.first, run.pages, tier.id, slowest, f"unused for {idle_s:.1f} s"))
                needed -= run.nbytes
        return plan
