"""Migration timed: pages of a segment of our own go to another NUMA node and back, while others have them mapped.

Owns the segment and the readers, which are processes; the bytes are digested before and after.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from tiermem import _native, host
from tiermem.errors import DigestMismatch, Refused
from tiermem.segment import open_backing
from tiermem.types import PAGE_BYTES

_BATCH_PAGES = 32
"""As the migrator has it."""


@dataclass(frozen=True, slots=True)
class MoveTiming:
    """`pages` went from one node to another in `seconds`; the others were refused."""

    source: int
    target: int
    pages: int
    refused: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.pages * PAGE_BYTES / self.seconds


def time_moves(kind: str, nbytes: int, nodes: tuple[int, int], runs: int, readers: int) -> Iterator[MoveTiming]:
    """There and back, `runs` times, on a backing of this kind, with so many processes that have it all mapped.

    Raises Refused where the nodes are not two of this host, DigestMismatch where a byte changed.
    """
    known = [node.number for node in host.numa_nodes() if node.total_bytes]
    if nodes[0] == nodes[1] or not set(nodes) <= set(known):
        names = ", ".join(f"node{number}" for number in known)
        raise Refused(
            f"node{nodes[0]} and node{nodes[1]} are not two NUMA nodes with memory; this host has {names}. CXL memory "
            "comes up as one with daxctl reconfigure-device --mode=system-ram"
        )
    backing = open_backing(kind, None, nbytes)
    try:
        segment = backing.create("bench-migrate", nbytes)
        segment.prefault(nodes=1 << nodes[0], threads=4)
        with segment.buffer() as memory:
            np.frombuffer(memory, np.uint64)[:] = np.arange(nbytes // 8, dtype=np.uint64)
            before = blake3(memory).digest()
        segment.seal()
        with _mapped_by(segment, readers):
            for _ in range(runs):
                yield _move(segment, nodes[0], nodes[1], readers > 0)
                yield _move(segment, nodes[1], nodes[0], readers > 0)
        with segment.buffer() as memory:
            if blake3(memory).digest() != before:
                raise DigestMismatch("the bytes changed while their pages moved; do not use this kernel for migration")
        segment.close()
    finally:
        backing.close(keep=False)


def _move(segment: _native.Segment, source: int, target: int, shared: bool) -> MoveTiming:
    numa = _native.Numa()
    pages = np.arange(segment.nbytes // PAGE_BYTES, dtype=np.uint32)
    moved = refused = 0
    begin = time.monotonic()
    for first in range(0, len(pages), _BATCH_PAGES):
        results = numa.move(segment, pages[first : first + _BATCH_PAGES], target, shared=shared)
        moved += int((results == _native.MOVED).sum())
        refused += int((results < 0).sum())
    return MoveTiming(source, target, moved, refused, time.monotonic() - begin)


@contextmanager
def _mapped_by(segment: _native.Segment, readers: int) -> Iterator[None]:
    """Processes that have every page mapped, until the end."""
    children, ends = [], []
    for _ in range(readers):
        ready, hold = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(hold[1])
            fd = segment.share()
            mapping = _native.Range.reserve(segment.nbytes)
            mapping.map(0, fd, segment.nbytes)
            np.frombuffer(mapping.buffer(), np.uint8)[::4096].sum()
            os.write(ready[1], b"r")
            os.read(hold[0], 1)
            os._exit(0)
        os.close(hold[0])
        os.close(ready[1])
        os.read(ready[0], 1)
        os.close(ready[0])
        children.append(pid)
        ends.append(hold[1])
    try:
        yield
    finally:
        for end in ends:
            os.close(end)
        for pid in children:
            os.waitpid(pid, 0)
