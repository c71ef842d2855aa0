"""Tiering: which tier each page of a pool goes to. Ties views, the policy in charge, eviction and migrator together.

Decides nothing itself: the policy does. Never loads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container

import numpy as np

from tiermem.catalog import Catalog, ModelRecord
from tiermem.control import Control
from tiermem.errors import CapacityError
from tiermem.eviction import Eviction
from tiermem.lease import LeaseTable, Session
from tiermem.memory import Memory, Placement
from tiermem.migrator import Migrator, Quota
from tiermem.migrator.log import EVICTED
from tiermem.policy import View
from tiermem.rpc.replica_messages import ReplicasRequest
from tiermem.statistics import AccessStatistics
from tiermem.steering import Steering
from tiermem.tier_watch import TierWatch
from tiermem.view import Rows, Views


class Tiering:
    """Of one pool, whose `lock` must be held but where it says otherwise. `loading`: ids of models that load."""

    def __init__(
        self,
        steering: Steering,
        quota_bytes_s: int,
        memory: Memory,
        catalog: Catalog,
        leases: LeaseTable,
        loading: Container[str],
        statistics: AccessStatistics,
        lock: threading.RLock,
        forget: Callable[[ModelRecord], None],
    ) -> None:
        self.steering = steering
        self.eviction = Eviction(memory, leases, loading, self._relieve, forget)
        self.migrator = Migrator(memory, statistics.journal, lock, Quota(quota_bytes_s), self.eviction.evict)
        self.watch = TierWatch(memory, catalog, lock)
        self.control = Control(steering, self.migrator, self.watch, self._view)
        self._memory, self._tiers, self._lock = memory, memory.tiers, lock
        self._catalog, self._leases, self._statistics = catalog, leases, statistics
        self._views = Views(
            memory.tiers, statistics.heat, lambda record: leases.holders(record.id) > 0, memory.pins.pages
        )

    def start(self) -> None:
        """Begin to move pages, where there is anywhere to move them."""
        if self._tiers.steered:
            self.control.start()

    def close(self) -> None:
        """The lock must not be held."""
        with self._lock:
            self.migrator.replicas.close()
        self.control.close()
        self.steering.close()
        self.watch.close()

    def places(self, record: ModelRecord, segments: list[int]) -> dict[int, Placement]:
        """The tier of each page of segments that are about to be loaded, and for which there is room."""
        counts = [record.manifest.segments[i].pages for i in segments]
        if self._tiers.several:
            placed = self.steering.place(self._views.request(record, segments, time.monotonic()))
            if (placed < 0).any():
                homeless = int((placed < 0).sum())
                raise CapacityError(f"{record.name}: no memory tier has room for {homeless} of its pages")
        else:
            placed = np.full(sum(counts), self._tiers.memory[0].id, np.int8)
        return dict(zip(segments, np.split(placed, np.cumsum(counts)[:-1]), strict=True))

    def settle(self, record: ModelRecord, segment: int) -> None:
        """A segment was filled: where did the kernel put its pages? The lock must not be held."""
        if self._tiers.several:
            self.watch.settle(record, segment)

    def evict(self, record: ModelRecord) -> int:
        """Take a model out of memory, as somebody asked; returns bytes freed. Raises Refused."""
        held = [(i, int(record.placed[record.first_page[i]])) for i, key in enumerate(record.keys) if key is not None]
        freed = self.eviction.evict_model(record)
        for i, tier in held:
            first, count = record.first_page[i], record.manifest.segments[i].pages
            self.migrator.log.done(record, first, count, tier, self._tiers.disk, "asked for", EVICTED)
        return freed

    def report(self, session: Session, request: ReplicasRequest) -> None:
        """A client tells what it copied to a device; the lock must not be held.

        Raises Refused for a lease that is not the session's, and ProtocolError for what cannot be. Void for a model
        that was removed, or whose load failed.
        """
        with self._lock:
            lease = self._leases.get(request.lease_id, session)
            record = self._catalog.by_id(lease.model_id)
            if record is not None and lease.error is None:
                self._statistics.copied(record, self.migrator.replicas.report(lease, record, request))

    def check(self) -> None:
        """What is in memory and on devices is what the catalog says."""
        self._memory.check(self._catalog)
        self.migrator.replicas.check(self._catalog)

    def _view(self, quota_bytes: int, period_s: float) -> tuple[View, Rows]:
        """For the control loop, which does not hold the lock."""
        with self._lock:
            return self._views.view(self._catalog, time.monotonic(), 0, quota_bytes, period_s)

    def _relieve(self, lacks: int, record: ModelRecord) -> None:
        """Have the policy evict `lacks` bytes for a load of the record; nothing for one that cannot fit even then."""
        others = [other for other in self._catalog if other is not record]
        view, rows = self._views.view(others, time.monotonic(), needed_bytes=lacks)
        if sum(run.nbytes for run in view.evictable()) >= lacks:
            self.migrator.relieve(self.steering.plan(view), rows)
