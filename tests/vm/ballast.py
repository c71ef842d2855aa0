"""Ballast: a process that fills a NUMA node with memory of its own until its standard input ends.

`python -m tests.vm.ballast NODE KEEP_BYTES` leaves at most KEEP_BYTES free, says so by a line, and waits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

_SYS_SET_MEMPOLICY = 238
_MPOL_PREFERRED = 1
"""Not MPOL_BIND, whose exhaustion calls the OOM killer: what does not fit goes to another node."""

_STEP_BYTES = 16 << 20


def free_bytes(node: int) -> int:
    for line in Path(f"/sys/devices/system/node/node{node}/meminfo").read_text().splitlines():
        if "MemFree:" in line:
            return int(line.split()[3]) << 10
    raise LookupError(f"node {node} has no MemFree")


def fill(node: int, keep_bytes: int) -> list[mmap.mmap]:
    """Memory on the node; ends early where the kernel gives no more of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    mask = ctypes.c_ulong(1 << node)
    if libc.syscall(_SYS_SET_MEMPOLICY, _MPOL_PREFERRED, ctypes.byref(mask), ctypes.c_ulong(64)):
        raise OSError(ctypes.get_errno(), "set_mempolicy")
    held, before = list[mmap.mmap](), 0
    while keep_bytes < (free := free_bytes(node)) != before:
        before = free
        held.append(mmap.mmap(-1, _STEP_BYTES))
        held[-1].madvise(mmap.MADV_NOHUGEPAGE)  # into the smallest gaps
        for offset in range(0, _STEP_BYTES, mmap.PAGESIZE):
            held[-1][offset] = 1
    return held


if __name__ == "__main__":
    os.nice(5)
    memory = fill(int(sys.argv[1]), int(sys.argv[2]))
    print("full", flush=True)
    sys.stdin.read()
