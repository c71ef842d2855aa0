"""Carrier: how a pool has pages of a model copied to a device and given up there: as the tensors that lie on them.

Owns what the pool ordered. Never gives up what somebody holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import numpy.typing as npt

from tiermem.device.overlap import Overlap
from tiermem.device.residency import Residency, Weight
from tiermem.device.worth import Worth
from tiermem.types import Manifest


class TensorCarrier:
    """A tiermem.carrier.Carrier over one residency. `weights`: by number of the tensor, of those that may be copied.

    `copied`: one entry a tensor, set by whoever gives the bytes of one to be copied.
    """

    def __init__(
        self, manifest: Manifest, residency: Residency, weights: Mapping[int, Weight], worth: Worth,
        copied: npt.NDArray[np.bool_], registered: bool,
    ) -> None:  # fmt: skip
        """Raises DeviceLost."""
        self.registered = registered
        self.device = residency.device.name
        self.capacity_bytes = residency.device.capacity_bytes()
        self._overlap = Overlap(manifest)
        self._residency, self._weights, self._worth, self._copied = residency, weights, worth, copied

    @property
    def budget_bytes(self) -> int:
        return self._residency.budget_bytes

    def copy(self, segment: int, pages: range) -> None:
        """They stay, beside what is used, until the pool gives them up or others need the room. Raises DeviceFull,
        CopyFailed, DeviceLost, Closed, and what stopped the load."""
        weights = self._on(segment, pages)
        holding = self._residency.hold(list(weights.values()))
        try:
            holding.result()
            self._worth.ordered |= weights.keys()
        finally:
            holding.release()

    def drop(self, segment: int, pages: range) -> None:
        weights = self._on(segment, pages)
        self._worth.ordered -= weights.keys()
        self._residency.drop(weights)

    def replicas(self) -> npt.NDArray[np.bool_]:
        present = np.zeros(len(self._copied), np.bool_)
        for number, weight in self._weights.items():
            present[number] = self._residency.has(weight.key)
        return self._overlap.whole(present)

    def take_copied(self) -> npt.NDArray[np.int32]:
        tensors = np.flatnonzero(self._copied)
        self._copied[tensors] = False
        return self._overlap.pages_of(tensors)

    def _on(self, segment: int, pages: range) -> dict[Hashable, Weight]:
        """By key. Of a file that was not opened there is nothing to copy."""
        numbers = (number for number in self._overlap.tensors_on(segment, pages) if number in self._weights)
        return {weight.key: weight for weight in map(self._weights.__getitem__, numbers)}
