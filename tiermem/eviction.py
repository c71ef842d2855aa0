"""Eviction: how memory becomes free under pressure or on request. Owns the time of grace.

Never evicts what is leased, pinned or loading, and never loads. Guarded by the pool's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from tiermem.catalog import ModelRecord
from tiermem.errors import CapacityError, Refused
from tiermem.fingerprint import is_image
from tiermem.lease import LeaseTable
from tiermem.memory import Memory
from tiermem.migrator import log
from tiermem.units import format_bytes, format_seconds
from tiermem.view import Piece


class Eviction:
    """Of one pool. `relieve(nbytes, record)` asks the policy for room that a load of the record needs; `loading` holds
    the ids of models with a load in progress; `forget(record)` drops an image, which nothing could bring back, as a
    whole; until `hold_until_s` (monotonic) nothing is evicted under pressure."""

    def __init__(
        self,
        memory: Memory,
        leases: LeaseTable,
        loading: Container[str],
        relieve: Callable[[int, ModelRecord], None],
        forget: Callable[[ModelRecord], None],
    ) -> None:
        self.hold_until_s = 0.0
        self._forget = forget
        self._memory, self._leases, self._loading, self._relieve = memory, leases, loading, relieve

    def make_room(self, nbytes: int, record: ModelRecord) -> None:
        """Have `nbytes` free in memory, if need be by asking the policy what to evict. Raises CapacityError."""
        tiers = self._memory.tiers
        lacks = nbytes - tiers.free_bytes
        if lacks > 0:
            self._memory.pins.release_idle()
        if lacks > 0 and time.monotonic() >= self.hold_until_s:
            self._relieve(lacks, record)
        if nbytes > tiers.free_bytes:
            waiting = self.hold_until_s - time.monotonic()
            grace = f"; nothing is evicted for another {format_seconds(waiting)} after a restart" if waiting > 0 else ""
            where = "tier 'dram'" if not tiers.several else "tiers " + ", ".join(repr(t.name) for t in tiers.memory)
            raise CapacityError(
                f"{record.name} needs {format_bytes(nbytes)} of {where}, which has {format_bytes(tiers.free_bytes)} "
                f"free of {format_bytes(tiers.capacity_bytes)}, and the rest is leased, pinned or held by the "
                f"policy{grace}; unload a model or raise --tier"
            )

    def refuse_if_held(self, record: ModelRecord) -> None:
        """Raises Refused while the model is leased or pinned."""
        if self._leases.holders(record.id):
            pids = ", ".join(str(pid) for pid in self._leases.pids(record.id)[:5])
            raise Refused(f"{record.name} is leased by process {pids}; close it there first")
        if record.pins:
            raise Refused(f"{record.name} is pinned {record.pins} times; unpin it first")

    def evict(self, piece: Piece) -> int:
        """Take a segment out of memory, as the policy wants; returns bytes freed. Raises Refused with the cause."""
        record = piece.record
        whole = len(piece.pages) == record.manifest.segments[piece.segment].pages
        for cause, holds in (
            (log.ELSEWHERE, not whole),
            (log.LEASED, self._leases.holders(record.id) > 0),
            (log.PINNED, record.pins > 0),
            (log.LOADING, record.id in self._loading),
            (log.GONE, record.keys[piece.segment] is None),
        ):
            if holds:
                raise Refused(cause)
        return self._drop_image(record) if is_image(record.manifest) else self._memory.drop(record, piece.segment)

    def evict_model(self, record: ModelRecord) -> int:
        """Take a whole model out of memory, as somebody asked; returns bytes freed. Raises Refused."""
        self.refuse_if_held(record)
        if record.id in self._loading:
            raise Refused(f"{record.name} is loading; wait until it is there, or unload it")
        return self._drop_image(record) if is_image(record.manifest) else self._memory.drop_all(record)

    def _drop_image(self, record: ModelRecord) -> int:
        nbytes = record.resident_bytes()
        self._forget(record)
        return nbytes
