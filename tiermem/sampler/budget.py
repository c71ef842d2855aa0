"""Budget: how many pages are sampled, and how often, so that sampling costs a set part of the client's CPU time.

A pure controller: is told what was spent, and never measures or sleeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_PART, LEAST_PAGES = 1 / 64, 16
"""So many pages an epoch are sampled at least; what they cost too much is saved by longer epochs."""

IDLE = 0.01
"""Of one core: a client that uses less is not sampled, its windows last longer."""

IDLE_PAUSE_S, LONGEST_PAUSE_S = 1.0, 120.0
_UNSEEN = 1.25
"""What sampling costs beside what can be measured here: the client finds caches and TLBs emptied. From paired runs."""

_KEPT = 0.7
_MOST_GROWTH = 2.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What happened since the last epoch. CPU seconds: `agent_s` of the agent; `page_s` what of them grows with the
    pages that it looks at and unmaps; `fault_s` of page faults that sampling made; `client_s` of the client without the
    agent. `wall_s` is how long that was."""

    agent_s: float
    page_s: float
    fault_s: float
    pages: float
    client_s: float
    wall_s: float


class Budget:
    """Keeps agent_s + fault_s, and what they entail, at `fraction` of client_s, where an epoch costs something by
    itself, and something for each page. `pause_s`: until the next epoch."""

    def __init__(self, fraction: float = 0.01, epoch_s: float = 0.1) -> None:
        self.pause_s = epoch_s
        self._epoch_s = epoch_s
        self._fraction = fraction
        self._pages = 0.0
        self._known = False
        self._fixed_s = self._page_s = self._sampled = self._client_s = self._wall_s = 0.0
        self._idle_pause_s = 0.0

    def is_idle(self, client_s: float, wall_s: float) -> bool:
        """Whether this epoch is skipped; if so, the pause grows up to a second."""
        if client_s >= IDLE * wall_s:
            if self._idle_pause_s:
                self.pause_s, self._idle_pause_s = self._idle_pause_s, 0.0
            return False
        self._idle_pause_s = self._idle_pause_s or self.pause_s
        self.pause_s = max(self.pause_s, min(2 * self.pause_s, IDLE_PAUSE_S))
        return True

    def pages(self, total: int, spent: Spent | None) -> int:
        """Pages of the next epoch, out of `total`. `spent` is None in the first one."""
        least = min(total, max(LEAST_PAGES, math.ceil(total * LEAST_PART)))
        if spent is None:
            self._pages = float(least)
            return least
        self._learn(spent)
        allowed_s = self._fraction / _UNSEEN * self._client_s / self._wall_s if self._wall_s else 0.0  # for each second
        page_s = self._page_s / self._sampled if self._sampled else 0.0
        room_s = allowed_s * self._epoch_s - self._fixed_s
        wanted = room_s / page_s if page_s else math.inf if room_s > 0 else 0.0
        if wanted >= least:
            self.pause_s = self._epoch_s
            # Pages that were not sampled yet may be touched more than those that were.
            self._pages = min(wanted, self._pages * _MOST_GROWTH)
        else:
            needed_s = self._fixed_s + least * page_s
            self.pause_s = min(max(needed_s / allowed_s, self._epoch_s) if allowed_s else math.inf, LONGEST_PAUSE_S)
            self._pages = 0.0
        self._pages = min(max(self._pages, float(least)), float(total))
        return int(self._pages)

    def _learn(self, spent: Spent) -> None:
        """Means that forget. The parts of a page's cost are summed before they are divided: an epoch may have none."""
        kept = _KEPT if self._known else 0.0
        self._known = True
        fixed_s = max(spent.agent_s - spent.page_s, 0.0)
        self._fixed_s = kept * self._fixed_s + (1 - kept) * fixed_s
        self._page_s = kept * self._page_s + (1 - kept) * (spent.page_s + spent.fault_s)
        self._sampled = kept * self._sampled + (1 - kept) * spent.pages
        self._client_s = kept * self._client_s + (1 - kept) * spent.client_s
        self._wall_s = kept * self._wall_s + (1 - kept) * spent.wall_s
