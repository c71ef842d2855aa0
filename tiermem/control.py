"""Control: the loop beside a pool's work: view -> policy -> migrator, once per period of the policy.

Owns one thread, which runs only where there are several memory tiers, or devices that take copies: else there is
nothing to move. Decides nothing itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tiermem.migrator import Migrator
from tiermem.policy import View
from tiermem.steering import Steering
from tiermem.tier_watch import TierWatch
from tiermem.view import Rows

_log = logging.getLogger(__name__)


class Control:
    """`view(quota_bytes, period_s)` gives the pool's view and what its rows are."""

    def __init__(
        self,
        steering: Steering,
        migrator: Migrator,
        watch: TierWatch,
        view: Callable[[int, float], tuple[View, Rows]],
    ) -> None:
        self.ticks = 0
        self.cpu_s = 0.0
        self._steering, self._migrator, self._watch, self._view = steering, migrator, watch, view
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tiermem-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the loop after the batch that is moving."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        self._watch.measure()
        next_s = time.monotonic()
        while not self._stop.wait(max(0.0, next_s - time.monotonic())):
            # A late tick is not made up for.
            next_s = max(next_s, time.monotonic() - self._steering.period_s) + self._steering.period_s
            try:
                self._tick()
            except Exception:
                _log.exception("a tick of the control loop failed; the next one is tried")
            self.ticks += 1
            self.cpu_s = time.thread_time()

    def _tick(self) -> None:
        self._watch.look()
        self._steering.refresh()
        if self._steering.failure:
            return
        period_s = self._steering.period_s
        view, rows = self._view(int(self._migrator.quota.bytes_s * period_s), period_s)
        plan = self._steering.plan(view)
        if plan:
            # A period from here on: on a slow host, where the view took long, something moves all the same.
            end_s = time.monotonic() + period_s
            self._migrator.execute(plan, rows, end_s, self._steering.guard_s, self._stop)
