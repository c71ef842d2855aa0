"""Eviction: how memory becomes free under pressure or on request. Owns the migrator and the time of grace.

Never evicts what is leased, pinned or loading, and never loads. Guarded by the pool's lock.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence

from tiermem.catalog import Catalog, ModelRecord
from tiermem.dram import Dram
from tiermem.errors import CapacityError, Refused
from tiermem.journal import Journal
from tiermem.lease import LeaseTable
from tiermem.migrator import Migrator
from tiermem.policy import Policy
from tiermem.tier import DISK, DRAM, Tier
from tiermem.units import format_bytes, format_seconds
from tiermem.view import Place, view_of


class Eviction:
    """Of one pool. `loading` holds the ids of models with a load in progress; until `hold_until_s` (monotonic) nothing
    is evicted under pressure."""

    def __init__(
        self,
        policy: Policy,
        catalog: Catalog,
        leases: LeaseTable,
        dram: Dram,
        tiers: Sequence[Tier],
        loading: Container[str],
        journal: Journal,
    ) -> None:
        self.migrator = Migrator(policy, self.evict)
        self.hold_until_s = 0.0
        self._catalog, self._leases, self._dram, self._tiers, self._loading = catalog, leases, dram, tiers, loading
        self._journal = journal

    def make_room(self, nbytes: int, record: ModelRecord) -> None:
        """Have `nbytes` free in DRAM, if need be by asking the policy what to evict. Raises CapacityError."""
        dram = self._dram.tier
        lacks = dram.lacks(nbytes)
        if lacks and time.monotonic() >= self.hold_until_s:
            others = (r for r in self._catalog if r is not record)
            leased = self._leases.holders
            view, places = view_of(others, lambda r: leased(r.id) > 0, self._tiers, {DRAM: lacks}, time.monotonic())
            # Nothing is evicted for a load that cannot fit even then.
            if sum(run.nbytes for run in view.segments(DRAM)) >= lacks:
                self.migrator.relieve(view, places)
        if dram.lacks(nbytes):
            waiting = self.hold_until_s - time.monotonic()
            grace = f"; nothing is evicted for another {format_seconds(waiting)} after a restart" if waiting > 0 else ""
            free, capacity = format_bytes(dram.free_bytes or 0), format_bytes(dram.capacity_bytes or 0)
            raise CapacityError(
                f"{record.name} needs {format_bytes(nbytes)} of tier 'dram', which has {free} free of {capacity}, and "
                f"the rest is leased, pinned or held by the policy{grace}; unload a model or raise --dram"
            )

    def refuse_if_held(self, record: ModelRecord) -> None:
        """Raises Refused while the model is leased or pinned."""
        if self._leases.holders(record.id):
            pids = ", ".join(str(pid) for pid in self._leases.pids(record.id)[:5])
            raise Refused(f"{record.name} is leased by process {pids}; close it there first")
        if record.pins:
            raise Refused(f"{record.name} is pinned {record.pins} times; unpin it first")

    def evict(self, place: Place, reason: str) -> int:
        """Take a segment out of memory; returns bytes freed. Raises Refused where it is held, loading or not there."""
        record, segment = place
        self.refuse_if_held(record)
        if record.id in self._loading:
            raise Refused(f"{record.name} is loading")
        if record.keys[segment] is None:
            raise Refused(f"{record.name}: segment {segment} is not in memory")
        freed = self._dram.drop(record, segment)
        pages = record.pages(segment)
        self._journal.tell(
            "move", model=record.id, first=pages.start, pages=pages.stop - pages.start, source=DRAM, target=DISK,
            nbytes=freed, reason=reason,
        )  # fmt: skip
        return freed
