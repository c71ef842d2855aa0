"""Page tables of this process: which pages of a range are mapped, and unmapping them to see which come back."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from tiermem._native.door import E_RANGE, PAGE_BYTES, Handle, check, ffi, lib
from tiermem._native.memory import Range, RangeReference
from tiermem.errors import NativeError

PRESENT: int = lib.TM_PAGE_PRESENT
PRIVATE: int = lib.TM_PAGE_PRIVATE
HUGE: int = lib.TM_PAGE_HUGE
"""Parts of a page's state: how many of its OS pages are mapped; one of them is memory of this process alone; it is
mapped by one 2 MiB entry."""

Pages = npt.NDArray[np.uint32]
"""Page numbers of a range, ascending and distinct."""


class Pagemap(Handle):
    """The page tables of the process that made it; a forked child needs its own. Raises NativeError (EACCES)."""

    noun = "pagemap"

    def __init__(self) -> None:
        made = ffi.new("tm_pagemap **")
        check(lib.tm_pagemap_open(made), "cannot read the page tables of this process from /proc/self/pagemap")
        super().__init__(made[0], lib.tm_pagemap_close, "of this process")
        self.scans = bool(lib.tm_pagemap_scans(made[0]))

    def look(self, range_: Range | RangeReference, pages: Pages) -> npt.NDArray[np.uint16]:
        """State of each page. Raises Closed, NativeError."""
        pages = np.ascontiguousarray(pages, np.uint32)
        owner, address = _held(range_, pages)
        state = np.empty(len(pages), np.uint16)
        status = lib.tm_pagemap_look(
            self.live(), address, ffi.from_buffer("uint32_t[]", pages), len(pages), ffi.from_buffer("uint16_t[]", state)
        )
        check(status, f"cannot look at {len(pages)} pages")
        del owner
        return state

    def zap(self, range_: Range | RangeReference, pages: Pages) -> npt.NDArray[np.bool_]:
        """Unmap pages that were looked at just now and are not PRIVATE; False where a page is locked or not mapped.

        Bytes stay, and the next touch maps them again. Raises Closed, and NativeError for a copy-on-write range.
        """
        pages = np.ascontiguousarray(pages, np.uint32)
        owner, address = _shared(range_, pages)
        done = np.empty(len(pages), np.bool_)
        status = lib.tm_pagemap_zap(
            self.live(), address, ffi.from_buffer("uint32_t[]", pages), len(pages), ffi.from_buffer("uint8_t[]", done)
        )
        check(status, f"cannot unmap {len(pages)} pages")
        del owner
        return done

    def split(self, range_: Range | RangeReference, pages: int, group: int) -> None:
        """Make every `group` of the first `pages` pages a mapping of its own; 0 undoes it. Raises Closed, NativeError
        (ENOMEM beyond vm.max_map_count)."""
        owner, address = _held(range_, np.array([pages - 1], np.uint32))
        what = f"cannot split {pages} pages into groups of {group}"
        check(lib.tm_pagemap_split(self.live(), address, pages, group), what)
        del owner


def _held(range_: Range | RangeReference, pages: Pages) -> tuple[object, int]:
    """The handle, to be kept until the call is over: memory at an address that was given back is someone else's."""
    owner = range_.live()
    if len(pages) and int(pages[-1]) >= range_.nbytes // PAGE_BYTES:
        raise NativeError(f"page {pages[-1]} is outside of a range of {range_.nbytes // PAGE_BYTES} pages", E_RANGE)
    return owner, int(ffi.cast("uintptr_t", lib.tm_range_address(owner)))


def _shared(range_: Range | RangeReference, pages: Pages) -> tuple[object, int]:
    if range_.cow:
        raise NativeError("unmapping pages of a copy-on-write range would lose its writes; map it shared", errno.EPERM)
    return _held(range_, pages)
