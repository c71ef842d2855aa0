"""Page cache: how much of some files it holds, emptying it of them, and filling it with them. Reads no tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from tiermem import _native
from tiermem.errors import Refused

COLD, WARM = 0.01, 0.99
"""Fractions of the files in the page cache below which a read is cold, and from which it is warm."""

_READ_BYTES = 8 << 20
_FILL_PASSES = 3


def cached_fraction(paths: Sequence[str]) -> float:
    """The part of the files' bytes that is in the page cache, 0 to 1. Raises NativeError before Linux 6.5."""
    sizes = [os.stat(path).st_size for path in paths]
    held = 0
    for path, size in zip(paths, sizes, strict=True):
        reader = _native.Reader(path)
        try:
            held += reader.cached(0, size) if size else 0
        finally:
            reader.close()
    return held / max(sum(sizes), 1)


def drop(paths: Sequence[str]) -> float:
    """Empty the page cache of these files alone; returns the fraction that is left, below COLD.

    Raises Refused where the system keeps more: pages that a process maps cannot be dropped.
    """
    left = 1.0
    # The kernel keeps pages that are on their way between its lists; it drops them a moment later.
    for pause_s in (0.0, 0.05, 0.5):
        time.sleep(pause_s)
        for path in paths:
            _drop(path)
        left = cached_fraction(paths)
        if left < COLD:
            break
    else:
        raise Refused(
            f"{left:.1%} of {os.path.commonpath(paths)} stays in the page cache, so that no cold read can be timed; "
            "end the process that maps it, or time warm reads"
        )
    return left


def _drop(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def fill(paths: Sequence[str]) -> float:
    """Read the files into the page cache, again if some of it went meanwhile; returns the fraction that it holds."""
    buffer = bytearray(_READ_BYTES)
    held = 0.0
    for _ in range(_FILL_PASSES):
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        held = cached_fraction(paths)
        if held >= WARM:
            break
    return held
