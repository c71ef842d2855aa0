"""Agent: the one background thread of a client. Carries out orders in turn; owns nothing but its queue.

Orders may be given from anywhere, also from inside a garbage collection, because giving one takes no lock.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)

Order = Callable[[], None]


class Agent:
    """Started at once; a daemon thread, so it never keeps a process alive."""

    def __init__(self, name: str) -> None:
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> None:
        """Have `order` carried out; what it raises is logged."""
        self._orders.put(order)

    def settle(self, timeout_s: float = 1.0) -> None:
        """Return when what was submitted before is done, or after `timeout_s`: an order may wait for a dead daemon."""
        done = threading.Event()
        self._orders.put(done.set)
        if self._thread.is_alive():
            done.wait(timeout_s)

    def close(self) -> None:
        """Carry out what was submitted before, then end."""
        self._orders.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order()
            except Exception as error:
                _log.debug("order of %s failed: %s", self._thread.name, error)
