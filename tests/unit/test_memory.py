"""Memory: files, tiers and catalog stay in step, whatever is created, adopted, moved, settled and dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.test_catalog import CXL, DISK, DRAM, fill
from tests.unit.tiers_bench import Bench, tiers_of
from tiermem import _native
from tiermem.errors import CapacityError, NativeError, Refused
from tiermem.memory import Memory
from tiermem.segment import open_backing
from tiermem.types import LOADING, PAGE_BYTES


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(dram_pages=4, cxl_pages=4)
    yield made
    made.close()


def test_each_page_is_counted_in_the_tier_that_it_was_given(bench: Bench) -> None:
    record = bench.known("a", 0, [3, 2])
    made = bench.memory.create(record, {0: np.array([DRAM, CXL, DRAM], np.int8), 1: np.array([CXL, CXL], np.int8)})
    assert bench.used() == (2, 3)
    assert record.placed.tolist() == [DRAM, CXL, DRAM, CXL, CXL]
    assert record.residency.tolist() == [LOADING] * 5
    assert [segment.nbytes for segment in made.values()] == [3 * PAGE_BYTES, 2 * PAGE_BYTES]
    assert bench.memory.segment(record, 1) is made[1]
    bench.check()
    fill(record, 0)
    assert record.residency.tolist() == [DRAM, CXL, DRAM, LOADING, LOADING]
    assert bench.memory.drop(record, 0) == 3 * PAGE_BYTES
    assert bench.used() == (0, 2)
    assert (made[0].closed, made[1].closed) == (True, False)
    assert bench.memory.drop_all(record) == 2 * PAGE_BYTES
    assert bench.used() == (0, 0)
    assert (record.placed == DISK).all()
    assert bench.memory.segment(record, 0) is None
    bench.check()


@pytest.mark.parametrize("placed", [[DRAM] * 5, [CXL] * 5, [DRAM, CXL, CXL, CXL, CXL, CXL]])
def test_all_segments_are_made_or_none(bench: Bench, placed: list[int]) -> None:
    bench.add("a", [[CXL]])
    record = bench.known("b", 1, [1, len(placed) - 1])
    with pytest.raises(CapacityError, match=r"needs .* MiB, has .* MiB free"):
        bench.memory.create(record, {0: np.array(placed[:1], np.int8), 1: np.array(placed[1:], np.int8)})
    assert bench.used() == (0, 1)
    assert record.missing() == [0, 1]
    bench.check()


def test_a_file_that_cannot_be_made_takes_the_others_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    create, made = _native.Segment.create, list[_native.Segment]()

    def fails_later(dirfd: int, name: str, nbytes: int, hugetlb: bool) -> _native.Segment:
        if made:
            raise NativeError("no space", 28)
        made.append(create(dirfd, name, nbytes, hugetlb=hugetlb))
        return made[0]

    monkeypatch.setattr(_native.Segment, "create", fails_later)
    record = bench.known("a", 0, [1, 1])
    with pytest.raises(CapacityError, match="could not be made on memfd: no space"):
        bench.memory.create(record, {i: np.array([DRAM], np.int8) for i in (0, 1)})
    assert made[0].closed
    assert bench.used() == (0, 0)
    bench.check()


def test_pages_that_the_kernel_moved_are_counted_where_they_are(bench: Bench) -> None:
    record = bench.add("a", [[DRAM], [DRAM, DRAM, DRAM, CXL]])
    mixed, absent = _native.NODE_MIXED, _native.NODE_ABSENT
    # From page 1 of segment 1 on: node 7 is in no tier.
    assert bench.memory.settle(record, 1, 1, np.array([7, mixed, absent], np.int16)) == 2
    assert record.placed.tolist() == record.residency.tolist() == [DRAM, DRAM, CXL, CXL, CXL]
    assert bench.used() == (2, 3)
    bench.check()
    assert bench.memory.settle(record, 1, 0, np.array([1, 1, 0, 0], np.int16)) == 3
    assert record.placed.tolist() == [DRAM, CXL, CXL, DRAM, DRAM]
    bench.check()
    assert bench.memory.settle(record, 1, 0, np.array([1, absent, 0, 0], np.int16)) == 0


def test_pages_that_are_settled_may_be_more_than_a_tier_has(bench: Bench) -> None:
    record = bench.add("a", [[CXL, CXL], [DRAM] * 4])
    assert bench.memory.settle(record, 0, 0, np.array([0, 0], np.int16)) == 2
    assert bench.used() == (6, 0)
    assert bench.tiers[DRAM].free_bytes == 0
    bench.check()


def test_a_segment_on_its_way_is_settled_too(bench: Bench) -> None:
    record = bench.add("a", [[DRAM, DRAM]], loading=True)
    assert bench.memory.settle(record, 0, 0, np.array([0, 1], np.int16)) == 1
    assert record.residency.tolist() == [LOADING, LOADING]
    fill(record, 0)
    assert record.residency.tolist() == [DRAM, CXL]
    bench.check()


def test_room_is_kept_for_pages_that_are_about_to_come(bench: Bench) -> None:
    record = bench.add("a", [[DRAM] * 3])
    dram, cxl = bench.tiers[DRAM], bench.tiers[CXL]
    before = bench.memory.moves
    bench.memory.expect(cxl, 3 * PAGE_BYTES)
    assert bench.used() == (3, 3)
    bench.check()
    with pytest.raises(CapacityError):
        bench.memory.expect(cxl, 2 * PAGE_BYTES)
    bench.check()
    bench.memory.expect(cxl, -3 * PAGE_BYTES)
    assert bench.memory.moves == before + 2, "whoever asked the kernel before has an old answer"
    bench.memory.place(record, np.array([0, 2]), dram, cxl)
    assert bench.used() == (1, 2)
    assert record.residency.tolist() == [CXL, DRAM, CXL]
    bench.check()


@pytest.mark.parametrize(("tier", "nbytes"), [(DRAM, PAGE_BYTES), (CXL, -PAGE_BYTES), (DRAM, 1)])
def test_check_finds_a_miscount(bench: Bench, tier: int, nbytes: int) -> None:
    bench.add("a", [[DRAM, CXL]])
    bench.check()
    bench.tiers[tier].count(nbytes)
    with pytest.raises(AssertionError, match=r"tier (dram|cxl) counts \d+ bytes, models hold 2097152"):
        bench.check()


def test_check_finds_a_segment_that_is_nobodys(bench: Bench) -> None:
    record = bench.add("a", [[DRAM]])
    bench.memory._segments["x"] = bench.memory._segments[record.keys[0] or ""]
    with pytest.raises(AssertionError, match="segments and catalog differ"):
        bench.memory.check(bench.catalog)


def test_a_segment_that_is_not_in_memory_is_not_shared(bench: Bench) -> None:
    record = bench.known("a", 0, [1])
    for number in (0, 1, -1):
        with pytest.raises(Refused, match=f"a: segment {number} is not in memory; open the model again"):
            bench.memory.share(record, [number])


# --- adoption -------------------------------------------------------------------------------------------------------


@pytest.fixture
def heir(tmp_path: Path) -> Iterator[Bench]:
    """Tiers of 2 and 3 pages over a directory in which an earlier pool left segments `0` to `2` of 2 pages."""
    earlier = open_backing("shm", tmp_path / "segments", 64 * PAGE_BYTES)
    for key in "012":
        earlier.create(key, 2 * PAGE_BYTES).close()
    earlier.close(keep=True)
    bench = Bench(1, 1)
    bench.tiers = tiers_of(2, 3)
    bench.memory = Memory(open_backing("shm", tmp_path / "segments", 64 * PAGE_BYTES), bench.tiers)
    yield bench
    bench.close()


def test_what_is_adopted_fills_the_fastest_tiers(heir: Bench) -> None:
    heir.tiers[DRAM].reserve(PAGE_BYTES)
    record = heir.known("a", 0, [2, 2, 2])
    heir.memory.adopt(record, 0, "0")
    assert record.placed[:2].tolist() == [DRAM, CXL]
    heir.memory.adopt(record, 1, "1")
    assert heir.used() == (2, 3)
    with pytest.raises(CapacityError, match="tier 'dram' needs"):
        heir.memory.adopt(record, 2, "2")
    heir.tiers[DRAM].count(-PAGE_BYTES)
    assert record.missing() == [2]
    heir.check()


def test_a_segment_that_is_gone_or_cut_is_not_counted(heir: Bench) -> None:
    record = heir.known("a", 0, [2, 1])
    with pytest.raises(NativeError):
        heir.memory.adopt(record, 0, "gone")
    with pytest.raises(NativeError, match="segment 1"):
        heir.memory.adopt(record, 1, "1")
    assert heir.used() == (0, 0)
    heir.check()


class Changes(RuleBasedStateMachine):
    """Everything that memory does, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(5, 5)
        self.records = [self.bench.known("a", 0, [2, 1]), self.bench.known("b", 1, [3])]

    @rule(number=st.integers(0, 1), tiers=st.lists(st.sampled_from([DRAM, CXL]), min_size=3, max_size=3))
    def create(self, number: int, tiers: list[int]) -> None:
        record = self.records[number]
        missing = record.missing()
        placed = {i: np.resize(np.array(tiers, np.int8), record.manifest.segments[i].pages) for i in missing}
        used = self.bench.used()
        try:
            self.bench.memory.create(record, placed)
        except CapacityError:
            assert self.bench.used() == used
            return
        for segment in missing:
            fill(record, segment)

    @rule(number=st.integers(0, 1), segment=st.integers(0, 1))
    def drop(self, number: int, segment: int) -> None:
        record = self.records[number]
        if segment < len(record.keys) and record.keys[segment] is not None:
            self.bench.memory.drop(record, segment)

    @rule(number=st.integers(0, 1), row=st.integers(0, 2), tier=st.sampled_from([DRAM, CXL]))
    def place(self, number: int, row: int, tier: int) -> None:
        record = self.records[number]
        source = int(record.placed[row])
        if source in (DISK, tier) or self.bench.tiers[tier].lacks(PAGE_BYTES):
            return
        self.bench.memory.place(record, np.array([row]), self.bench.tiers[source], self.bench.tiers[tier])

    @rule(number=st.integers(0, 1), nodes=st.lists(st.sampled_from([-2, -1, 0, 1, 5]), min_size=3, max_size=3))
    def settle(self, number: int, nodes: list[int]) -> None:
        record = self.records[number]
        if record.keys[0] is not None:
            pages = record.manifest.segments[0].pages
            self.bench.memory.settle(record, 0, 0, np.array(nodes[:pages], np.int16))

    @invariant()
    def agrees(self) -> None:
        self.bench.check()

    def teardown(self) -> None:
        self.bench.close()


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
