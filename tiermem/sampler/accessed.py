"""Accessed: the processor's own accessed bits, cleared by clear_refs and read from smaps, where each page is a mapping.

Takes no fault and unmaps nothing, but clears the bits of the whole process; never acts in a forked child.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.errors import Refused
from tiermem.observations import Bits, Rung
from tiermem.sampler.mappings import Found, Mapping, Window
from tiermem.types import PAGE_BYTES

_PROC = Path("/proc/self")
_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_ENTRY = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ...s [^\n]*\n"
    rb"(?:[A-Z][^\n]*\n)*?Referenced: +(\d+) kB\n(?:[A-Z][^\n]*\n)*?VmFlags:([^\n]*)",
    re.MULTILINE,
)


class AccessedSampler:
    """Rung `accessed`: one bit a page and window, all pages in every window. Raises Refused where the process may not
    clear its bits, or samples by them already.

    Not on hugetlb, whose mappings show no bit. Beyond half of vm.max_map_count pages are seen in groups: a group
    without a bit tells that none of its pages was touched, one with some bits tells nothing. Another client's unmapping
    of a page that both share may show here as a touch.
    """

    note: ClassVar[str] = "reserved 2 MiB pages show no accessed bit; sample by rung present"
    _readers: ClassVar[weakref.WeakValueDictionary[int, AccessedSampler]] = weakref.WeakValueDictionary()

    def __init__(self, pagemap: _native.Pagemap | None = None) -> None:
        if os.getpid() in self._readers:  # bits belong to the process, and so to one reader
            raise Refused("another client in this process reads its accessed bits; sample the other by rung present")
        self._pid = os.getpid()
        self._pagemap = pagemap or _native.Pagemap()
        self._groups: dict[int, int] = {}
        self._split = dict[int, Mapping]()
        self._begin_s = 0.0
        self._clear()
        self._readers[self._pid] = self

    def sample(self, mappings: Sequence[Mapping], now_s: float, quota: int, turns: int, epoch_s: float) -> Found:
        """Tell of all pages of mappings that were there at the last turn. Always one turn, of all pages."""
        if os.getpid() != self._pid:
            return Found(())
        windows = list[Window]()
        begin = time.monotonic()
        old = [(mapping, mapping.live()) for mapping in mappings if mapping.generation in self._groups]
        entries = self._entries() if old else np.empty((0, 4), np.uint64)
        old = [(mapping, handle) for mapping, handle in old if handle is not None]  # who was there all the time
        for mapping, _ in old:
            bits = self._bits(mapping, entries, now_s)
            if bits is not None:
                windows.append(Window(mapping.key, bits))
        self._make_apart(mappings)
        self._clear()
        self._begin_s = now_s + time.monotonic() - begin
        return Found(tuple(windows))

    def wake(self) -> None:
        """It never sleeps."""

    def close(self) -> None:
        """Let the kernel join the mappings again."""
        if os.getpid() == self._pid:
            for mapping in self._split.values():
                handle = mapping.live()
                if handle is not None:
                    self._pagemap.split(mapping.range, mapping.pages, 0)
                del handle
        self._groups, self._split = {}, {}
        self._pagemap.close()
        self._readers.pop(self._pid, None)

    def _make_apart(self, mappings: Sequence[Mapping]) -> None:
        new = [mapping for mapping in mappings if mapping.generation not in self._groups]
        self._groups = {m.generation: self._groups[m.generation] for m in mappings if m.generation in self._groups}
        self._split = {m.generation: m for m in mappings}
        if not new:
            return
        room = int(_MAP_COUNT.read_text()) // 2 - (_PROC / "maps").read_bytes().count(b"\n")
        wanted = sum(mapping.pages for mapping in new)
        group = max(1, -(-wanted // max(room, 1)))
        for mapping in new:
            handle = mapping.live()
            if handle is not None:
                self._pagemap.split(mapping.range, mapping.pages, group)
                self._groups[mapping.generation] = group
            del handle

    def _bits(self, mapping: Mapping, entries: npt.NDArray[np.uint64], now_s: float) -> Bits | None:
        base, group = mapping.range.address, self._groups[mapping.generation]
        end = base + mapping.pages * PAGE_BYTES
        inside = entries[(entries[:, 0] >= base) & (entries[:, 1] <= end)] - np.array([base, base, 0, 0], np.uint64)
        # Parts of pages are left out: something was mapped over the rest.
        inside = inside[(inside[:, 0] % PAGE_BYTES == 0) & (inside[:, 1] % PAGE_BYTES == 0)]
        seen, touched = (np.zeros(mapping.pages, np.bool_) for _ in range(2))
        for start, stop, referenced, hugetlb in inside.tolist():
            pages = slice(start // PAGE_BYTES, stop // PAGE_BYTES)
            count = (stop - start) // PAGE_BYTES
            mapping.mark(pages, _native.HELD, on=bool(hugetlb))
            seen[pages] = count <= group and (count == 1 or referenced in (0, stop - start))
            touched[pages] = referenced > 0
        told = np.flatnonzero(seen & (mapping.mask == 0))
        if now_s <= self._begin_s or not len(told):
            return None
        return Bits(Rung.ACCESSED, self._begin_s, now_s, told.astype(np.int32), touched[told])

    def _entries(self) -> npt.NDArray[np.uint64]:
        """A row a shared mapping of the process: start, end, referenced bytes, whether it is hugetlb."""
        text = (_PROC / "smaps").read_bytes()
        rows = [
            (int(start, 16), int(end, 16), int(kib) << 10, b" ht" in flags)
            for start, end, kib, flags in _ENTRY.findall(text)
        ]
        return np.array(rows, np.uint64).reshape(-1, 4)

    def _clear(self) -> None:
        try:
            with open(_PROC / "clear_refs", "wb", buffering=0) as file:
                file.write(b"1")
        except OSError as error:
            raise Refused(f"/proc/self/clear_refs: {error.strerror}; sample by rung present") from error
