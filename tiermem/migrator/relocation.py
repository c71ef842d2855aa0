"""Relocation: pages of a segment go to another NUMA tier, under whoever reads them. Never decides which.

Whether a move still holds is checked under the pool's lock just before it, and what the kernel did is written down
under it afterwards; the move itself takes no lock, so the segment may be evicted or removed meanwhile.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem import _native, host
from tiermem.catalog import ModelRecord
from tiermem.errors import Closed, NativeError
from tiermem.memory import Memory
from tiermem.migrator import log
from tiermem.migrator.history import History
from tiermem.tier import Tier
from tiermem.types import LOADING, PAGE_BYTES

_CAUSES = {
    errno.EBUSY: log.BUSY, errno.EAGAIN: log.BUSY, errno.ENOMEM: log.NO_SPACE, errno.ENOENT: log.GONE,
    errno.EACCES: log.SHARED, errno.EPERM: log.SHARED, errno.ENODEV: log.OFFLINE,
}  # fmt: skip

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """Pages of one segment, ascending numbers within it, are to go from one tier to another."""

    record: ModelRecord
    segment: int
    pages: npt.NDArray[np.uint32]
    source: Tier
    target: Tier
    reason: str

    @property
    def nbytes(self) -> int:
        return len(self.pages) * PAGE_BYTES

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Page numbers within the model."""
        return self.pages.astype(np.int64) + self.record.first_page[self.segment]

    def part(self, chosen: npt.NDArray[np.bool_]) -> Order:
        return Order(self.record, self.segment, self.pages[chosen], self.source, self.target, self.reason)


class Relocation:
    """Of one pool. Without CAP_SYS_NICE (`shared` False) only pages that nobody else has mapped can move."""

    def __init__(self, memory: Memory, moves: log.MoveLog, history: History, lock: threading.RLock) -> None:
        self.shared = host.has_capability(host.ROOT, host.CAP_SYS_NICE)
        self._memory, self._moves, self._history, self._lock = memory, moves, history, lock

    def move(self, order: Order, guard_s: float) -> tuple[int, Order]:
        """Do it; how many bytes moved, and what was busy and may be tried again."""
        with self._lock:
            order = self._admitted(order, guard_s)
            segment = self._memory.segment(order.record, order.segment)
            key = order.record.keys[order.segment]
            if segment is None or not len(order.pages):
                return 0, order.part(np.zeros(len(order.pages), np.bool_))
            self._memory.expect(order.target, order.nbytes)
        results = self._ask_kernel(order, segment)
        with self._lock:
            self._memory.expect(order.target, -order.nbytes)
            if order.record.keys[order.segment] != key:
                self.refuse(order, np.ones(len(order.pages), np.bool_), log.GONE)
                return 0, order.part(np.zeros(len(order.pages), np.bool_))
            return self._settle(order, results)

    def refuse(self, order: Order, which: npt.NDArray[np.bool_], cause: str) -> None:
        """Tell that some pages of an order were not moved."""
        for first, count in log.runs(order.rows[which]):
            self._moves.refuse(order.record, first, count, order.source.id, order.target.id, order.reason, cause)

    def give_up(self, order: Order) -> None:
        """Pages that stayed busy."""
        with self._lock:
            self._history.failed(order.record, order.rows, time.monotonic())
            self.refuse(order, np.ones(len(order.pages), np.bool_), log.BUSY)

    def _admitted(self, order: Order, guard_s: float) -> Order:
        """What of an order still holds now. The lock is held."""
        record, now_s = order.record, time.monotonic()
        if record.keys[order.segment] is None:
            self.refuse(order, np.ones(len(order.pages), np.bool_), log.GONE)
            return order.part(np.zeros(len(order.pages), np.bool_))
        tiers = record.residency[order.rows]
        verdicts = {
            log.PINNED: self._memory.pins.pages(record)[order.rows],
            log.LOADING: tiers == LOADING,
            log.ELSEWHERE: tiers != order.source.id,
            log.OFFLINE: np.full(len(tiers), not order.target.online),
            log.NO_SPACE: np.full(len(tiers), self._history.is_full(order.target.id, now_s)),
            log.PING_PONG: self._history.bounces(record, order.rows, order.target.id, now_s, guard_s),
            log.BACKING_OFF: self._history.backs_off(record, order.rows, now_s),
        }
        verdict = np.select(list(verdicts.values()), range(1, len(verdicts) + 1), 0)
        for number, cause in enumerate(verdicts, 1):
            self.refuse(order, verdict == number, cause)
        order = order.part(verdict == 0)
        # Promotions leave the reserve alone that new loads and demotions live on.
        kept = order.target.low_bytes if order.target.id < order.source.id else 0
        fits = np.arange(len(order.pages)) < ((order.target.free_bytes or 0) - kept) // PAGE_BYTES
        self.refuse(order, ~fits, log.NO_SPACE)
        return order.part(fits)

    def _ask_kernel(self, order: Order, segment: _native.Segment) -> npt.NDArray[np.int32]:
        """The result for each page; a call that failed as a whole failed for each."""
        node = order.target.nodes[0]
        if len(order.target.nodes) > 1:
            free = {n.number: n.free_bytes for n in host.numa_nodes()}
            node = max(order.target.nodes, key=lambda number: free.get(number, 0))
        try:
            results = self._memory.numa.move(segment, order.pages, node, shared=self.shared)
            self._take_back(order, segment, order.pages[results == -errno.ENOMEM])
            return results
        except Closed:  # it left memory just now
            return np.full(len(order.pages), -errno.ENOENT, np.int32)
        except NativeError as error:
            if error.errno == errno.EPERM:
                self.shared = False  # a container's filter may refuse what the capability allows
            _log.warning("cannot move %d pages of %s to node%d: %s", len(order.pages), order.record.name, node, error)
            return np.full(len(order.pages), -(error.errno or errno.EIO), np.int32)

    def _take_back(self, order: Order, segment: _native.Segment, pages: npt.NDArray[np.uint32]) -> None:
        """Of pages for which there was no room some moved in part: that part goes back to where it came from."""
        for page in pages.tolist():
            if self._memory.numa.where(segment, page, 1)[0] == _native.NODE_MIXED:
                part = np.array([page], np.uint32)
                self._memory.numa.move(segment, part, order.source.nodes[0], shared=self.shared)

    def _settle(self, order: Order, results: npt.NDArray[np.int32]) -> tuple[int, Order]:
        """Write down what the kernel did. The lock is held."""
        record, now_s = order.record, time.monotonic()
        there = results >= 0
        rows = order.rows
        self._memory.place(record, rows[there], order.source, order.target)
        self._history.moved(record, rows[there], order.source.id, now_s)
        if there.any():
            self._history.took(order.target.id)
        for first, count in log.runs(rows[there]):
            self._moves.done(record, first, count, order.source.id, order.target.id, order.reason, log.MOVED)
        causes = {
            code: _CAUSES.get(-code, errno.errorcode.get(-code, str(code))) for code in set(results[~there].tolist())
        }
        for code, cause in causes.items():
            if cause == log.NO_SPACE:
                self._history.filled(order.target.id, now_s)
            elif cause != log.BUSY:
                self._history.failed(record, rows[results == code], now_s)
            if cause != log.BUSY:
                self.refuse(order, results == code, cause)
        busy = np.isin(results, [code for code, cause in causes.items() if cause == log.BUSY])
        return int(there.sum()) * PAGE_BYTES, order.part(busy)
