"""hemem: count samples, cool all counts when one grows too large; hot pages take the places of the oldest cold ones.

Source: A. Raybuck et al., "HeMem: Scalable Tiered Memory Management for Big Data Applications and Real NVM", SOSP 2021;
parameters as in its code: hot at 8 samples, cooling (halving) once a page has more than 18.

Deviations: no page of ours is written, so there is no threshold for stores. Counts are taken in and cooled at once for
all pages at each view, not page by page as samples come, which also spares every counter its own clock. Where there is
no PMU, touched windows are counted in the place of samples. If no page is cold nothing is promoted, as in the source;
but a tier below its low watermark gives down its least hot pages, since loads wait for that room.
"""

from __future__ import annotations

import numpy as np

from tiermem.policy import PageState, Plan, View
from tiermem.policy.evidence import Touches, idle_s
from tiermem.policy.exchange import Exchange


class Hemem:
    hot_at = 8
    cool_above = 18

    def __init__(self) -> None:
        self._touches = Touches()
        self._count = PageState(np.int64)

    def plan(self, view: View) -> Plan:
        count = self._count.of(view.pages)
        count += self._touches.since(view.pages)
        while len(count) and count.max() > self.cool_above:
            count >>= 1
        hot = count >= self.hot_at
        # Among cold pages the oldest goes first; all of them are worth less than any hot one.
        value = np.where(hot, count, -idle_s(view)).astype(np.float32, copy=False)
        return Exchange(view, value, self._tell).settle(hot, ~hot)

    def _tell(self, value: float) -> str:
        return f"hot with {value:.0f} samples" if value > 0 else f"cold, unused for {-value:.1f} s"
