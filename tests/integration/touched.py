"""Memory whose every touch is known: by page faults (Touched) and by watched words (Words)."""

from __future__ import annotations

import mmap
import os
import random

import numpy as np

UNIT_BYTES = 64 << 10
"""What one read fault of a file maps at most (fault-around)."""


class Touched:
    """`units` of a shared, resident file, none of which is mapped yet: the first touch of each is one page fault."""

    def __init__(self, units: int) -> None:
        self.units = units
        descriptor = os.memfd_create("touched")
        os.ftruncate(descriptor, (units + 1) * UNIT_BYTES)
        for unit in range(units + 1):  # so that no fault is for lack of memory
            os.pwrite(descriptor, b"\1" * UNIT_BYTES, unit * UNIT_BYTES)
        self._map = mmap.mmap(descriptor, (units + 1) * UNIT_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        os.close(descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._base = self._bytes.ctypes.data
        self.address = -(-self._base // UNIT_BYTES) * UNIT_BYTES  # fault-around maps aligned windows

    @staticmethod
    def offsets(units: int, seed: int, address: int) -> list[int]:
        """One address in each unit, in random order."""
        chance = random.Random(seed)
        order = chance.sample(range(units), units)
        return [address + unit * UNIT_BYTES + chance.randrange(UNIT_BYTES) for unit in order]

    def order(self, seed: int) -> list[int]:
        return self.offsets(self.units, seed, self.address)

    def touch(self, address: int) -> None:
        assert self._bytes[address - self._base] == 1

    def touch_all(self, seed: int) -> None:
        for address in self.order(seed):
            self.touch(address)

    def forget(self) -> None:
        """Unmap every page; the file keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> Touched:
        return self

    def __exit__(self, *_: object) -> None:
        del self._bytes
        self._map.close()


class Words:
    """Eight-byte words, each read by one load."""

    def __init__(self, count: int) -> None:
        self._array = np.ones(count + 8, np.int64)
        self.address = self._array.ctypes.data
        self._words = memoryview(self._array)

    def read(self, word: int, times: int) -> None:
        words = self._words
        for _ in range(times):
            assert words[word] == 1
