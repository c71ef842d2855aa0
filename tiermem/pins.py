"""Pins: segments whose pages a device reads, so that they can neither move nor be given back under it.

Owns the set of them. Never pins: whoever does says so, and how to end it. All threads may use it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord


class Pins:
    """By the keys of segments. `release_idle()` unpins what nobody needs pinned right now, `revoke(key)` unpins that
    segment whoever needs it; both are set by who pins. `registered(record)`: whether a client has its device read the
    model's memory by itself."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self.release_idle: Callable[[], None] = lambda: None
        self.revoke: Callable[[str], None] = lambda key: None
        self.registered: Callable[[ModelRecord], bool] = lambda record: False

    def mark(self, key: str, pinned: bool) -> None:
        """The pages of a segment are pinned from now on, or no more."""
        (self._keys.add if pinned else self._keys.discard)(key)

    def give_back(self, key: str) -> None:
        """A segment leaves memory."""
        if key in self._keys:
            self.revoke(key)

    def pages(self, record: ModelRecord) -> npt.NDArray[np.bool_]:
        """Which pages of a model stay where they are: by a device's doing, or all because users pinned the model."""
        whole = record.pins > 0 or self.registered(record)
        if whole or not self._keys:
            return np.full(record.first_page[-1], whole)
        keys = tuple(self._keys)
        return np.repeat(np.array([key in keys for key in record.keys], np.bool_), np.diff(record.first_page))
