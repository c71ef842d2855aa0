"""The offset of perf's clock: what to add to the time of a record to get CLOCK_MONOTONIC.

Hardware events keep the kernel's own clock, because naming another costs Intel's their multi-record mode. Owns
measuring the offset of the two; never converts a record.
"""

from __future__ import annotations

import mmap
import time

import numpy as np

from tiermem import samples
from tiermem._native import Decoder, Event, Layout, Ring
from tiermem.errors import NativeError
from tiermem.sampler.events import PAGE_FAULTS_MIN, PERF_TYPE_SOFTWARE

_SAMPLE_TYPE = samples.TID | samples.TIME | samples.ADDR
_TRIES = 8


def offset_ns() -> int:
    """CLOCK_MONOTONIC minus perf's clock, from page faults of our own between two readings of CLOCK_MONOTONIC; of some
    tries the one with the readings closest together, so right to microseconds. The clocks drift apart by as much as
    time is being adjusted, at most 0.5 ms in a second. Raises NativeError where the kernel gives us no events."""
    event = Event(PERF_TYPE_SOFTWARE, PAGE_FAULTS_MIN, sample_type=_SAMPLE_TYPE)
    brackets = []
    with mmap.mmap(-1, mmap.PAGESIZE * _TRIES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        ring = Ring(event, 0, -1, nbytes=16 << 10)
        try:
            for number in range(_TRIES):
                before = time.monotonic_ns()
                memory[number * mmap.PAGESIZE] = 1
                brackets.append((before, time.monotonic_ns()))
            ring.disable()
            buffer = bytearray(16 << 10)
            read = ring.read(buffer)
        finally:
            ring.close()
    rows = Decoder([Layout(_SAMPLE_TYPE)]).decode(memoryview(buffer)[:read]).samples
    found = []
    for number, (before, after) in enumerate(brackets):
        ours = rows[rows["addr"] == address + number * mmap.PAGESIZE]
        found += [(after - before, (before + after) // 2 - int(row["time"])) for row in ours]
    if not found:
        raise NativeError("page faults of our own left no records; perf's clock cannot be compared")
    return min(found)[1]
