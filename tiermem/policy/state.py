"""Page state: numbers that a policy keeps about pages from one view to the next. Never looks at what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.policy.view import Pages


class PageState:
    """One number a page: `fill` for pages that are new, and forgotten with the pages that are gone."""

    def __init__(self, dtype: npt.DTypeLike, fill: float = 0) -> None:
        self._fill = fill
        self._ids = np.empty(0, np.int64)
        self._values: npt.NDArray[Any] = np.empty(0, dtype)

    def of(self, pages: Pages) -> npt.NDArray[Any]:
        """The numbers of these rows, for the policy to change in place."""
        if not np.array_equal(self._ids, pages.id):
            values = np.full(len(pages), self._fill, self._values.dtype)
            if len(self._ids):
                at = np.minimum(np.searchsorted(self._ids, pages.id), len(self._ids) - 1)
                found = self._ids[at] == pages.id
                values[found] = self._values[at[found]]
            self._ids, self._values = pages.id, values
        return self._values
