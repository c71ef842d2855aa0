"""Mappings: the shared, read-only mappings of models in this process, as samplers of page tables see them.

Owns what is known of their pages; keeps no mapping alive, and never touches a page or its table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.errors import Closed, Refused
from tiermem.observations import Bits
from tiermem.types import PAGE_BYTES

_generations = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen of the mapping `key` in one window."""

    key: str
    bits: Bits


@dataclass(frozen=True, slots=True)
class Found:
    """What one or several turns of a sampler found: windows that ended, and what it knows of the cost. `pages` had
    their turn; `turn_s` are the CPU seconds of looking and unmapping, `fault_s` those of the client's faults."""

    windows: tuple[Window, ...]
    turns: int = 1
    pages: int = 0
    turn_s: float = 0.0
    fault_s: float = 0.0


class Mapping:
    """Model page number p lies at `range_.address` + p * 2 MiB, for `pages` pages. `generation` is never used twice.

    `mask` has a bit for each reason why a page cannot be sampled: PINNED ones are read by a device, FOREIGN ones hold
    memory that was mapped over the model, HELD ones the present sampler cannot unmap. Raises Refused for a
    copy-on-write range: emptying its page tables would throw away the process's own writes.
    """

    def __init__(self, key: str, range_: _native.Range, pages: int) -> None:
        if range_.cow:
            raise Refused(
                f"mapping {key} is copy-on-write; only shared mappings are sampled: open it with writable=False"
            )
        if not 0 < pages <= range_.nbytes // PAGE_BYTES:
            raise Refused(f"mapping {key}: {pages} pages do not lie in a range of {range_.nbytes} bytes")
        self.key = key
        self.pages = pages
        self.generation = next(_generations)
        self.range = range_.reference()
        self.mask = np.zeros(pages, np.uint8)
        self._sweep: _native.Sweep | None = None
        range_.before_release(self.leave)

    def join(self, sweep: _native.Sweep, order: npt.NDArray[np.uint32]) -> None:
        """Have its pages swept in this order, until it is unmapped or leaves. Raises Closed, NativeError."""
        self._sweep = sweep  # before it is added, since from then on it may be unmapped
        sweep.add(self.generation, self.range, order, self.mask)

    def leave(self) -> None:
        """Have its pages swept no more."""
        sweep, self._sweep = self._sweep, None
        if sweep is not None:
            sweep.drop(self.generation)

    def live(self) -> Any | None:
        """The native handle, which keeps the memory mapped while it is held; None once it is unmapped."""
        try:
            return self.range.live()
        except Closed:
            return None

    def mark(self, pages: npt.NDArray[np.integer[Any]] | slice, bit: int, *, on: bool = True) -> None:
        """Set or clear one reason."""
        if on:
            self.mask[pages] |= np.uint8(bit)
        else:
            self.mask[pages] &= np.uint8(~bit & 0xFF)

    def untrackable(self) -> npt.NDArray[np.int32]:
        """Page numbers that cannot be sampled, ascending."""
        return np.flatnonzero(self.mask).astype(np.int32)
