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
class Epoch:
    """What one turn of a sampler found: windows that ended now, and the page faults that sampling made since the last
    turn. `pages` have their turn now; `page_s` of the CPU seconds that this took are for them."""

    windows: tuple[Window, ...]
    faults: int
    pages: int = 0
    page_s: float = 0.0


class Mapping:
    """Model page number p lies at `range_.address` + p * 2 MiB, for `pages` pages. `generation` is never used twice.

    Masks of pages that cannot be sampled: `foreign` ones hold memory that was mapped over the model, `pinned` ones are
    read by a device, `held` ones the present sampler cannot see. Raises Refused for a copy-on-write range: emptying its
    page tables would throw away the process's own writes.
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
        self.foreign, self.pinned, self.held = (np.zeros(pages, np.bool_) for _ in range(3))

    def live(self) -> Any | None:
        """The native handle, which keeps the memory mapped while it is held; None once it is unmapped."""
        try:
            return self.range.live()
        except Closed:
            return None

    @property
    def blemished(self) -> bool:
        """Whether there are any such pages."""
        return bool(self.foreign.any() or self.pinned.any() or self.held.any())

    def sampled(self, pages: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Which of `pages` can be sampled."""
        lost: npt.NDArray[np.bool_] = self.foreign[pages] | self.pinned[pages] | self.held[pages]
        return ~lost

    def untrackable(self) -> npt.NDArray[np.int32]:
        """Page numbers that cannot be sampled, ascending."""
        return np.flatnonzero(self.foreign | self.pinned | self.held).astype(np.int32)
