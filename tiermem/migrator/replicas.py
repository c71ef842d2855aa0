"""Replicas: further copies of pages in tiers that no page moves into, such as the memory of a device.

Owns which page has a copy where and the bytes that they take; a store, which a tier's device registers, has the copies.
Weights never change, so a copy may be dropped at any moment and nothing is written back.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord
from tiermem.errors import TiermemError
from tiermem.migrator import log
from tiermem.migrator.log import runs
from tiermem.tier import Tier
from tiermem.types import LOADING, PAGE_BYTES
from tiermem.view import Piece


class ReplicaStore(Protocol):
    """What holds the copies of one tier. `copy` may block, and is made without the pool's lock; `drop` must not block,
    and may be made with it."""

    def copy(self, record: ModelRecord, segment: int, pages: range) -> None:
        """Make copies of these pages of a segment. Raises TiermemError, and then has none of them."""

    def drop(self, record: ModelRecord, segment: int, pages: range) -> None:
        """Give the copies up."""


class Replicas:
    """Of one pool: tier id -> store. `stores` is for the tier's device to put itself in."""

    def __init__(self, moves: log.MoveLog, lock: threading.RLock) -> None:
        self.stores: dict[int, ReplicaStore] = {}
        self._moves, self._lock = moves, lock

    def copy(self, piece: Piece, source: Tier, target: Tier, reason: str) -> None:
        """Copy what of the piece is in memory and has no copy yet; refusals are counted, and nothing is raised."""
        store, record, rows = self.stores.get(target.id), piece.record, piece.rows
        nbytes = len(piece.pages) * PAGE_BYTES
        with self._lock:
            cause = ""
            if store is None:
                cause = log.NO_DEVICE
            elif record.pins:
                cause = log.PINNED
            elif (record.residency[rows] == LOADING).any():
                cause = log.LOADING
            elif (record.residency[rows] != source.id).any() or (record.replicas[rows] >> target.id & 1).any():
                cause = log.ELSEWHERE
            elif target.lacks(nbytes):
                cause = log.NO_SPACE
            if cause or store is None:
                self._moves.refuse(record, rows.start, len(piece.pages), source.id, target.id, reason, cause)
                return
            target.reserve(nbytes)
            key = record.keys[piece.segment]
        try:
            store.copy(record, piece.segment, piece.pages)
        except TiermemError as error:
            cause, reason = log.NOT_COPIED, f"{reason}; {error}"
        else:
            with self._lock:
                if record.keys[piece.segment] == key:
                    record.replicas[rows] |= np.uint8(1 << target.id)
                    self._moves.done(record, rows.start, len(piece.pages), source.id, target.id, reason, log.COPIED)
                    return
            # It left memory meanwhile, and its model perhaps the pool: nobody would give these copies up.
            store.drop(record, piece.segment, piece.pages)
            cause = log.GONE
        with self._lock:
            target.count(-nbytes)
            self._moves.refuse(record, rows.start, len(piece.pages), source.id, target.id, reason, cause)

    def drop(self, piece: Piece, source: Tier, target: Tier, reason: str) -> None:
        """Give up the copies that the piece has in tier `source`."""
        record, rows = piece.record, piece.rows
        bit = np.uint8(1 << source.id)
        with self._lock:
            held: npt.NDArray[np.bool_] = (record.replicas[rows] & bit) != 0
            store = self.stores.get(source.id)
            if store is None or not held.all():
                cause = log.NO_DEVICE if store is None else log.GONE
                self._moves.refuse(record, rows.start, len(piece.pages), source.id, target.id, reason, cause)
                return
            record.replicas[rows] &= ~bit
            self._moves.done(record, rows.start, len(piece.pages), source.id, target.id, reason, log.DROPPED)
        store.drop(record, piece.segment, piece.pages)
        with self._lock:
            source.count(-len(piece.pages) * PAGE_BYTES)

    def forget(self, record: ModelRecord, tiers: Sequence[Tier]) -> None:
        """The model was removed: give up all copies of it."""
        for tier_id, store in self.stores.items():
            for number in range(len(record.keys)):
                base = record.first_page[number]
                held = np.flatnonzero(record.replicas[record.pages(number)] >> tier_id & 1)
                for first, count in runs(held):
                    record.replicas[base + first : base + first + count] &= np.uint8(255 ^ (1 << tier_id))
                    store.drop(record, number, range(first, first + count))
                    tiers[tier_id].count(-count * PAGE_BYTES)
