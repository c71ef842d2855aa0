"""Carrier: what carries out a pool's copies of one model on one device, as its client knows it. Protocols only.

The pool orders copies, the process that owns the device makes them, and what that process tells is the truth. Never
copies a byte.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Carrier(Protocol):
    """Copies of one model on one device. Its methods are called by the client's agent, one at a time."""

    device: str
    """As torch names it, with its number: npu:0, cuda:1, cpu."""

    @property
    def budget_bytes(self) -> int:
        """What the copies may take of the device's memory."""

    @property
    def capacity_bytes(self) -> int:
        """All memory of the device."""

    @property
    def registered(self) -> bool:
        """Whether the device reads the model's memory in this process by itself, so that its pages cannot move."""

    def copy(self, segment: int, pages: range) -> None:
        """Returns once every tensor that overlaps these 2 MiB pages of the segment is on the device. Raises
        TiermemError."""

    def drop(self, segment: int, pages: range) -> None:
        """Give up those of their tensors that nobody holds."""

    def replicas(self) -> npt.NDArray[np.bool_]:
        """One entry a page of the model: whether every tensor on it is on the device."""

    def take_copied(self) -> npt.NDArray[np.int32]:
        """Page numbers within the model that were copied since this was last asked: our own transfers are accesses."""


class Link(Protocol):
    """A carrier's way to the pool, for the carrier to keep: when it is collected, the carrier is gone too."""

    def changed(self) -> None:
        """Copies came or went. Takes no lock, may be called often and from any thread."""

    def close(self) -> None:
        """The carrier is gone, and with it what it had on the device."""
