"""OS pages: what the kernel says of memory of this process: on which nodes it lies, and how it is mapped.

Asks the kernel alone (move_pages(2), /proc), so that a test can judge what a pool says.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np

PAGE_BYTES = 2 << 20
OS_PAGE_BYTES = mmap.PAGESIZE

_SYS_MOVE_PAGES = 279
_MPOL_MF_MOVE = 2
_libc = ctypes.CDLL(None, use_errno=True)


def nodes_of(address: int, length: int) -> list[int]:
    """The node of each OS page of [address, address + length), or -ENOENT where none is mapped in this process."""
    return _move_pages(address, length, None)


def move(address: int, length: int, node: int) -> list[int]:
    """Move memory that this process alone has mapped; the node of each of its OS pages afterwards, or -errno."""
    _move_pages(address, length, node)
    return nodes_of(address, length)


def _move_pages(address: int, length: int, node: int | None) -> list[int]:
    pages = address + np.arange(0, length, OS_PAGE_BYTES)
    status = np.empty(len(pages), np.int32)
    nodes = None if node is None else np.full(len(pages), node, np.int32)
    flags = 0 if nodes is None else _MPOL_MF_MOVE
    addresses = [ctypes.c_void_p(None if each is None else each.ctypes.data) for each in (pages, nodes, status)]
    if _libc.syscall(_SYS_MOVE_PAGES, 0, ctypes.c_ulong(len(pages)), *addresses, flags) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"move_pages: {os.strerror(number)}")
    found: list[int] = status.tolist()
    return found


def nodes_of_pages(address: int, pages: int) -> list[list[int]]:
    """On which nodes each page of 2 MiB lies; read for that, and again where a sampler unmaps it meanwhile."""
    found: dict[int, list[int]] = {}
    while len(found) < pages:
        for page in set(range(pages)) - set(found):
            start = address + page * PAGE_BYTES
            read(start, PAGE_BYTES)
            nodes = set(nodes_of(start, PAGE_BYTES))
            if -errno.ENOENT not in nodes:
                found[page] = sorted(nodes)
    return [found[page] for page in range(pages)]


def read(address: int, length: int) -> None:
    """Read a byte of each OS page."""
    np.frombuffer(memoryview((ctypes.c_uint8 * length).from_address(address)), np.uint8)[::OS_PAGE_BYTES].sum()


def mappings(address: int, length: int) -> list[str]:
    """The lines of /proc/self/maps for a range of addresses."""
    with open("/proc/self/maps") as file:
        return [line.rstrip() for line in file if address <= int(line.partition("-")[0], 16) < address + length]


def most_huge_bytes(address: int, length: int) -> int:
    """`huge_bytes` while all of it is mapped: it is read for that, and again where a sampler unmaps some meanwhile."""
    most = 0
    for _ in range(50):
        read(address, length)
        most = max(most, huge_bytes(address, length))
        if most == length:
            break
    return most


def huge_bytes(address: int, length: int) -> int:
    """How much of it the page tables map by entries of 2 MiB."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first and not first.endswith(":"):
                inside = address <= int(first.partition("-")[0], 16) < address + length
            elif inside and first in ("ShmemPmdMapped:", "FilePmdMapped:"):
                total += int(rest.split()[0]) << 10
    return total
