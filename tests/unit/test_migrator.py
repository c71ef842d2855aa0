"""The migrator: does a plan in its order within its quota, and outlives whatever does not hold any more."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_catalog import CXL, DISK, DRAM
from tests.unit.tiers_bench import Bench, Kernel
from tiermem import _native
from tiermem.errors import Refused
from tiermem.eviction import Eviction
from tiermem.lease import LeaseTable, Session
from tiermem.migrator import Migrator, Quota, log, migrator
from tiermem.policy import Move, Plan
from tiermem.types import PAGE_BYTES
from tiermem.view import Rows

FAST = 1 << 50
"""A quota that is never in the way."""


class Migrating(Bench):
    """A bench with a migrator and the pool's eviction on it."""

    def __init__(self, dram_pages: int = 64, cxl_pages: int = 64, quota: int = FAST) -> None:
        super().__init__(dram_pages, cxl_pages)
        self.kernel = Kernel()
        self.memory.__dict__["numa"] = self.kernel
        self.leases = LeaseTable()
        self.loading: set[str] = set()
        self.eviction = Eviction(self.memory, self.leases, self.loading, lambda *_: None, lambda record: None)
        self.migrator = Migrator(self.memory, self.journal, self.lock, Quota(quota), self.eviction.evict)
        self.stop = threading.Event()

    def execute(self, plan: Plan, seconds: float = 5.0, guard_s: float = 0.0) -> None:
        self.migrator.execute(plan, Rows(list(self.catalog)), time.monotonic() + seconds, guard_s, self.stop)
        self.check()

    def calls(self) -> list[tuple[list[int], int]]:
        """Pages and node of each call of the kernel."""
        return [(pages, node) for _, pages, node, _ in self.kernel.calls]


@pytest.fixture
def bench() -> Iterator[Migrating]:
    made = Migrating()
    yield made
    made.close()


def move(first: int, pages: int, target: int, source: int | None = None, reason: str = "a test") -> Move:
    return Move(first, pages, DRAM + CXL - target if source is None else source, target, reason)


def evict(first: int, pages: int) -> Move:
    return move(first, pages, DISK, DRAM)


def test_the_order_of_the_plan_is_kept(bench: Migrating) -> None:
    a, b = bench.add("a", [[DRAM] * 2, [CXL] * 2]), bench.add("b", [[DRAM]], file=1)
    bench.migrator.replicas = SimpleNamespace(  # type: ignore[assignment]
        copy=lambda piece, *way: bench.kernel.calls.append(("copy", list(piece.pages), DISK, False)))  # fmt: skip
    copy = Move(1, 1, CXL, DISK, "a copy", "copy")
    bench.execute([move(2, 1, DRAM), move(0, 2, CXL), copy, evict(4, 1), move(3, 1, DRAM)])
    assert bench.calls() == [([0], 0), ([0, 1], 1), ([1], DISK), ([1], 0)]
    assert a.placed.tolist() == [CXL, CXL, DRAM, DRAM]
    assert b.missing() == [0]
    outcomes = [(entry.outcome, entry.model, entry.first) for entry in reversed(bench.migrator.log.entries())]
    assert outcomes == [
        ("moved", "a", 2), ("moved", "a", 0), ("evicted", "b", 0), ("moved", "a", 3)
    ]  # fmt: skip
    assert (bench.migrator.moved_bytes, bench.migrator.evicted_bytes) == (4 * PAGE_BYTES, PAGE_BYTES)


def test_neighbours_that_go_the_same_way_are_one_call_a_segment(bench: Migrating) -> None:
    bench.add("a", [[DRAM] * 4, [DRAM] * 2])
    bench.execute([move(3, 1, CXL), move(0, 2, CXL), move(4, 1, CXL), move(1, 2, CXL), move(5, 1, CXL, reason="x")])
    assert bench.calls() == [([0, 1, 2, 3], 1), ([0], 1), ([1], 1)], "one for each segment and reason"
    assert bench.migrator.moved_bytes == 6 * PAGE_BYTES


