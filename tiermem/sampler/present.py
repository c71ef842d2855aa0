"""Present: pages are unmapped from this process's page tables in turn; those that are mapped again were touched.

Owns the order of turns; the native sweep takes them. Never acts in a forked child.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.errors import Closed
from tiermem.observations import Bits, Rung
from tiermem.sampler.mappings import Found, Mapping, Window

_RUN = 32
"""Neighbours that have their turn together: a run of pages costs a call little more than one page does."""

_GUESSED_FAULT_S = 5e-6
_TIMINGS = 9


class PresentSampler:
    """Rung `present`: one bit a page and window. Raises NativeError where /proc does not let this process see its own
    page tables.

    Touches by the kernel for this process count (write(2), O_DIRECT), and so do those of a debugger; reading the file
    by pread(2) and what a device reads from pinned pages do not.
    """

    note: ClassVar[str] = "pages are locked in memory (mlock), and cannot be unmapped to see whether they are touched"

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._sweep = _native.Sweep(_native.Pagemap())
        self._joined: dict[int, Mapping] = {}
        self._timings: deque[float] = deque(maxlen=_TIMINGS)

    def sample(self, mappings: Sequence[Mapping], now_s: float, quota: int, turns: int, epoch_s: float) -> Found:
        """Take up to `turns` turns of about `quota` pages each, `epoch_s` apart; until then, or until it is woken, this
        does not return. Tells of the pages that had their turn at the one before."""
        if os.getpid() != self._pid:
            return Found(())
        self._join(mappings)
        swept = self._sweep.run(quota, turns, epoch_s, timed=True)
        if swept.fault_s:
            self._timings.append(swept.fault_s)
        windows = tuple(
            Window(mapping.key, Bits(Rung.PRESENT, w.begin_s, w.end_s, w.pages, w.touched))
            for w in swept.windows
            if (mapping := self._joined.get(w.key)) is not None
        )
        return Found(windows, swept.turns, swept.due, swept.turn_s, swept.faults * self._fault_s())

    def wake(self) -> None:
        """Have `sample` return soon; from any thread."""
        self._sweep.wake()

    def close(self) -> None:
        for mapping in self._joined.values():
            mapping.leave()
        self._joined = {}
        self._sweep.close()

    def _join(self, mappings: Sequence[Mapping]) -> None:
        joined = {mapping.generation: mapping for mapping in mappings}
        for generation in self._joined.keys() - joined.keys():
            self._joined[generation].leave()
        for generation in joined.keys() - self._joined.keys():
            try:
                joined[generation].join(self._sweep, turn_order(joined[generation].pages))
            except Closed:  # unmapped just now
                del joined[generation]
        self._joined = joined

    def _fault_s(self) -> float:
        """Seconds that one fault costs the client: the median of the last that were timed."""
        return sorted(self._timings)[len(self._timings) // 2] if self._timings else _GUESSED_FAULT_S


def turn_order(pages: int) -> npt.NDArray[np.uint32]:
    """Page numbers in the order of their turns: runs of neighbours, the runs of a layer far apart."""
    runs = np.argsort(_scattered(-(-pages // _RUN))).astype(np.uint32)
    order = (runs[:, None] * np.uint32(_RUN) + np.arange(_RUN, dtype=np.uint32)).ravel()
    return order[order < pages].astype(np.uint32)


def _scattered(count: int) -> npt.NDArray[np.uint64]:
    """Pseudo-random numbers: splitmix64 (Steele, Lea, Flood 2014). To import numpy.random would take longer."""
    number = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))
