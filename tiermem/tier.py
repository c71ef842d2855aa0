"""Tier: capacity of one performance class, and how much of it is in use. Counts bytes; never holds or moves them."""

from __future__ import annotations

from tiermem.errors import CapacityError
from tiermem.units import format_bytes

DRAM, DISK = 0, 1
"""Tier ids; 0 is the fastest. A page on DISK is in its checkpoint and nowhere else."""


class Tier:
    """`capacity_bytes` None means that the tier never fills (the checkpoint on disk)."""

    def __init__(self, tier_id: int, name: str, capacity_bytes: int | None) -> None:
        self.id = tier_id
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0

    @property
    def free_bytes(self) -> int | None:
        return None if self.capacity_bytes is None else self.capacity_bytes - self.used_bytes

    def lacks(self, nbytes: int) -> int:
        """Bytes that must be freed before `nbytes` fit; 0 where they fit."""
        return 0 if self.capacity_bytes is None else max(0, self.used_bytes + nbytes - self.capacity_bytes)

    def reserve(self, nbytes: int) -> None:
        """Count `nbytes` as used. Raises CapacityError where they do not fit."""
        if self.lacks(nbytes):
            raise CapacityError(
                f"tier {self.name!r} needs {format_bytes(nbytes)}, has {format_bytes(self.free_bytes or 0)} free of "
                f"{format_bytes(self.capacity_bytes or 0)}; unload a model or raise the tier's capacity (--dram)"
            )
        self.used_bytes += nbytes

    def release(self, nbytes: int) -> None:
        self.used_bytes -= nbytes
        assert self.used_bytes >= 0, f"tier {self.name} released more than it had"