def test_a_move_may_span_segments_and_models(bench: Migrating) -> None:
    bench.add("a", [[DRAM] * 2, [DRAM] * 2])
    bench.add("b", [[DRAM] * 3], file=1)
    bench.execute([move(1, 5, CXL)])
    assert bench.calls() == [([1], 1), ([0, 1], 1), ([0, 1], 1)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=6))
def test_no_batch_is_larger_than_what_may_be_in_flight(sizes: list[int]) -> None:
    bench = Migrating(sum(sizes), sum(sizes))
    bench.add("a", [[DRAM] * size for size in sizes])
    spent: list[int] = []
    bench.migrator.quota = SimpleNamespace(  # type: ignore[assignment]
        delay=lambda now_s: 0.0, spend=lambda nbytes, now_s: spent.append(nbytes))  # fmt: skip
    bench.execute([move(0, sum(sizes), CXL)])
    assert max(spent) <= migrator.BATCH_BYTES
    assert sum(spent) == bench.migrator.moved_bytes == sum(sizes) * PAGE_BYTES
    bench.close()


def test_the_quota_sets_the_pace_and_what_is_left_at_the_end_is_late() -> None:
    bench = Migrating(quota=320 * PAGE_BYTES)
    bench.add("a", [[DRAM] * 32, [DRAM] * 32])
    begin_s = time.monotonic()
    bench.execute([move(0, 64, CXL), evict(0, 32)])
    assert time.monotonic() - begin_s >= 0.1, "the second batch waits for the first one's 0.1 s"
    assert bench.used() == (0, 32)
    bench.close()

    bench = Migrating(quota=PAGE_BYTES)
    record = bench.add("a", [[DRAM] * 32, [DRAM] * 32])
    begin_s = time.monotonic()
    bench.execute([move(0, 64, CXL), evict(0, 32)], seconds=0.2)
    assert time.monotonic() - begin_s < 0.2, "who cannot make it does not wait"
    assert bench.migrator.log.refused == {log.LATE: 32}
    assert record.missing() == [0], "evictions need no time"
    bench.execute([move(32, 32, CXL)], seconds=0.2)
    assert bench.migrator.log.refused == {log.LATE: 64}, "the quota does not begin anew with a plan"
    bench.close()


def test_a_pool_that_closes_ends_the_plan_at_once(bench: Migrating) -> None:
    bench.add("a", [[DRAM] * 32, [DRAM] * 32])
    bench.migrator.quota.bytes_s = PAGE_BYTES
    bench.kernel.script = [bench.stop.set]
    begin_s = time.monotonic()
    bench.execute([move(0, 64, CXL)], seconds=100)
    assert time.monotonic() - begin_s < 5
    assert bench.migrator.moved_bytes == 32 * PAGE_BYTES
    assert bench.migrator.log.refused == {log.LATE: 32}


def test_busy_pages_are_tried_again_and_then_left_alone(bench: Migrating, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrator, "_RETRIES_S", (0.001, 0.001, 0.001))
    record = bench.add("a", [[DRAM] * 3])
    busy = -errno.EBUSY
    bench.kernel.script = [[busy, 0, busy], [0, busy], busy, busy]
    bench.execute([move(0, 3, CXL)])
    assert bench.calls() == [([0, 1, 2], 1), ([0, 2], 1), ([2], 1), ([2], 1)]
    assert record.placed.tolist() == [CXL, CXL, DRAM]
    assert bench.migrator.log.refused == {log.BUSY: 1}
    assert bench.migrator.moved_bytes == 2 * PAGE_BYTES
    bench.execute([move(2, 1, CXL)])
    assert bench.migrator.log.refused == {log.BUSY: 1, log.BACKING_OFF: 1}
    assert len(bench.calls()) == 4


def test_busy_pages_are_not_tried_beyond_the_end(bench: Migrating) -> None:
    bench.add("a", [[DRAM]])
    bench.kernel.script = [-errno.EBUSY] * 9
    bench.execute([move(0, 1, CXL)], seconds=0.02)
    assert len(bench.calls()) <= 2
    assert bench.migrator.log.refused == {log.BUSY: 1}


