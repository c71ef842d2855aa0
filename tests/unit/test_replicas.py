"""Replicas: copies are true, counted once and given up, also when a store fails or a model leaves meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.unit.test_catalog import CXL, DISK, DRAM
from tests.unit.tiers_bench import Bench, tiers_of
from tiermem.catalog import ModelRecord
from tiermem.errors import CapacityError
from tiermem.memory import Memory
from tiermem.migrator import log
from tiermem.migrator.log import MoveLog
from tiermem.migrator.replicas import Replicas
from tiermem.tier import Tier, Tiers
from tiermem.types import PAGE_BYTES
from tiermem.view import Piece

HBM = 2
"""Tier of the copies, in front of the disk."""


class Store:
    """Copies the bytes of pages into a dictionary, as a device would into its memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.pages: dict[tuple[str, int, int], bytes] = {}
        self.error: Exception | None = None
        self.meanwhile: Callable[[], object] = lambda: None

    def copy(self, record: ModelRecord, segment: int, pages: range) -> None:
        if self.error is not None:
            raise self.error
        source = self.memory.segment(record, segment)
        assert source is not None
        for page in pages:
            assert (record.name, segment, page) not in self.pages, "a page has one copy"
            self.pages[record.name, segment, page] = bytes(source.buffer()[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        self.meanwhile()

    def drop(self, record: ModelRecord, segment: int, pages: range) -> None:
        for page in pages:
            del self.pages[record.name, segment, page]


class Copying(Bench):
    """Tiers dram, cxl, hbm of 4 pages, disk; a model of 2 and 3 pages with different bytes in each."""

    def __init__(self) -> None:
        super().__init__()
        memory = tiers_of(8, 8).memory
        self.tiers = Tiers([*memory, Tier(HBM, "hbm", 4 * PAGE_BYTES), Tier(DISK + 1, "disk", None)])
        self.memory = Memory(self.memory.backing, self.tiers)
        self.log = MoveLog(self.journal)
        self.store = Store(self.memory)
        self.replicas = Replicas(self.log, self.lock)
        self.replicas.stores[HBM] = self.store
        self.record = self.known("a", 0, [2, 3])
        self.record.disk = DISK + 1
        self.record.placed[:] = self.record.residency[:] = DISK + 1
        self.load(self.record, [[DRAM] * 2, [DRAM, DRAM, CXL]])
        for segment in (0, 1):
            made = self.memory.segment(self.record, segment)
            assert made is not None
            for page in range(2 + segment):
                np.frombuffer(made.buffer(), np.uint8)[page * PAGE_BYTES :][:PAGE_BYTES] = 10 * segment + page

    def copy(self, segment: int, pages: range, source: int = DRAM, target: int = HBM) -> None:
        piece = Piece(self.record, segment, pages)
        self.replicas.copy(piece, self.tiers[source], self.tiers[target], "a test")
        self.agree()

    def drop(self, segment: int, pages: range, source: int = HBM) -> None:
        self.replicas.drop(Piece(self.record, segment, pages), self.tiers[source], self.tiers[DRAM], "a test")
        self.agree()

    def agree(self) -> None:
        """Store, catalog and tier tell the same."""
        self.check()
        held = [
            (segment, row - self.record.first_page[segment])
            for row in np.flatnonzero(self.record.replicas >> HBM & 1).tolist()
            for segment in [int(row >= 2)]
        ]
        assert sorted((segment, page) for _, segment, page in self.store.pages) == held
        assert self.tiers[HBM].used_bytes == len(held) * PAGE_BYTES

    def outcomes(self) -> list[tuple[str, int, int]]:
        return [(entry.outcome, entry.first, entry.pages) for entry in reversed(self.log.entries())]


@pytest.fixture
def bench() -> Iterator[Copying]:
    made = Copying()
    yield made
    made.close()


def test_bytes_are_copied_and_given_up(bench: Copying) -> None:
    bench.copy(1, range(0, 2))
    bench.copy(1, range(2, 3), source=CXL)
    assert {page: set(data) for (_, _, page), data in bench.store.pages.items()} == {0: {10}, 1: {11}, 2: {12}}
    assert bench.record.residency.tolist() == [DRAM, DRAM, DRAM, DRAM, CXL], "the pages stay where they are"
    bench.drop(1, range(1, 3))
    assert bench.record.replicas.tolist() == [0, 0, 1 << HBM, 0, 0]
    assert bench.outcomes() == [("copied", 2, 2), ("copied", 4, 1), ("dropped", 3, 2)]
    assert not bench.log.refused


@pytest.mark.parametrize("cause", [log.NO_DEVICE, log.PINNED, log.LOADING, log.ELSEWHERE, log.NO_SPACE, log.GONE])
def test_what_is_refused(bench: Copying, cause: str) -> None:
    target, pages = HBM, range(0, 2)
    if cause == log.NO_DEVICE:
        target = CXL
    elif cause == log.PINNED:
        bench.record.pins = 1
    elif cause == log.LOADING:
        bench.memory.drop(bench.record, 1)
        bench.memory.create(bench.record, {1: np.array([DRAM] * 3, np.int8)})
    elif cause == log.ELSEWHERE:
        pages = range(1, 3)
    elif cause == log.NO_SPACE:
        bench.copy(0, range(0, 2))
        bench.copy(1, range(2, 3), source=CXL)
    elif cause == log.GONE:
        bench.memory.drop(bench.record, 1)
        cause = log.ELSEWHERE
    before = dict(bench.store.pages)
    bench.copy(1, pages, target=target)
    assert bench.log.refused == {cause: 2}
    assert bench.store.pages == before


def test_a_page_has_one_copy_and_is_dropped_once(bench: Copying) -> None:
    bench.copy(0, range(0, 1))
    bench.copy(0, range(0, 2))
    assert bench.log.refused == {log.ELSEWHERE: 2}
    bench.drop(0, range(0, 2))
    assert bench.log.refused == {log.ELSEWHERE: 2, log.GONE: 2}
    bench.drop(0, range(0, 1))
    bench.drop(0, range(0, 1))
    bench.drop(0, range(0, 1), source=CXL)
    assert bench.log.refused == {log.ELSEWHERE: 2, log.GONE: 3, log.NO_DEVICE: 1}


def test_a_store_that_fails_leaves_nothing(bench: Copying) -> None:
    bench.store.error = CapacityError("the device is full")
    bench.copy(0, range(0, 2))
    assert bench.log.refused == {"not copied": 2}
    assert bench.log.entries()[0].reason.endswith("; the device is full")
    bench.store.error = None
    bench.copy(0, range(0, 2))
    assert bench.outcomes()[-1] == ("copied", 0, 2)


def test_a_model_that_is_removed_takes_its_copies_along(bench: Copying) -> None:
    bench.copy(0, range(0, 1))
    bench.copy(1, range(0, 2))
    bench.memory.drop_all(bench.record)
    bench.replicas.forget(bench.record, bench.tiers)
    bench.agree()
    assert bench.store.pages == {}
    assert not bench.record.replicas.any()
    bench.replicas.forget(bench.record, bench.tiers)


def test_a_model_that_is_removed_while_it_is_copied_leaves_nothing(bench: Copying) -> None:
    def remove() -> None:
        bench.memory.drop_all(bench.record)
        bench.replicas.forget(bench.record, bench.tiers)
        bench.catalog.remove(bench.record)

    bench.store.meanwhile = remove
    bench.copy(0, range(0, 2))
    assert bench.store.pages == {}
    assert bench.log.refused == {log.GONE: 2}
