"""What the machine itself can do, as the yardstick: reading files past the page cache, and first use of memory.

Uses system calls and not the code that is measured by it (but for the pool's kind of memory, which only it can make).
Each function prepares a measurement and returns it, to be called once.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

THREADS, BLOCK_BYTES = 4, 1 << 20
"""What came closest to the disk's limit of 1 to 16 threads and 1 to 16 MiB."""

_WINDOW_S = 0.3

Measurement = Callable[[], dict[str, Any]]


def direct(files: list[str]) -> Measurement:
    """O_DIRECT reads of all files by four threads in blocks of 1 MiB, into prefaulted memory that is used again."""
    descriptors = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    blocks = [(fd, at) for fd in descriptors for at in range(0, os.fstat(fd).st_size, BLOCK_BYTES)]
    memory = mmap.mmap(-1, THREADS * BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = bytes(len(memory))
    free: SimpleQueue[memoryview] = SimpleQueue()
    for i in range(THREADS):
        free.put(memoryview(memory)[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES])

    def read(block: tuple[int, int]) -> int:
        buffer = free.get()
        try:
            return os.preadv(block[0], [buffer], block[1])
        finally:
            free.put(buffer)

    def run() -> dict[str, Any]:
        with ThreadPoolExecutor(THREADS) as threads:
            begin = time.perf_counter()
            nbytes = sum(threads.map(read, blocks))
            elapsed = time.perf_counter() - begin
        if nbytes != sum(os.fstat(fd).st_size for fd in descriptors):
            raise RuntimeError(f"{nbytes} bytes were read, the files are of another size: the limit is void")
        return {"read_s": elapsed, "bytes": nbytes}

    return run


def prefault(nbytes: int, idle_s: float) -> Measurement:
    """Prefault so much memory of the pool's kind that nobody used for a while, and again once it was given back.

    A guest may give idle memory back to its host within seconds (free page reporting); then it is slow to get again.
    """
    from tiermem import _native
    from tiermem.errors import NativeError

    try:
        directory = _native.tmpfs_detached(nbytes)
    except NativeError:
        directory = -1

    def run() -> dict[str, Any]:
        time.sleep(idle_s)
        taken = []
        for number in range(2):
            name = f"prefault-{number}"
            segment = _native.Segment.create(directory, name, nbytes)
            begin = time.perf_counter()
            segment.prefault(threads=2)
            taken.append(time.perf_counter() - begin)
            segment.close()
            if directory >= 0:
                os.unlink(name, dir_fd=directory)
        return {"found_s": taken[0], "again_s": taken[1], "bytes": nbytes}

    return run


def wait_for_quiet(limit_s: float) -> float:
    """Return when half of the processors are idle, or after `limit_s`; the part of their time that was busy last."""
    deadline = time.monotonic() + limit_s
    while True:
        before = _processor_ticks()
        time.sleep(_WINDOW_S)
        total, idle = (after - start for after, start in zip(_processor_ticks(), before, strict=True))
        busy = 1 - idle / max(total, 1)
        if busy <= 0.5 or time.monotonic() > deadline:
            return busy


def _processor_ticks() -> tuple[int, int]:
    """All, and idle ones, since boot; proc(5)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    ticks = [int(field) for field in fields]
    return sum(ticks), ticks[3] + ticks[4]
