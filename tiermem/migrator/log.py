"""Move log: what was moved, why, and what became of it. Keeps the latest; never decides."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord
from tiermem.journal import Journal
from tiermem.types import PAGE_BYTES

MOVED, EVICTED, COPIED, DROPPED = "moved", "evicted", "copied", "dropped"

BUSY = "busy"
PINNED = "pinned"
NO_SPACE = "no space"
GONE = "gone"
SHARED = "mapped by others"
ELSEWHERE = "elsewhere"
LEASED = "leased"
LOADING = "loading"
PING_PONG = "ping-pong"
BACKING_OFF = "backing off"
OFFLINE = "node offline"
LATE = "no time left"
NO_DEVICE = "no device"
NOT_COPIED = "not copied"
IN_USE = "in use"
"""Causes: why a page was not moved."""

_KEPT = 20_000


@dataclass(frozen=True, slots=True)
class Entry:
    """Pages [first, first + pages) of a model. `outcome`: moved, evicted, copied, dropped, or the cause why not."""

    unix_s: float
    model: str
    first: int
    pages: int
    source: int
    target: int
    reason: str
    outcome: str


class MoveLog:
    """The last 20,000 entries, and sums of all. `moved_pages` by (source, target); `refused` pages by cause."""

    def __init__(self, journal: Journal) -> None:
        self.moved_pages: Counter[tuple[int, int]] = Counter()
        self.refused: Counter[str] = Counter()
        self._journal = journal
        self._entries: deque[Entry] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def done(
        self, record: ModelRecord, first: int, pages: int, source: int, target: int, reason: str, outcome: str
    ) -> None:
        """Pages of a model were moved, evicted, copied or dropped."""
        self.moved_pages[source, target] += pages
        self._add(record, first, pages, source, target, reason, outcome)
        self._journal.tell(
            "move", model=record.id, first=first, pages=pages, source=source, target=target,
            nbytes=pages * PAGE_BYTES, reason=reason,
        )  # fmt: skip

    def refuse(
        self, record: ModelRecord, first: int, pages: int, source: int, target: int, reason: str, cause: str
    ) -> None:
        """Pages of a model were not moved."""
        self.refused[cause] += pages
        self._add(record, first, pages, source, target, reason, cause)

    def entries(self, model: str | None = None, page: int | None = None, limit: int = 1000) -> list[Entry]:
        """The latest entries of a model, or of one page of it; newest first."""
        with self._lock:
            kept = list(self._entries)
        fitting = (
            entry
            for entry in reversed(kept)
            if model in (None, entry.model) and (page is None or entry.first <= page < entry.first + entry.pages)
        )
        return [entry for entry, _ in zip(fitting, range(limit), strict=False)]

    def _add(
        self, record: ModelRecord, first: int, pages: int, source: int, target: int, reason: str, outcome: str
    ) -> None:
        entry = Entry(time.time(), record.name, first, pages, source, target, reason[:500], outcome)
        with self._lock:
            self._entries.append(entry)


def runs(rows: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    if not len(rows):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(rows) != 1) + 1))
    lengths = np.diff(np.concatenate((starts, [len(rows)])))
    return list(zip(rows[starts].tolist(), lengths.tolist(), strict=True))
