"""Bench: tiers, memory and a catalog without a pool, over a kernel that a test controls. Moves no real page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.unit.test_catalog import CXL, DISK, DRAM, fill, manifest_of
from tiermem.catalog import Catalog, ModelRecord
from tiermem.journal import Journal
from tiermem.memory import Memory
from tiermem.segment import open_backing
from tiermem.tier import Tier, Tiers
from tiermem.types import PAGE_BYTES

NODES = {DRAM: 0, CXL: 1}
"""The NUMA node of each memory tier."""


def tiers_of(dram_pages: int, cxl_pages: int) -> Tiers:
    """DRAM on node 0, CXL memory on node 1, and the disk."""
    return Tiers([
        Tier(DRAM, "dram", dram_pages * PAGE_BYTES, [NODES[DRAM]]),
        Tier(CXL, "cxl", cxl_pages * PAGE_BYTES, [NODES[CXL]]),
        Tier(DISK, "disk", None),
    ])  # fmt: skip


class Kernel:
    """Remembers the node of each page of each segment; stands for _native.Numa, and like it wants live segments.

    `script`: what the next calls of `move` answer, or do before they answer; without one every page moves. `calls` are
    (segment, pages, node, shared) of each.
    """

    def __init__(self, home: int = 0) -> None:
        self.home = home
        self.nodes: dict[tuple[str, int], int] = {}
        self.calls: list[tuple[str, list[int], int, bool]] = []
        self.script: list[Any] = []
        self.before_where: Callable[[], object] = lambda: None

    def where(self, segment: Any, first: int, count: int) -> npt.NDArray[np.int16]:
        self.before_where()
        segment.live()
        nodes = [self.nodes.get((segment.name, page), self.home) for page in range(first, first + count)]
        return np.array(nodes, np.int16)

    def move(self, segment: Any, pages: npt.NDArray[np.uint32], node: int, *, shared: bool) -> npt.NDArray[np.int32]:
        step = self.script.pop(0) if self.script else None
        if callable(step):
            step = step()
        segment.live()
        self.calls.append((segment.name, pages.tolist(), node, shared))
        if isinstance(step, Exception):
            raise step
        results = np.zeros(len(pages), np.int32) if step is None else np.broadcast_to(np.int32(step), len(pages)).copy()
        for page in pages[results >= 0].tolist():
            self.nodes[segment.name, page] = node
        return results

    def close(self) -> None:
        pass


class Bench:
    """Memory in tiers of so many pages, of models that tests add. `evict` is for the pool to do."""

    def __init__(self, dram_pages: int = 8, cxl_pages: int = 8) -> None:
        self.tiers = tiers_of(dram_pages, cxl_pages)
        self.memory = Memory(open_backing("memfd", None, self.tiers.capacity_bytes), self.tiers)
        self.catalog = Catalog()
        self.journal = Journal()
        self.lock = threading.RLock()

    def known(self, name: str, file: int, pages: Sequence[int]) -> ModelRecord:
        """A model on disk, with segments of so many pages; no two models have the same file."""
        manifest = manifest_of([file], pages)
        record = ModelRecord(name, manifest, [None] * len(manifest.tensors), DISK)
        self.catalog.add(record)
        return record

    def add(self, name: str, placed: Sequence[Sequence[int]], file: int = 0, loading: bool = False) -> ModelRecord:
        """A model in memory: for each segment the tier of each page."""
        record = self.known(name, file, [len(tiers) for tiers in placed])
        self.load(record, placed, loading)
        return record

    def load(self, record: ModelRecord, placed: Sequence[Sequence[int]], loading: bool = False) -> None:
        self.memory.create(record, {i: np.array(tiers, np.int8) for i, tiers in enumerate(placed)})
        if not loading:
            for segment in range(len(placed)):
                fill(record, segment)

    def used(self) -> tuple[int, int]:
        """Pages that DRAM and CXL memory count."""
        return self.tiers[DRAM].used_bytes // PAGE_BYTES, self.tiers[CXL].used_bytes // PAGE_BYTES

    def check(self) -> None:
        self.catalog.check()
        self.memory.check(self.catalog)

    def close(self) -> None:
        self.memory.close(keep=False)
