"""Migrator: the only thing that acts on a plan. Checks every move again at the moment it acts; never plans.

A move that no longer holds is refused, and counted by its cause; the rest of the plan goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from tiermem.errors import Refused
from tiermem.journal import Journal
from tiermem.memory import Memory
from tiermem.migrator import log
from tiermem.migrator.history import History
from tiermem.migrator.log import MoveLog
from tiermem.migrator.quota import Quota
from tiermem.migrator.relocation import Order, Relocation
from tiermem.migrator.replicas import Replicas
from tiermem.policy import Move, Plan
from tiermem.types import PAGE_BYTES
from tiermem.view import Piece, Rows

BATCH_BYTES = 64 << 20
"""Bytes in flight at most: large enough that a call of the kernel is worth its while."""

_RETRIES_S = (0.01, 0.04, 0.16)
"""Pauses before pages that were busy are tried again."""


class Migrator:
    """Of one pool. `evict` takes a segment out of memory and returns its bytes, or raises Refused with the
    cause. The pool's lock is held while preconditions are checked and results written down, not while bytes move."""

    def __init__(
        self, memory: Memory, journal: Journal, lock: threading.RLock, quota: Quota, evict: Callable[[Piece], int]
    ) -> None:
        self.log = MoveLog(journal)
        self.quota = quota
        self.replicas = Replicas(self.log, memory.tiers, lock)
        memory.pins.registered = self.replicas.registered
        self.evicted_bytes = 0
        self.moved_bytes = 0
        self._relocation = Relocation(memory, self.log, History(), lock)
        self._tiers, self._lock, self._evict = memory.tiers, lock, evict

    @property
    def moves_shared(self) -> bool:
        """Whether pages that clients have mapped can move; that takes CAP_SYS_NICE."""
        return self._relocation.shared

    def relieve(self, plan: Plan, rows: Rows) -> int:
        """Do the evictions of a plan now, whatever else it holds; returns bytes freed. The lock is held."""
        disk = self._tiers.disk
        return sum(self._evict_move(move, rows) for move in plan if move.kind == "move" and move.target == disk)

    def execute(self, plan: Plan, rows: Rows, end_s: float, guard_s: float, stop: threading.Event) -> None:
        """Do the moves in order, as fast as the quota allows, until `end_s` (monotonic); what is left by then is for
        the next plan. Pages that moved less than `guard_s` ago do not go back."""
        busy: list[Order] = []
        for batch in self._batches(plan, rows):
            if isinstance(batch, Move):
                if batch.kind == "copy" and (stop.is_set() or time.monotonic() >= end_s):
                    self.log.refused[log.LATE] += batch.pages
                else:
                    self._do(batch, rows)
                continue
            nbytes = sum(order.nbytes for order in batch)
            if not self._wait(end_s, stop):
                self._too_late(batch)
                continue
            self.quota.spend(nbytes, time.monotonic())
            for order in batch:
                moved, left = self._relocation.move(order, guard_s)
                self.moved_bytes += moved
                if len(left.pages):
                    busy.append(left)
        self._retry(busy, guard_s, end_s, stop)

    def _batches(self, plan: Plan, rows: Rows) -> Iterator[list[Order] | Move]:
        """Moves in their order: neighbours in the plan that go the same way as one batch, at most BATCH_BYTES."""
        memory = {tier.id for tier in self._tiers.memory}
        batch: dict[tuple[int, str], tuple[Move, list[Piece]]] = {}
        way, held = (-1, -1), 0
        for move in plan:
            between = move.kind == "move" and move.target in memory
            if batch and (not between or way != (move.source, move.target)):
                yield self._orders(batch)
                batch, held = {}, 0
            if not between:
                yield move
                continue
            way = (move.source, move.target)
            for piece in _small(rows.pieces(move.first, move.pages)):
                if batch and held + len(piece.pages) * PAGE_BYTES > BATCH_BYTES:
                    yield self._orders(batch)
                    batch, held = {}, 0
                key = (piece.record.first_id + piece.rows.start - piece.pages.start, move.reason)
                batch.setdefault(key, (move, []))[1].append(piece)
                held += len(piece.pages) * PAGE_BYTES
        if batch:
            yield self._orders(batch)

    def _orders(self, batch: dict[tuple[int, str], tuple[Move, list[Piece]]]) -> list[Order]:
        """One order a segment and reason: the fewer calls, the better."""
        orders = []
        for move, pieces in batch.values():
            pages = np.unique(np.concatenate([np.arange(p.pages.start, p.pages.stop, dtype=np.uint32) for p in pieces]))
            first = pieces[0]
            source, target = self._tiers[move.source], self._tiers[move.target]
            orders.append(Order(first.record, first.segment, pages, source, target, move.reason))
        return orders

    def _do(self, move: Move, rows: Rows) -> None:
        """An eviction, a copy or a drop."""
        if move.kind == "move":
            with self._lock:
                self._evict_move(move, rows)
            return
        act = self.replicas.copy if move.kind == "copy" else self.replicas.drop
        for piece in rows.pieces(move.first, move.pages):
            act(piece, self._tiers[move.source], self._tiers[move.target], move.reason)

    def _evict_move(self, move: Move, rows: Rows) -> int:
        freed = 0
        for piece in rows.pieces(move.first, move.pages):
            place = (piece.record, piece.rows.start, len(piece.pages), move.source, move.target, move.reason)
            try:
                freed += self._evict(piece)
            except Refused as error:
                self.log.refuse(*place, str(error))
            else:
                self.log.done(*place, log.EVICTED)
        self.evicted_bytes += freed
        return freed

    def _wait(self, end_s: float, stop: threading.Event) -> bool:
        """Until the quota allows more; False if that is not before the end."""
        now_s = time.monotonic()
        delay = self.quota.delay(now_s)
        return now_s + delay < end_s and not stop.wait(delay)

    def _too_late(self, batch: list[Order]) -> None:
        # Counted only: the next plan names them again if they still matter.
        self.log.refused[log.LATE] += sum(len(order.pages) for order in batch)

    def _retry(self, busy: list[Order], guard_s: float, end_s: float, stop: threading.Event) -> None:
        """Most pages are busy for a moment only: somebody reads a file into them, or looks at them."""
        for pause in _RETRIES_S:
            if not busy or time.monotonic() + pause > end_s or stop.wait(pause):
                break
            again, busy = busy, []
            for order in again:
                moved, left = self._relocation.move(order, guard_s)
                self.moved_bytes += moved
                if len(left.pages):
                    busy.append(left)
        for order in busy:
            self._relocation.give_up(order)


def _small(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Pieces that fit into a batch."""
    step = BATCH_BYTES // PAGE_BYTES
    for piece in pieces:
        for first in range(piece.pages.start, piece.pages.stop, step):
            yield Piece(piece.record, piece.segment, range(first, min(first + step, piece.pages.stop)))
