"""Memory of an engine's processes, as the kernel tells it, in bytes. Reads only, and never the engine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_KIB = 1024


def memory_of(pid: int, tree: bool = False) -> dict[str, int]:
    """Bytes of a process, or with `tree` the sums over it and all that descend from it.

    `rss` is resident; `anon` and `shmem` are parts of it: anonymous memory, and shared memory (tmpfs, memfd). `private`
    is what no other process maps, and `pss` shares the rest out among those who map it: the sum of `pss` over processes
    counts a shared page once; `shmem_pss` is its part for shared memory. Raises ProcessLookupError where the process
    ended.
    """
    sums = dict.fromkeys(("rss", "anon", "shmem", "pss", "shmem_pss", "private"), 0)
    for number in (pid, *(descendants(pid) if tree else ())):
        try:
            rollup, status = (
                _fields(Path(f"/proc/{number}/{name}").read_text()) for name in ("smaps_rollup", "status")
            )
        except (FileNotFoundError, ProcessLookupError):
            if number == pid:
                raise ProcessLookupError(f"process {pid} ended before its memory was read") from None
            continue
        sums["rss"] += rollup["Rss"]
        sums["anon"] += rollup["Anonymous"]
        sums["shmem"] += status["RssShmem"]
        sums["pss"] += rollup["Pss"]
        sums["shmem_pss"] += rollup["Pss_Shmem"]
        sums["private"] += rollup["Private_Clean"] + rollup["Private_Dirty"]
    return sums


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                # proc(5): the command's name, in brackets, may hold any character.
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _fields(text: str) -> dict[str, int]:
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * _KIB for words in lines if len(words) == 3 and words[2] == "kB"}