def test_pages_do_not_bounce(bench: Migrating) -> None:
    record = bench.add("a", [[DRAM]])
    bench.execute([move(0, 1, CXL), move(0, 1, DRAM)], guard_s=60)
    assert record.placed.tolist() == [CXL]
    assert bench.migrator.log.refused == {log.PING_PONG: 1}
    bench.execute([move(0, 1, DRAM)], guard_s=0)
    assert record.placed.tolist() == [DRAM]


# --- evictions ------------------------------------------------------------------------------------------------------


def test_whole_segments_are_evicted_in_the_order_of_the_plan(bench: Migrating) -> None:
    bench.add("a", [[DRAM] * 2, [CXL], [DRAM, CXL, DRAM]])
    with bench.lock:
        freed = bench.migrator.relieve([evict(3, 3), move(2, 1, DRAM), evict(0, 2)], Rows(list(bench.catalog)))
    assert freed == bench.migrator.evicted_bytes == 5 * PAGE_BYTES
    assert [entry.first for entry in reversed(bench.migrator.log.entries())] == [3, 0]
    assert bench.calls() == [], "only evictions make room at once"
    bench.check()


def hold(bench: Migrating, how: str) -> None:
    record = next(iter(bench.catalog))
    if how == log.LEASED:
        bench.leases.grant(record.id, Session(1, 1))
    elif how == log.PINNED:
        record.pins = 1
    elif how == log.LOADING:
        bench.loading.add(record.id)
    elif how == log.GONE:
        bench.memory.drop(record, 1)


@pytest.mark.parametrize("cause", [log.LEASED, log.PINNED, log.LOADING, log.GONE, log.ELSEWHERE])
def test_what_is_held_is_not_evicted_and_the_rest_goes_on(bench: Migrating, cause: str) -> None:
    bench.add("a", [[DRAM] * 2, [DRAM]])
    other = bench.add("b", [[DRAM]], file=1)
    hold(bench, cause)
    held = evict(0, 1) if cause == log.ELSEWHERE else evict(2, 1)
    bench.execute([held, evict(3, 1)])
    assert bench.migrator.log.refused == {cause: 1}
    assert other.missing() == [0]
    assert bench.migrator.evicted_bytes == PAGE_BYTES


def test_a_segment_is_evicted_once_however_often_it_is_planned(bench: Migrating) -> None:
    bench.add("a", [[DRAM] * 2])
    bench.execute([evict(0, 2)] * 3)
    assert bench.migrator.evicted_bytes == 2 * PAGE_BYTES
    assert bench.migrator.log.refused == {log.GONE: 4}


def test_what_somebody_asks_to_evict_is_refused_with_what_to_do(bench: Migrating) -> None:
    record = bench.add("a", [[DRAM]])
    lease = bench.leases.grant(record.id, Session(4711, 1))
    with pytest.raises(Refused, match="a is leased by process 4711; close it there first"):
        bench.eviction.evict_model(record)
    bench.leases.release(lease)
    record.pins = 2
    with pytest.raises(Refused, match="a is pinned 2 times; unpin it first"):
        bench.eviction.evict_model(record)
    record.pins = 0
    bench.loading.add(record.id)
    with pytest.raises(Refused, match="a is loading; wait until it is there"):
        bench.eviction.evict_model(record)
    bench.loading.clear()
    assert bench.eviction.evict_model(record) == PAGE_BYTES
    bench.check()


def test_the_kernel_is_asked_through_the_memory_s_own_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """One handle a pool, opened when it is first needed: a host without NUMA needs none."""
    made: list[Kernel] = []

    def open_kernel() -> Kernel:
        made.append(Kernel())
        return made[-1]

    monkeypatch.setattr(_native, "Numa", open_kernel)
    bench = Bench()
    Migrator(bench.memory, bench.journal, bench.lock, Quota(1), lambda piece: 0)
    assert made == []
    assert bench.memory.numa is bench.memory.numa
    assert len(made) == 1
    bench.close()
