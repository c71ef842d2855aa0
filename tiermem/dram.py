"""Dram: the segments that are in memory: their files, their bytes in the tier, and what the catalog says of them.

Keeps the three in step: a segment has a file exactly while its tier counts it and its pages are not on disk. Never
decides what goes in or out. Guarded by the pool's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tiermem import _native
from tiermem.catalog import Catalog, ModelRecord
from tiermem.errors import Refused, TiermemError
from tiermem.segment import Backing, allocate
from tiermem.tier import Tier


class Dram:
    """Segments of one backing, counted in one tier."""

    def __init__(self, backing: Backing, tier: Tier) -> None:
        self.backing = backing
        self.tier = tier
        self._segments: dict[str, _native.Segment] = {}

    def create(self, record: ModelRecord, numbers: Iterable[int]) -> dict[int, _native.Segment]:
        """Empty files for segments of a model: all of them or, with CapacityError, none."""
        made: dict[int, tuple[str, _native.Segment]] = {}
        try:
            for i in numbers:
                key = record.new_key(i)
                made[i] = (key, allocate(self.backing, key, record.manifest.segments[i].page_bytes))
            self.tier.reserve(sum(segment.nbytes for _, segment in made.values()))
        except TiermemError:
            for key, segment in made.values():
                segment.close()
                self.backing.unlink(key)
            raise
        for i, (key, segment) in made.items():
            record.begin(i, key)
            self._segments[key] = segment
        return {i: segment for i, (_, segment) in made.items()}

    def take_over(self, record: ModelRecord, segments: Mapping[int, _native.Segment]) -> None:
        """Segments that adoption began and counted already."""
        for i, segment in segments.items():
            key = record.keys[i]
            assert key is not None
            self._segments[key] = segment

    def drop(self, record: ModelRecord, number: int) -> int:
        """Take a segment out of memory; readers' mappings keep their bytes. Returns the bytes given back."""
        nbytes = record.manifest.segments[number].page_bytes
        key = record.drop(number)
        self._segments.pop(key).close()
        self.backing.unlink(key)
        self.tier.release(nbytes)
        return nbytes

    def drop_all(self, record: ModelRecord) -> int:
        """Take a whole model out of memory. Returns the bytes given back."""
        return sum(self.drop(record, i) for i, key in enumerate(record.keys) if key is not None)

    def share(self, record: ModelRecord, numbers: Iterable[int]) -> list[int]:
        """New read-only descriptors of segments. Raises Refused where one is not in memory."""
        keys = []
        for i in numbers:
            key = record.keys[i] if 0 <= i < len(record.keys) else None
            if key is None:
                raise Refused(f"{record.name}: segment {i} is not in memory; open the model again")
            keys.append(key)
        return [self._segments[key].share() for key in keys]

    def check(self, catalog: Catalog) -> None:
        held = sum(record.resident_bytes() for record in catalog)
        assert held == self.tier.used_bytes, f"tier counts {self.tier.used_bytes} bytes, models hold {held}"
        keys = {key for record in catalog for key in record.keys if key is not None}
        assert keys == set(self._segments), "segments and catalog differ"

    def close(self, keep: bool) -> None:
        """Unmap everything; unless `keep`, give the memory back."""
        for segment in self._segments.values():
            segment.close()
        self.backing.close(keep)
