"""Sweeps: pages of many mappings take turns at being unmapped, and each turn tells which of the last came back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiermem._native.door import Handle, check, ffi, lib
from tiermem._native.memory import RangeReference
from tiermem._native.pages import Pagemap

PINNED: int = lib.TM_SWEEP_PINNED
FOREIGN: int = lib.TM_SWEEP_FOREIGN
HELD: int = lib.TM_SWEEP_HELD
"""Bits of a mask: a device reads the page; it holds memory of this process alone; it is locked."""


class SweptWindow(NamedTuple):
    """Pages of the mapping `key` that were looked for, and whether each was touched. Times are CLOCK_MONOTONIC."""

    key: int
    begin_s: float
    end_s: float
    pages: npt.NDArray[np.int32]
    touched: npt.NDArray[np.bool_]


class Swept(NamedTuple):
    """What a run of turns found. `due`: pages that had a turn; `turn_s`: CPU seconds of looking and unmapping;
    `fault_s`: of one fault, 0 where none was timed."""

    windows: tuple[SweptWindow, ...]
    turns: int
    due: int
    faults: int
    turn_s: float
    fault_s: float


class Sweep(Handle):
    """Of the process that made it: a forked child must not run it or add to it, and dropping and waking do nothing
    there, since a thread that is not in the child may hold the locks. One thread runs, others may add, drop, wake."""

    noun = "sweep"

    def __init__(self, pagemap: Pagemap) -> None:
        made = ffi.new("tm_sweep **")
        owner = pagemap.live()
        check(lib.tm_sweep_open(owner, made), "cannot make a sweep")
        # A garbage collection that finds this sweep and its mappings together may end them in any order.
        self._ended = ended = list[bool]()

        def close(sweep: Any, pagemap: Any = owner) -> None:
            ended.append(True)
            lib.tm_sweep_close(sweep)

        super().__init__(made[0], close, "of this process")
        self._pid = os.getpid()
        self._arrays: dict[int, tuple[Any, ...]] = {}

    def add(self, key: int, range_: RangeReference, order: npt.NDArray[np.uint32], mask: npt.NDArray[np.uint8]) -> None:
        """Give the pages of a range their turns, in this order; whoever unmaps the range drops it before. Pages with a
        bit in `mask` have none; the sweep sets FOREIGN and HELD there. Raises Closed, NativeError."""
        owner = range_.live()
        address = int(ffi.cast("uintptr_t", lib.tm_range_address(owner)))
        arrays = ffi.from_buffer("uint32_t[]", order), ffi.from_buffer("uint8_t[]", mask, require_writable=True)
        status = lib.tm_sweep_add(self.live(), key, address, len(order), *arrays)
        check(status, f"cannot sweep {len(order)} pages")
        self._arrays[key] = arrays
        del owner

    def drop(self, key: int) -> None:
        """Forget a mapping; when this returns, no turn touches its memory. An unknown key and a closed sweep are no
        error: memory may be unmapped by whoever holds its last array."""
        handle = self._reachable()
        if handle is not None:
            lib.tm_sweep_drop(handle, key)
        self._arrays.pop(key, None)

    def run(self, quota: int, turns: int = 1, epoch_s: float = 0.0, *, timed: bool = False) -> Swept:
        """Up to `turns` turns of about `quota` pages each, the first at once, the others `epoch_s` apart; ends early
        when it is woken. `timed`: also time a fault. Raises Closed, NativeError."""
        most = len(self._arrays) * turns
        windows = ffi.new("tm_sweep_window[]", most)
        room = (quota + len(self._arrays)) * turns + sum(len(order) for order, _ in self._arrays.values())
        pages, touched = np.empty(room, np.uint32), np.empty(room, np.bool_)
        results = ffi.new("tm_sweep_results *")
        results.windows, results.window_capacity = windows, most
        told = ffi.from_buffer("uint32_t[]", pages), ffi.from_buffer("uint8_t[]", touched)
        results.pages, results.touched = told
        results.page_capacity = room
        status = lib.tm_sweep_run(self.live(), quota, turns, int(epoch_s * 1e9), timed, results)
        check(status, f"cannot sweep {quota} pages")
        found = tuple(_windows(windows, results.window_count, pages, touched))
        turn_s, fault_s = results.turn_ns * 1e-9, results.fault_ns * 1e-9
        return Swept(found, results.turns, results.due, results.faults, turn_s, fault_s)

    def wake(self) -> None:
        """Have a run, now or the next one, end after its turn."""
        handle = self._reachable()
        if handle is not None:
            lib.tm_sweep_wake(handle)

    def _reachable(self) -> Any | None:
        """The handle, unless it was closed or is the parent's."""
        return self._handle if not self._ended and os.getpid() == self._pid else None


def _windows(
    windows: Any, count: int, pages: npt.NDArray[np.uint32], touched: npt.NDArray[np.bool_]
) -> Iterator[SweptWindow]:
    for window in windows[0:count]:
        part = slice(window.first, window.first + window.count)
        yield SweptWindow(
            window.key, window.begin_ns * 1e-9, window.end_ns * 1e-9, pages[part].astype(np.int32), touched[part].copy()
        )
