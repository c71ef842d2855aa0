"""History: when each page moved last, from where, and how often that failed; so what is better not tried now.

Guarded by the pool's lock. Never asks for the time.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord

_BACK_OFF_S = 1.0
_BACK_OFF_DOUBLINGS = 6

Rows = slice | npt.NDArray[np.integer]


class _Pages:
    """One model's, made when its first page is moved: 18 bytes a page."""

    __slots__ = ("came_from", "failures", "moved_s", "try_again_s")

    def __init__(self, pages: int) -> None:
        self.moved_s = np.full(pages, -np.inf)
        self.came_from = np.full(pages, -1, np.int8)
        self.failures = np.zeros(pages, np.uint8)
        self.try_again_s = np.full(pages, -np.inf)


class History:
    """Of all models of a pool; a model's is forgotten with it."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[ModelRecord, _Pages] = WeakKeyDictionary()
        self._full: dict[int, tuple[float, int]] = {}  # tier -> not to be tried until, how often it was full

    def bounces(
        self, record: ModelRecord, rows: Rows, target: int, now_s: float, guard_s: float
    ) -> npt.NDArray[np.bool_]:
        """Pages that would go back to where they came from less than `guard_s` ago."""
        pages = self._pages(record)
        back = (pages.came_from[rows] == target) & (np.abs(now_s - pages.moved_s[rows]) < guard_s)
        return np.asarray(back, np.bool_)

    def backs_off(self, record: ModelRecord, rows: Rows, now_s: float) -> npt.NDArray[np.bool_]:
        """Pages that were busy so lately that it is no use to try again."""
        return np.asarray(now_s < self._pages(record).try_again_s[rows], np.bool_)

    def moved(self, record: ModelRecord, rows: Rows, source: int, now_s: float) -> None:
        pages = self._pages(record)
        pages.moved_s[rows] = now_s
        pages.came_from[rows] = source
        pages.failures[rows] = 0

    def failed(self, record: ModelRecord, rows: Rows, now_s: float) -> None:
        """They are left alone for 1 s, then 2, 4, up to 64."""
        pages = self._pages(record)
        pages.try_again_s[rows] = now_s + _BACK_OFF_S * np.exp2(pages.failures[rows], dtype=np.float64)
        pages.failures[rows] = np.minimum(pages.failures[rows] + 1, _BACK_OFF_DOUBLINGS)

    def filled(self, tier: int, now_s: float) -> None:
        """The kernel found no memory for a page there. Each further try would split pages for nothing: the tier is left
        alone for 1 s, then 2, 4, up to 64."""
        _, times = self._full.get(tier, (0.0, 0))
        self._full[tier] = (now_s + _BACK_OFF_S * 2.0**times, min(times + 1, _BACK_OFF_DOUBLINGS))

    def is_full(self, tier: int, now_s: float) -> bool:
        return now_s < self._full.get(tier, (now_s, 0))[0]

    def took(self, tier: int) -> None:
        """The kernel moved a page there."""
        self._full.pop(tier, None)

    def _pages(self, record: ModelRecord) -> _Pages:
        found = self._of.get(record)
        if found is None:
            found = self._of[record] = _Pages(record.first_page[-1])
        return found
