"""Memory: the segments that are in memory: their files, which tier counts each page, and what the catalog says of it.

Keeps the three in step: a segment has a file exactly while each of its pages is counted in one memory tier. Never
decides what goes in or out, or where. Guarded by the pool's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.catalog import Catalog, ModelRecord
from tiermem.errors import Refused, TiermemError
from tiermem.pins import Pins
from tiermem.segment import Backing, allocate
from tiermem.tier import Tier, Tiers
from tiermem.types import PAGE_BYTES

Placement = npt.NDArray[np.int8]
"""Tier of each page of a segment."""


class Memory:
    """Segments of one backing, counted in the memory tiers of a pool."""

    def __init__(self, backing: Backing, tiers: Tiers) -> None:
        self.backing = backing
        self.tiers = tiers
        self.pins = Pins()
        self._segments: dict[str, _native.Segment] = {}
        self._expected = {tier.id: 0 for tier in tiers.memory}
        self.moves = 0  # that began or ended: what was asked of the kernel before is old

    @cached_property
    def numa(self) -> _native.Numa:
        """Asks the kernel where pages of segments are, and moves them; opened when it is first needed."""
        return _native.Numa()

    def expect(self, tier: Tier, nbytes: int) -> None:
        """Keep room in a tier for pages that are about to move there; negative: no longer. Raises CapacityError."""
        if nbytes > 0:
            tier.reserve(nbytes)
        else:
            tier.count(nbytes)
        self._expected[tier.id] += nbytes
        self.moves += 1

    def place(self, record: ModelRecord, rows: npt.NDArray[np.int64], source: Tier, target: Tier) -> None:
        """Pages of a model went from one tier to another."""
        source.count(-len(rows) * PAGE_BYTES)
        target.count(len(rows) * PAGE_BYTES)
        record.place(rows, target.id)

    def create(self, record: ModelRecord, placed: Mapping[int, Placement]) -> dict[int, _native.Segment]:
        """Empty files for segments of a model, with the tier of each page: all of them or, with CapacityError, none."""
        made: dict[int, tuple[str, _native.Segment]] = {}
        counted: list[tuple[int, int]] = []
        try:
            for i in placed:
                key = record.new_key(i)
                made[i] = (key, allocate(self.backing, key, record.manifest.segments[i].page_bytes))
            for tier in self.tiers.memory:
                nbytes = sum(int((pages == tier.id).sum()) for pages in placed.values()) * PAGE_BYTES
                tier.reserve(nbytes)
                counted.append((tier.id, nbytes))
        except TiermemError:
            for key, segment in made.values():
                segment.close()
                self.backing.unlink(key)
            for tier_id, nbytes in counted:
                self.tiers[tier_id].count(-nbytes)
            raise
        for i, (key, segment) in made.items():
            record.begin(i, key, placed[i])
            self._segments[key] = segment
        return {i: segment for i, (_, segment) in made.items()}

    def adopt(self, record: ModelRecord, number: int, key: str) -> _native.Segment:
        """Take over a segment that an earlier pool left. Where its pages really are is settled once it was read.

        Raises NativeError where it is missing or cut, CapacityError where the tiers are too small.
        """
        pages = record.manifest.segments[number].pages
        placed = np.empty(pages, np.int8)
        done = 0
        for tier in self.tiers.memory:
            count = min((tier.free_bytes or 0) // PAGE_BYTES, pages - done)
            placed[done : done + count] = tier.id
            done += count
        if done < pages:
            self.tiers.memory[0].reserve(pages * PAGE_BYTES)  # says how much it lacks
        segment = self.backing.adopt(key, pages * PAGE_BYTES)
        self._count(placed, 1)
        record.begin(number, key, placed)
        self._segments[key] = segment
        return segment

    def segment(self, record: ModelRecord, number: int) -> _native.Segment | None:
        """The segment while it is in memory. Who keeps it may use it after it was dropped: it is then unlinked only."""
        key = record.keys[number]
        return None if key is None else self._segments[key]

    def settle(self, record: ModelRecord, number: int, first: int, nodes: npt.NDArray[np.int16]) -> int:
        """The kernel says on which nodes the pages of a segment lie, from page `first` of it on; how many pages were
        counted elsewhere. A page on several nodes counts in the slowest tier; one that is absent stays as it is."""
        of_node = {int(node): self.tiers.of_node(int(node)) for node in np.unique(nodes) if node >= 0}
        pages = slice(record.first_page[number] + first, record.first_page[number] + first + len(nodes))
        before = record.placed[pages]
        after = before.copy()
        for node, tier in of_node.items():
            after[nodes == node] = tier
        after[nodes == _native.NODE_MIXED] = self.tiers.memory[-1].id
        changed = int((after != before).sum())
        if changed:
            self._count(before, -1)
            self._count(after, 1)
            record.place(pages, after)
        return changed

    def drop(self, record: ModelRecord, number: int) -> int:
        """Take a segment out of memory; readers' mappings keep their bytes. Returns the bytes given back."""
        nbytes = record.manifest.segments[number].page_bytes
        self._count(record.placed[record.pages(number)], -1)
        key = record.drop(number)
        self.pins.give_back(key)
        self._segments.pop(key).close()
        self.backing.unlink(key)
        return nbytes

    def drop_all(self, record: ModelRecord) -> int:
        """Take a whole model out of memory. Returns the bytes given back."""
        return sum(self.drop(record, i) for i, key in enumerate(record.keys) if key is not None)

    def share(self, record: ModelRecord, numbers: Iterable[int], lend: bool = False) -> list[int]:
        """New descriptors of segments, read-only unless lent. Raises Refused where one is not in memory."""
        keys = []
        for i in numbers:
            key = record.keys[i] if 0 <= i < len(record.keys) else None
            if key is None:
                raise Refused(f"{record.name}: segment {i} is not in memory; open the model again")
            keys.append(key)
        return [self._segments[key].lend() if lend else self._segments[key].share() for key in keys]

    def paths(self, record: ModelRecord) -> tuple[str, ...]:
        """Where this user's processes of this host find each segment's file. Raises Refused while one is not whole."""
        found = []
        for i, key in enumerate(record.keys):
            if key is None or not record.resident(i):
                raise Refused(f"{record.name}: segment {i} is not in memory as a whole; wait until the model is loaded")
            found.append(self.backing.path(key) or f"/proc/{os.getpid()}/fd/{self._segments[key].fileno}")
        return tuple(found)

    def check(self, catalog: Catalog) -> None:
        """Each page is counted once, and twice while it moves."""
        held = np.zeros(len(self.tiers), np.int64)
        for record in catalog:
            held += np.bincount(record.placed, minlength=len(held))
        for tier in self.tiers.memory:
            nbytes = int(held[tier.id]) * PAGE_BYTES + self._expected[tier.id]
            assert nbytes == tier.used_bytes, f"tier {tier.name} counts {tier.used_bytes} bytes, models hold {nbytes}"
        keys = {key for record in catalog for key in record.keys if key is not None}
        assert keys == set(self._segments), "segments and catalog differ"

    def close(self, keep: bool) -> None:
        """Unmap everything; unless `keep`, give the memory back."""
        for segment in self._segments.values():
            segment.close()
        if "numa" in self.__dict__:
            self.numa.close()
        self.backing.close(keep)

    def _count(self, placed: Placement, sign: int) -> None:
        for tier in self.tiers.memory:
            tier.count(sign * int((placed == tier.id).sum()) * PAGE_BYTES)
