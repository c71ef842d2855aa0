"""Agent: the one background thread of a client. Carries out orders in turn, and tasks that come round by themselves.

Owns nothing but its queue. Orders may be given from anywhere, also from inside a garbage collection, because giving one
takes no lock that is held for long, or by whoever may collect.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from operator import itemgetter
from typing import Protocol

_log = logging.getLogger(__name__)

Order = Callable[[], None]


class Task(Protocol):
    """What an agent does when no order waits."""

    @property
    def pause_s(self) -> float | None:
        """Seconds until it is due; None: not before another order was carried out."""

    def run(self) -> None:
        """Do it once."""

    def wake(self) -> None:
        """An order waits: have `run`, if it is under way, return soon."""


class Agent:
    """Started at once; a daemon thread, so it never keeps a process alive."""

    def __init__(self, name: str, *tasks: Task) -> None:
        self._tasks = tasks
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> None:
        """Have `order` carried out; what it raises is logged."""
        self._give(order)

    def settle(self, timeout_s: float = 1.0) -> None:
        """Return when what was submitted before is done, or after `timeout_s`: an order may wait for a dead daemon."""
        done = threading.Event()
        self._give(done.set)
        if self._thread.is_alive():
            done.wait(timeout_s)

    def close(self) -> None:
        """Carry out what was submitted before, then end."""
        self._give(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _give(self, order: Order | None) -> None:
        self._orders.put(order)
        for task in self._tasks:
            task.wake()

    def _run(self) -> None:
        while (order := self._next()) is not None:
            try:
                order()
            except Exception as error:
                _log.debug("order of %s failed: %s", self._thread.name, error)

    def _next(self) -> Order | None:
        pauses_s = [(pause_s, task) for task in self._tasks if (pause_s := task.pause_s) is not None]
        soonest = min(pauses_s, key=itemgetter(0), default=None)
        try:
            return self._orders.get(timeout=None if soonest is None else max(0.0, soonest[0]))
        except queue.Empty:
            assert soonest is not None
            return soonest[1].run
