"""Overlap: which tensors of a model and which of its pages overlap. Computed once a model; never changes.

A residency knows tensors, a pool knows pages. Pages are numbered within the model, segment after segment.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tiermem.types import PAGE_BYTES, Manifest


class Overlap:
    """Of a manifest; tensors by their numbers there. A tensor without bytes is on no page."""

    def __init__(self, manifest: Manifest) -> None:
        counts = [segment.pages for segment in manifest.segments]
        self._first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        extents = [tensor.extent for tensor in manifest.tensors]
        start = np.array([extent.offset for extent in extents], np.int64)
        end = start + np.array([extent.length for extent in extents], np.int64)
        base = self._first[np.array([extent.segment for extent in extents], np.int64)]
        self._low = base + start // PAGE_BYTES
        self._high = np.where(end > start, base - (-end // PAGE_BYTES), self._low)

    @property
    def pages(self) -> int:
        """Of the model."""
        return int(self._first[-1])

    def tensors_on(self, segment: int, pages: range) -> list[int]:
        """The tensors that overlap any of these pages of a segment."""
        first, last = self._first[segment] + pages.start, self._first[segment] + pages.stop
        found = np.flatnonzero((self._low < last) & (self._high > first) & (self._high > self._low))
        return [int(number) for number in found]

    def pages_of(self, tensors: Iterable[int]) -> npt.NDArray[np.int32]:
        """The pages that any of these tensors is on, ascending."""
        spans = [np.arange(self._low[number], self._high[number], dtype=np.int32) for number in tensors]
        return np.unique(np.concatenate(spans)) if spans else np.empty(0, np.int32)

    def whole(self, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """One entry a page: whether all tensors on it are among the present ones, given as one entry a tensor."""
        absent = np.zeros(self.pages + 1, np.int64)
        np.add.at(absent, self._low[~present], 1)
        np.add.at(absent, self._high[~present], -1)
        found: npt.NDArray[np.bool_] = np.cumsum(absent)[:-1] == 0
        return found
