"""lru: keep what was used last.

Source: least recently used, as in R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems
Journal 9(2), 1970. Here a full tier gives down the pages unused for longest, pages touched within the last window take
the place of pages that were not for two, and under pressure the segments used longest ago are evicted; among equals the
last layer goes first.

Deviations: recency is known to a window, not to an access. A baseline, and the worst choice for a cyclic scan larger
than the tier: every page goes down just before its next use.
"""

from __future__ import annotations

from tiermem.policy import Plan, View
from tiermem.policy.evidence import idle_s
from tiermem.policy.exchange import Exchange


class Lru:
    window_s = 1.0

    def plan(self, view: View) -> Plan:
        window_s = max(self.window_s, view.period_s)
        idle = idle_s(view)
        touched = view.pages.age_s <= window_s
        return Exchange(view, -idle, lambda value: f"unused for {-value:.1f} s").settle(touched, idle > 2 * window_s)
