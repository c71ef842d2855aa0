"""Nodes of memory: where the pages of a segment lie, moving them, and how fast a node is. Decides nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem._native.door import Handle, check, ffi, lib
from tiermem._native.memory import Segment

NODE_ABSENT: int = lib.TM_NODE_ABSENT
NODE_MIXED: int = lib.TM_NODE_MIXED
"""Instead of a node: no part of the page is in memory; parts of it lie on several nodes."""

MOVED: int = lib.TM_MOVED
WAS_THERE: int = lib.TM_WAS_THERE
"""What became of a page that was to move; a negative number is an errno, and says why it could not."""


class Numa(Handle):
    """Asks the kernel, which alone knows; of the process that made it, a forked child needs its own.

    Raises NativeError (EACCES, where this process's page tables cannot be read).
    """

    noun = "numa"

    def __init__(self) -> None:
        made = ffi.new("tm_numa **")
        check(lib.tm_numa_open(made), "cannot read the page tables of this process from /proc/self/pagemap")
        super().__init__(made[0], lib.tm_numa_close, "of this process")

    def where(self, segment: Segment, first: int, count: int) -> npt.NDArray[np.int16]:
        """Node of each of `count` pages from `first` on, NODE_ABSENT or NODE_MIXED; allocates no memory.

        Raises Closed, NativeError (E_RANGE; ENOSYS: a kernel without NUMA).
        """
        nodes = np.empty(count, np.int16)
        owner = segment.live()
        status = lib.tm_numa_where(self.live(), owner, first, count, ffi.from_buffer("int16_t[]", nodes))
        check(status, f"cannot locate {count} pages from {first} on of segment {segment.name}")
        return nodes

    def move(
        self, segment: Segment, pages: npt.NDArray[np.uint32], node: int, *, shared: bool
    ) -> npt.NDArray[np.int32]:
        """Move pages (ascending, distinct) to `node`; `shared`: those too that other processes map.

        Per page: MOVED, WAS_THERE, or -errno: EBUSY (in use, or pinned by a device), EACCES (others map it), ENOMEM
        (the node is full), ENOENT (not in memory). Raises Closed, and NativeError where the call itself fails; some
        pages may have moved then: EPERM (`shared` needs CAP_SYS_NICE), ENODEV, EACCES (cpuset), E_RANGE, ENOSYS.
        """
        pages = np.ascontiguousarray(pages, np.uint32)
        results = np.empty(len(pages), np.int32)
        owner = segment.live()
        status = lib.tm_numa_move(
            self.live(), owner, ffi.from_buffer("uint32_t[]", pages), len(pages), node,
            lib.TM_MOVE_ALL if shared else 0, ffi.from_buffer("int32_t[]", results),
        )  # fmt: skip
        check(status, f"cannot move {len(pages)} pages of segment {segment.name} to node {node}")
        return results


class Probe(Handle):
    """`nbytes` of memory wanted on the nodes whose bits are in `nodes`; one thread uses it at a time.

    Raises NativeError (ENOMEM; ENODEV: none of these nodes has memory).
    """

    noun = "probe"

    def __init__(self, nbytes: int, nodes: int) -> None:
        made = ffi.new("tm_probe **")
        check(lib.tm_probe_open(nbytes, nodes, made), f"cannot allocate {nbytes} bytes on nodes {nodes:#b}")
        super().__init__(made[0], lib.tm_probe_close, f"of {nbytes} bytes")
        self.nbytes = -(-nbytes // lib.TM_PAGE_BYTES) * lib.TM_PAGE_BYTES

    @property
    def nodes(self) -> int:
        """The nodes that it lies on, a bit each. Raises Closed, NativeError (ENOSYS: a kernel without NUMA)."""
        mask = ffi.new("uint64_t *")
        check(lib.tm_probe_where(self.live(), mask), f"cannot locate a probe {self._name}")
        return int(mask[0])

    def latency(self, loads: int) -> float:
        """Seconds per load, of loads that each need the one before, in random order. Raises Closed, NativeError."""
        ns = ffi.new("uint64_t *")
        check(lib.tm_probe_latency(self.live(), loads, ns), f"cannot read a probe {self._name}")
        return float(ns[0] * 1e-9 / loads)

    def bandwidth(self, threads: int) -> float:
        """Bytes per second that `threads` threads read. Raises Closed, NativeError."""
        ns = ffi.new("uint64_t *")
        check(lib.tm_probe_bandwidth(self.live(), threads, ns), f"cannot read a probe {self._name}")
        return float(self.nbytes / (ns[0] * 1e-9))
