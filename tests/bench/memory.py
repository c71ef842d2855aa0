"""Memory of a process, as the kernel tells it, in bytes. Reads only, but for the peak that it can reset."""

from __future__ import annotations

import mmap
from pathlib import Path

_KIB = 1024
_MADV_POPULATE_WRITE = 23  # madvise(2), since Linux 5.14; the mmap module has no name for it


def rollup(pid: int | str = "self") -> dict[str, int]:
    """Sums over all mappings: `Private_Clean`, `Private_Dirty`, `Pss_Shmem` and the others of proc(5)."""
    return _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())


def private_bytes(pid: int | str = "self") -> int:
    """Bytes that this process alone holds."""
    sums = rollup(pid)
    return sums["Private_Clean"] + sums["Private_Dirty"]


def status(pid: int | str = "self") -> dict[str, int]:
    """`VmRSS`, `VmHWM`, `RssAnon`, `RssShmem` and the others."""
    return _fields(Path(f"/proc/{pid}/status").read_text())


def reset_peak(pid: int | str = "self") -> None:
    """`VmHWM` counts from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def recycle(nbytes: int) -> None:
    """Touch so much memory and give it back: whoever allocates next gets memory that the host has backed already."""
    if nbytes:
        with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(_MADV_POPULATE_WRITE)


def _fields(text: str) -> dict[str, int]:
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * _KIB for words in lines if len(words) == 3 and words[2] == "kB"}
