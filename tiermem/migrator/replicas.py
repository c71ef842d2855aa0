"""Replicas: further copies of pages on devices, which no page moves into.

Owns which carrier of which client has a copy of which page, as the clients tell, and the orders to make and drop
copies; the processes that own the devices carry them out. Weights never change, so a copy may be dropped at any moment
and nothing is written back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord
from tiermem.errors import ProtocolError
from tiermem.lease import Lease
from tiermem.migrator import log
from tiermem.migrator.carried import Carried, Order, pages_of
from tiermem.rpc.replica_messages import CarryOrder, ReplicasRequest
from tiermem.tier import Tier, Tiers
from tiermem.types import LOADING, PAGE_BYTES
from tiermem.view import Piece

PATIENCE_S = 30.0
"""For an answer. A client that kept an order waiting for longer gets no more until it has answered."""

_MOST_ORDERS = 256
_MOST_CARRIERS = 1024
"""That one lease may have."""


class Replicas:
    """Of one pool. Its lock must be held, but for `copy` and `drop`, which take it."""

    def __init__(self, moves: log.MoveLog, tiers: Tiers, lock: threading.RLock) -> None:
        self._carried: dict[tuple[str, int], Carried] = {}
        self._orders = 0
        self._closed = False
        self._moves, self._tiers, self._lock = moves, tiers, lock

    # --- what clients tell --------------------------------------------------------------------------------------

    def report(self, lease: Lease, record: ModelRecord, request: ReplicasRequest) -> npt.NDArray[np.int32]:
        """What a carrier has now replaces what it had; the pages that it copied. Raises ProtocolError, and then nothing
        of the report counts."""
        pages, copied = pages_of(record, request)
        carried = self._reporting(lease, record, request)
        for result in request.results:
            if result.order not in carried.orders and not 0 < result.order <= self._orders:
                raise ProtocolError(f"lease {lease.id}: order {result.order} was never given")
            if any(result.order in other.orders for other in self._carried.values() if other is not carried):
                raise ProtocolError(f"lease {lease.id}: order {result.order} was given to another carrier")
        self._carried[lease.id, carried.number] = carried
        carried.budget_bytes, carried.capacity_bytes = request.budget_bytes, request.capacity_bytes
        carried.registered = request.registered
        if carried.tier is not None and not carried.tier.capacity_bytes:
            carried.tier.capacity_bytes = request.capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self._hold(carried, pages)
        for result in request.results:
            self._end(carried, result.order, result.error)
        if request.gone:
            self._leave(carried, f"process {lease.session.pid} gave its copies on {carried.device} up")
        return copied

    def released(self, lease: Lease) -> None:
        """A lease ended, and with it what its holder had copied."""
        self._leave_all(
            (carried for carried in self._carried.values() if carried.lease is lease),
            f"process {lease.session.pid} closed the model, or ended",
        )

    def forget(self, record: ModelRecord) -> None:
        """The model was removed."""
        gone = (carried for carried in self._carried.values() if carried.record is record)
        self._leave_all(gone, "the model was removed")

    def close(self) -> None:
        """Nobody waits for an answer any more, and no order is given."""
        self._closed = True
        for carried in self._carried.values():
            for number in list(carried.orders):
                self._end(carried, number, "the pool is closing")

    # --- what a plan wants --------------------------------------------------------------------------------------

    def copy(self, piece: Piece, source: Tier, target: Tier, reason: str) -> None:
        """Have a client that reads the model copy the piece to its device, and wait for its answer. Refusals are
        counted, and nothing is raised."""
        self._settle(target)
        with self._lock:
            carried, cause = self._carrier_for(piece, source, target)
            if carried is None:
                self._refuse(piece, source, target, reason, cause)
                return
            order = Order("copy", piece, source, target, reason)
            target.reserve(order.reserved_bytes)
            self._give(carried, order)
        if not order.ended.wait(PATIENCE_S):
            with self._lock:
                if not order.ended.is_set():
                    order.late = True
                    late = f"process {carried.lease.session.pid} did not answer within {PATIENCE_S:.0f} s"
                    self._refuse(piece, source, target, f"{reason}; {late}", log.NOT_COPIED)

    def drop(self, piece: Piece, source: Tier, target: Tier, reason: str) -> None:
        """Have every client that has copies of the piece in tier `source` give them up, unless it was told already.
        Does not wait."""
        with self._lock:
            bit = np.uint8(1 << source.id) if source.device else np.uint8(0)
            if not bit or not (piece.record.replicas[piece.rows] & bit).all():
                self._refuse(piece, source, target, reason, log.GONE if bit else log.NO_DEVICE)
                return
            for carried in self._of(piece.record, source):
                if not carried.pages[piece.rows].any() or carried.dropping(piece):
                    continue
                if self._listens(carried):
                    self._give(carried, Order("drop", piece, source, target, reason))
                else:
                    self._refuse(piece, source, target, reason, log.BUSY)

    # --- for readers --------------------------------------------------------------------------------------------

    def carriers(self) -> list[Carried]:
        """All of them, by lease, for the caller to read."""
        return [self._carried[key] for key in sorted(self._carried)]

    def registered(self, record: ModelRecord) -> bool:
        """Whether a device reads the model's memory by itself: its pages are pinned."""
        return any(carried.registered and carried.record is record for carried in self._carried.values())

    def check(self, records: Iterable[ModelRecord]) -> None:
        """Catalog and tiers tell what the carriers have."""
        known = list(records)
        for carried in self._carried.values():
            assert any(carried.record is record for record in known), f"copies of {carried.record.name} outlive it"
            assert not carried.lease.session.ended, f"copies outlive process {carried.lease.session.pid}"
        for tier in self._tiers.devices:
            there = [carried for carried in self._carried.values() if carried.tier is tier]
            kept = sum(order.reserved_bytes for carried in there for order in carried.orders.values())
            nbytes = sum(carried.held_bytes for carried in there) + kept
            assert nbytes == tier.used_bytes, f"tier {tier.name} counts {tier.used_bytes} bytes, carriers {nbytes}"
        for record in known:
            bits = np.zeros_like(record.replicas)
            for tier in self._tiers.devices:
                bits |= self._union(record, tier) * np.uint8(1 << tier.id)
            assert (bits == record.replicas).all(), f"{record.name}: the catalog has other copies than the carriers"

    # --- inside -------------------------------------------------------------------------------------------------

    def _reporting(self, lease: Lease, record: ModelRecord, request: ReplicasRequest) -> Carried:
        """The carrier of a report, not yet known if it is new. Raises ProtocolError."""
        found = self._carried.get((lease.id, request.carrier))
        if found is None:
            if sum(carried.lease is lease for carried in self._carried.values()) >= _MOST_CARRIERS:
                raise ProtocolError(f"lease {lease.id} has {_MOST_CARRIERS} carriers already; close one")
            tier = next((tier for tier in self._tiers.devices if tier.device == request.device), None)
            return Carried(lease, record, request.carrier, request.device, tier, np.zeros(record.first_page[-1], bool))
        if found.device != request.device:
            raise ProtocolError(
                f"carrier {request.carrier} of lease {lease.id} is of {found.device}, and not of {request.device}"
            )
        return found

    def _carrier_for(self, piece: Piece, source: Tier, target: Tier) -> tuple[Carried | None, str]:
        """Who is to copy the piece, or the cause why nobody is."""
        record, rows = piece.record, piece.rows
        there = [carried for carried in self._of(record, target) if carried.lease.session.give] if target.device else []
        free = next((carried for carried in there if self._listens(carried)), None)
        for cause, holds in (
            (log.NO_DEVICE, self._closed or not there),
            (log.PINNED, record.pins > 0),
            (log.LOADING, (record.residency[rows] == LOADING).any()),
            (log.ELSEWHERE, (record.residency[rows] != source.id).any()),
            (log.ELSEWHERE, bool(target.device) and (record.replicas[rows] >> target.id & 1).any()),
            (log.NO_SPACE, target.lacks(len(piece.pages) * PAGE_BYTES) > 0),
            (log.BUSY, free is None),
        ):
            if holds:
                return None, cause
        return free, ""

    def _settle(self, tier: Tier) -> None:
        """Drops that were ordered before make room first."""
        with self._lock:
            there = [carried for carried in self._carried.values() if carried.tier is tier]
            drops = [order for carried in there for order in carried.orders.values() if order.kind == "drop"]
        end_s = time.monotonic() + PATIENCE_S
        for order in drops:
            if not order.late and not order.ended.wait(max(0.0, end_s - time.monotonic())):
                order.late = True

    def _give(self, carried: Carried, order: Order) -> None:
        give, piece = carried.lease.session.give, order.piece
        assert give is not None
        self._orders += 1
        carried.orders[self._orders] = order
        pages = piece.pages
        give(CarryOrder(self._orders, order.kind, carried.number, piece.segment, pages.start, len(pages)))

    def _end(self, carried: Carried, number: int, error: str) -> None:
        """An order was answered; one that has ended already may be answered again."""
        order = carried.orders.pop(number, None)
        if order is None:
            return
        order.target.count(-order.reserved_bytes)
        way = (order.source, order.target)
        reason = f"{order.reason}; {error}" if error else order.reason
        if order.kind == "copy":
            if not error:
                self._done(order, log.COPIED)
            elif not order.late:
                self._refuse(order.piece, *way, reason, log.NOT_COPIED)
        elif carried.pages[order.piece.rows].any():
            self._refuse(order.piece, *way, reason, log.IN_USE)
        else:
            self._done(order, log.DROPPED)
        order.ended.set()

    def _hold(self, carried: Carried, pages: npt.NDArray[np.bool_]) -> None:
        """A carrier has these pages now."""
        before, carried.pages = carried.held_bytes, pages
        if (tier := carried.tier) is not None:
            tier.count(carried.held_bytes - before)
            record, bit = carried.record, 1 << tier.id
            record.replicas &= np.uint8(255 ^ bit)
            record.replicas |= self._union(record, tier) * np.uint8(bit)

    def _leave(self, carried: Carried, why: str) -> None:
        self._hold(carried, np.zeros_like(carried.pages))
        del self._carried[carried.lease.id, carried.number]
        for number in list(carried.orders):
            self._end(carried, number, why)

    def _leave_all(self, gone: Iterable[Carried], why: str) -> None:
        for carried in list(gone):
            self._leave(carried, why)

    def _of(self, record: ModelRecord, tier: Tier) -> list[Carried]:
        """Carriers of a model in a tier, the lowest lease first."""
        return [carried for carried in self.carriers() if carried.record is record and carried.tier is tier]

    def _union(self, record: ModelRecord, tier: Tier) -> npt.NDArray[np.bool_]:
        union = np.zeros(record.first_page[-1], np.bool_)
        for carried in self._of(record, tier):
            union |= carried.pages
        return union

    def _listens(self, carried: Carried) -> bool:
        orders = carried.orders
        answers = not any(order.late for order in orders.values()) and len(orders) < _MOST_ORDERS
        return answers and carried.lease.session.give is not None

    def _done(self, order: Order, outcome: str) -> None:
        piece = order.piece
        where = (piece.record, piece.rows.start, len(piece.pages), order.source.id, order.target.id)
        self._moves.done(*where, order.reason, outcome)

    def _refuse(self, piece: Piece, source: Tier, target: Tier, reason: str, cause: str) -> None:
        where = (piece.record, piece.rows.start, len(piece.pages), source.id, target.id)
        self._moves.refuse(*where, reason, cause)
