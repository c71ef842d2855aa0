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
"""What sampling costs, in what of it can be measured here: the client also finds caches and TLBs emptied, and is
interrupted for that. From paired runs of tests/bench/sampling.py."""

_GUESSED_PAGE_S = 0.25e-6
_CHANGE = 0.25
"""By so much the pages of an epoch must have changed to tell what each of them costs in a turn."""

_KEPT = 0.5
_MOST_GROWTH = 4.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What a tick of `turns` epochs cost. CPU seconds: `agent_s` of the agent; `turn_s` what of them went into looking
    at pages and unmapping them; `fault_s` of page faults that sampling made; `client_s` of the client without the
    agent. `pages` had a turn; `wall_s` is how long all that was."""

    agent_s: float
    turn_s: float
    fault_s: float
    pages: int
    turns: int
    client_s: float
    wall_s: float


class Budget:
    """Keeps agent_s + fault_s, and what they entail, at `fraction` of client_s, where a tick costs something by itself,
    each of its epochs too, and each page in it a little more. `pause_s`: from one epoch to the next."""

    def __init__(self, fraction: float = 0.01, epoch_s: float = 0.1) -> None:
        self.pause_s = epoch_s
        self._epoch_s = epoch_s
        self._fraction = fraction
        self._pages = 0.0
        self._known = False
        self._tick_s = self._turn_s = self._fault_s = self._sampled = self._client_s = self._wall_s = 0.0
        self._page_s = _GUESSED_PAGE_S
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

    def pages(self, total: int, spent: Spent | None, turns: int = 1) -> int:
        """Pages of each epoch, out of `total`, in a tick that will have so many. `spent` is None in the first one."""
        least = min(total, max(LEAST_PAGES, math.ceil(total * LEAST_PART)))
        if spent is None:
            self._pages = float(least)
            return least
        self._learn(spent)
        allowed_s = self._fraction / _UNSEEN * self._client_s / self._wall_s if self._wall_s else 0.0  # for each second
        page_s = self._page_s + (self._fault_s / self._sampled if self._sampled else 0.0)
        fixed_s = self._tick_s / turns + max(self._turn_s - self._page_s * self._sampled, 0.0)
        room_s = allowed_s * self._epoch_s - fixed_s
        wanted = room_s / page_s if page_s else (math.inf if room_s > 0 else 0.0)
        if wanted >= least:
            self.pause_s = self._epoch_s
            # Pages that were not sampled yet may be touched more than those that were.
            self._pages = min(wanted, self._pages * _MOST_GROWTH)
        else:
            needed_s = fixed_s + least * page_s
            self.pause_s = min(max(needed_s / allowed_s, self._epoch_s) if allowed_s else math.inf, LONGEST_PAUSE_S)
            self._pages = 0.0
        self._pages = min(max(self._pages, float(least)), float(total))
        return int(self._pages)

    def _learn(self, spent: Spent) -> None:
        """Means that forget: of a tick without its turns, and of one turn."""
        turns = max(spent.turns, 1)
        turn_s, pages = spent.turn_s / turns, spent.pages / turns
        if self._known and abs(pages - self._sampled) > _CHANGE * self._sampled:
            slope_s = (turn_s - self._turn_s) / (pages - self._sampled)
            self._page_s = (self._page_s + min(max(slope_s, 0.0), turn_s / pages if pages else 0.0)) / 2
        kept = _KEPT if self._known else 0.0
        self._known = True
        self._tick_s = kept * self._tick_s + (1 - kept) * max(spent.agent_s - spent.turn_s, 0.0)
        self._turn_s = kept * self._turn_s + (1 - kept) * turn_s
        self._fault_s = kept * self._fault_s + (1 - kept) * spent.fault_s / turns
        self._sampled = kept * self._sampled + (1 - kept) * pages
        self._client_s = kept * self._client_s + (1 - kept) * spent.client_s
        self._wall_s = kept * self._wall_s + (1 - kept) * spent.wall_s
