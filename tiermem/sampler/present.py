"""Present: pages are unmapped from this process's page tables in turn; those that are mapped again were touched.

Never unmaps a page that holds memory of the process's own, and never acts in a forked child.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.observations import Bits, Rung
from tiermem.sampler.mappings import Epoch, Mapping, Window

_FAULT_AROUND = 16
"""OS pages of 4 KiB that one fault of a file's memory maps at once, unless the host was set up otherwise."""

_RUN = 4
"""Neighbours that have their turn together: a call looks at a run of pages for little more than at one."""

_GUESSED_FAULT_S = 5e-6
_TIMINGS, _TIMED, _TIMED_EVERY = 9, range(2, 11), 16
"""Epochs in which a fault is timed: the first ones, then now and then."""


class _Turn:
    """Where the rotation over one mapping is. Each page has its turn once a round, those of a layer theirs apart."""

    def __init__(self, mapping: Mapping) -> None:
        self.pages = np.empty(0, np.uint32)
        self.begin_s = 0.0
        runs = np.argsort(_scattered(-(-mapping.pages // _RUN))).astype(np.uint32)
        order = (runs[:, None] * np.uint32(_RUN) + np.arange(_RUN, dtype=np.uint32)).ravel()
        self._order = order[order < mapping.pages]
        self._cursor = 0
        self._credit = 0.0

    def next(self, share: float) -> npt.NDArray[np.uint32]:
        """The next `share` of all pages, ascending; what is less than a page is added to the next time."""
        total = len(self._order)
        self._credit += total * share
        count = min(int(self._credit), total)
        self._credit = min(self._credit - count, 1.0)
        end = self._cursor + count
        due = self._order[self._cursor : end]
        if end > total:
            due = np.concatenate((due, self._order[: end - total]))
        self._cursor = end % total
        return np.sort(due)


class PresentSampler:
    """Rung `present`: one bit a page and window. Raises NativeError where /proc does not let this process see its own
    page tables.

    Touches by the kernel for this process count (write(2), O_DIRECT), and so do those of a debugger; reading the file
    by pread(2) and what a device reads from pinned pages do not.
    """

    note: ClassVar[str] = "pages are locked in memory (mlock), and cannot be unmapped to see whether they are touched"

    def __init__(self, pagemap: _native.Pagemap | None = None) -> None:
        self._pid = os.getpid()
        self._pagemap = pagemap or _native.Pagemap()
        self._turns: dict[int, _Turn] = {}
        self._timings: deque[float] = deque(maxlen=_TIMINGS)
        self._epochs = 0
        self._page_s = self._clock_s = 0.0

    @property
    def fault_s(self) -> float:
        """Seconds that one fault costs the client: the median of the last that were timed."""
        return sorted(self._timings)[len(self._timings) // 2] if self._timings else _GUESSED_FAULT_S

    def epoch(self, mappings: Sequence[Mapping], now_s: float, quota: int) -> Epoch:
        """Tell of the pages that had their turn at the last epoch, and begin the turn of `quota` others."""
        if os.getpid() != self._pid:
            return Epoch((), 0)
        total = sum(mapping.pages for mapping in mappings)
        share = min(quota / total, 1.0) if total else 0.0
        turns, windows, faults, pages = {}, list[Window](), 0, 0
        self._page_s = 0.0
        self._epochs += 1
        self._clock_s = now_s - time.monotonic()
        for mapping in mappings:
            handle = mapping.live()  # unmapping waits until it is dropped
            if handle is None:
                continue
            turn = turns[mapping.generation] = self._turns.get(mapping.generation) or _Turn(mapping)
            bits, seen = self._turn(mapping, turn, share)
            faults += seen
            pages += len(turn.pages)
            if bits is not None:
                windows.append(Window(mapping.key, bits))
            del handle
        self._turns = turns
        return Epoch(tuple(windows), faults, pages, self._page_s)

    def close(self) -> None:
        self._pagemap.close()

    def _turn(self, mapping: Mapping, turn: _Turn, share: float) -> tuple[Bits | None, int]:
        was, due = turn.pages, turn.next(share)
        if mapping.blemished:
            mapping.held[due] = False
            due = due[mapping.sampled(due)]
        end_s, begin_cpu = self._clock_s + time.monotonic(), time.thread_time()
        found = self._pagemap.turn(
            mapping.range, was, due, timed=self._epochs in _TIMED or not self._epochs % _TIMED_EVERY
        )
        self._page_s += time.thread_time() - begin_cpu
        # From here on a touch shows: one between the look and the unmapping is in no window.
        begin_s = self._clock_s + time.monotonic()
        if found.fault_s:
            self._timings.append(found.fault_s)
        self._note(mapping, was, found.was_state)
        self._note(mapping, due, found.due_state)
        present = found.was_state & _native.PRESENT
        # None was mapped when the window began, so each that is now cost a fault.
        faults = np.where(
            found.was_state & _native.HUGE, present > 0, -(-present.astype(np.int32) // _FAULT_AROUND)
        ).sum()
        bits = _bits(mapping, was, turn.begin_s, end_s, present > 0)
        held = (found.due_state & _native.PRESENT > 0) & ~found.done
        if held.any():
            mapping.held[due[held]] = True
        turn.pages, turn.begin_s = due[~held], begin_s
        return bits, int(faults)

    @staticmethod
    def _note(mapping: Mapping, pages: npt.NDArray[np.uint32], state: npt.NDArray[np.uint16]) -> None:
        private = state & _native.PRIVATE != 0
        if private.any():
            mapping.foreign[pages[private]] = True


def _scattered(count: int) -> npt.NDArray[np.uint64]:
    """Pseudo-random numbers: splitmix64 (Steele, Lea, Flood 2014). To import numpy.random would take longer."""
    number = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def _bits(
    mapping: Mapping, pages: npt.NDArray[np.uint32], begin_s: float, end_s: float, touched: npt.NDArray[np.bool_]
) -> Bits | None:
    if mapping.blemished:
        told = mapping.sampled(pages)
        pages, touched = pages[told], touched[told]
    if end_s <= begin_s or not len(pages):
        return None
    return Bits(Rung.PRESENT, begin_s, end_s, pages.astype(np.int32), touched)
