"""Headroom: device memory that is left alone for the engine, and the budget of an arena as it follows from it.

Owns when the device is asked what it has free, and how far a budget that was lowered rises again. Never drops anything.
"""

from __future__ import annotations

import time

from tiermem.device.arena import Arena
from tiermem.device.backend import Device

_LOOK_S = 0.01
"""How often at most the device is asked, where no more is needed."""

_AGAIN_S = 1.0
"""How long a budget that was lowered stays so at least, where no more is needed."""


class Headroom:
    """`wanted_bytes`: what the budget of the arena is while the device has `reserve_bytes` free besides."""

    def __init__(self, device: Device, arena: Arena, reserve_bytes: int) -> None:
        self.wanted_bytes = arena.budget_bytes
        self._device, self._arena, self._reserve_bytes = device, arena, reserve_bytes
        self._looked_s = self._lowered_s = float("-inf")

    @property
    def unreserved_bytes(self) -> int:
        """What the budget promises and was not taken from the device yet."""
        return self._arena.budget_bytes - self._arena.reserved_bytes

    def lacking_bytes(self) -> int:
        """By how much the budget is to be lowered now; 0 where nobody looked, since somebody did a moment ago. Where
        nothing has been lacking for a while it is raised again. Raises DeviceLost."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return 0
        self._looked_s = now_s
        lacking = self._reserve_bytes - self._device.free_bytes()
        if lacking > 0:
            self._lowered_s = now_s
        elif now_s - self._lowered_s >= _AGAIN_S:
            self.recover()
        return max(0, lacking)

    def was_lowered(self) -> None:
        """The arena found less memory than its budget says."""
        self._lowered_s = time.monotonic()

    def recover(self) -> None:
        """Raise a budget that was lowered, as far as the device has memory again. Raises DeviceLost."""
        lowered = self.wanted_bytes - self._arena.budget_bytes
        if lowered > 0:
            free = self._device.free_bytes() - self._reserve_bytes - self.unreserved_bytes
            self._arena.grow(max(0, min(lowered, free)))
