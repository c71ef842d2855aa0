"""The tier watch: what the kernel moved is counted where it is, nodes that go are noticed, speeds are measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.test_catalog import CXL, DRAM, fill
from tests.unit.tiers_bench import Bench, Kernel
from tiermem import _native, host, tier_watch
from tiermem.errors import NativeError
from tiermem.host import NumaNode
from tiermem.tier_watch import TierWatch
from tiermem.types import PAGE_BYTES


class FakeProbe:
    """Memory of a node that is as fast as the bench says. It lives until it is closed or nobody has it any more, as a
    real one does."""

    def __init__(self, bench: Watching, nbytes: int, nodes: int) -> None:
        assert nbytes == 32 << 20
        if nodes in bench.failing:
            raise NativeError("no memory", 12)
        self.mask, self._bench = nodes, bench
        self.nodes = 0b100 if nodes in bench.elsewhere else nodes
        bench.probes.add(self)

    def latency(self, loads: int) -> float:
        return self._bench.speeds[self.mask][0]

    def bandwidth(self, threads: int) -> float:
        self._bench.now_s += 1.0
        return self._bench.speeds[self.mask][1]

    def close(self) -> None:
        self._bench.probes.discard(self)


class Watching(Bench):
    """A bench with a watch on it, on a host whose nodes and probes the test controls, by masks of nodes.

    `speeds`: latency and bandwidth; probes of `failing` nodes cannot be had, those of `elsewhere` lie on another node.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(16, 16)
        self.kernel = Kernel()
        self.memory.__dict__["numa"] = self.kernel
        self.online = {0, 1}
        self.now_s = 100.0
        self.speeds = {0b01: (1e-7, 1e11), 0b10: (3e-7, 2e10)}
        self.failing: set[int] = set()
        self.elsewhere: set[int] = set()
        self.probes: WeakSet[FakeProbe] = WeakSet()
        monkeypatch.setattr(host, "nodes_with_memory", lambda: ",".join(map(str, sorted(self.online))))
        monkeypatch.setattr(host, "numa_nodes", lambda: [
            NumaNode(node, "", 1 << 30 if node in self.online else 0, 0) for node in (0, 1)])  # fmt: skip
        monkeypatch.setattr(tier_watch, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(_native, "Probe", lambda nbytes, nodes: FakeProbe(self, nbytes, nodes))
        self.watch = TierWatch(self.memory, self.catalog, self.lock)

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.watch.look()
            self.check()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watching]:
    made = Watching(monkeypatch)
    yield made
    made.watch.close()
    assert not made.probes
    made.close()


def test_pages_that_the_kernel_moved_are_noticed_bit_by_bit(bench: Watching) -> None:
    record, other = bench.add("a", [[DRAM] * 3, [CXL]]), bench.add("b", [[DRAM] * 5], file=1)
    bench.kernel.nodes = {(record.keys[0] or "", 1): 1, (record.keys[1] or "", 0): 1, (other.keys[0] or "", 4): 1}
    bench.look(3)
    assert record.placed.tolist() == record.residency.tolist() == [DRAM, CXL, DRAM, CXL]
    bench.look(5)
    assert other.placed.tolist() == [DRAM] * 4 + [CXL]
    assert bench.used() == (6, 3)
    bench.kernel.nodes[other.keys[0] or "", 4] = 0
    bench.look(8)
    assert bench.used() == (7, 2), "round after round"


def test_a_look_asks_for_a_bounded_number_of_pages(bench: Watching) -> None:
    bench.add("a", [[DRAM] * 16])
    asked: list[int] = []
    where = bench.kernel.where

    def counted(segment: Any, first: int, count: int) -> npt.NDArray[np.int16]:
        asked.append(count)
        return where(segment, first, count)

    bench.kernel.where = counted  # type: ignore[method-assign]
    bench.look(2)
    # On this backing each OS page of 4 KiB is asked for.
    assert 0 < sum(asked) * (PAGE_BYTES // 4096) <= 2 * 4096


def test_a_segment_is_settled_when_it_was_filled(bench: Watching) -> None:
    record = bench.add("a", [[DRAM, DRAM, CXL]], loading=True)
    bench.kernel.nodes = {(record.keys[0] or "", 0): 1}
    bench.watch.settle(record, 0)
    fill(record, 0)
    assert record.residency.tolist() == [CXL, DRAM, DRAM]
    bench.check()


def test_an_answer_that_is_old_counts_for_nothing(bench: Watching) -> None:
    record = bench.add("a", [[DRAM] * 2])
    bench.kernel.nodes = {(record.keys[0] or "", 0): 1}
    bench.kernel.before_where = lambda: bench.memory.expect(bench.tiers[CXL], PAGE_BYTES)
    bench.watch.settle(record, 0)
    assert record.placed.tolist() == [DRAM] * 2, "a move began meanwhile, and settles it itself"
    bench.kernel.before_where = lambda: bench.memory.expect(bench.tiers[CXL], -PAGE_BYTES)
    bench.watch.settle(record, 0)
    assert record.placed.tolist() == [DRAM] * 2
    bench.kernel.before_where = lambda: None
    bench.watch.settle(record, 0)
    assert record.placed.tolist() == [CXL, DRAM]
    bench.check()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("reloaded", [False, True])
def test_a_segment_may_leave_memory_while_the_kernel_is_asked(bench: Watching, reloaded: bool, early: bool) -> None:
    """Before the kernel looks at it, and after."""
    record = bench.add("a", [[DRAM] * 2])
    bench.kernel.nodes = {(record.keys[0] or "", 0): 1}

    def leave() -> None:
        if record.keys[0] == first:
            bench.memory.drop(record, 0)
            if reloaded:
                bench.load(record, [[DRAM] * 2])

    first, where = record.keys[0], bench.kernel.where

    def looks_then_leaves(*args: Any) -> npt.NDArray[np.int16]:
        nodes = where(*args)
        leave()
        return nodes

    if early:
        bench.kernel.before_where = leave
    else:
        bench.kernel.where = looks_then_leaves  # type: ignore[method-assign]
    bench.look(2)
    assert bench.used() == (2 if reloaded else 0, 0)


def test_a_tier_is_offline_while_its_nodes_have_no_memory(
    bench: Watching, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_watch, "_AUDIT_OS_PAGES", PAGE_BYTES // 4096)  # a page a look
    record = bench.add("a", [[CXL] * 3, [CXL] * 9])
    bench.kernel.home = 1
    bench.look(5)  # into the middle of a round
    assert bench.tiers[CXL].online
    assert caplog.text == ""
    bench.online, bench.kernel.home = {0}, 0
    bench.look()
    assert not bench.tiers[CXL].online
    assert "tier cxl is offline" in caplog.text
    assert record.placed.tolist() == [DRAM] * 12, "all at once: the kernel has moved them"
    assert bench.tiers[CXL].free_bytes == 0
    bench.online = {0, 1}
    bench.look()
    assert bench.tiers[CXL].online
    assert "tier cxl is back" in caplog.text


def test_speeds_are_measured_at_start_and_latencies_again_and_again(bench: Watching) -> None:
    bench.watch.measure()
    dram, cxl = (tier.speed for tier in bench.tiers.memory)
    assert (dram.idle_latency_s, dram.latency_s, dram.bandwidth_bytes_s) == (1e-7, 1e-7, 1e11)
    assert (cxl.idle_latency_s, cxl.latency_s, cxl.bandwidth_bytes_s) == (3e-7, 3e-7, 2e10)
    bench.look()
    bench.speeds[0b10] = (9e-7, 1.0)
    bench.now_s += 0.5
    bench.look()
    assert cxl.latency_s == 3e-7, "not at every look"
    bench.now_s += 0.6
    bench.look()
    assert (cxl.idle_latency_s, cxl.latency_s, cxl.bandwidth_bytes_s) == (3e-7, 9e-7, 2e10)


def test_a_tier_that_cannot_be_measured_is_told_and_the_others_are_measured(
    bench: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    bench.failing.add(0b01)
    bench.watch.measure()
    assert "tier dram is not measured: no memory" in caplog.text
    assert math.isnan(bench.tiers[DRAM].speed.idle_latency_s)
    assert bench.tiers[CXL].speed.bandwidth_bytes_s == 2e10
    bench.look()


def test_a_probe_that_lies_elsewhere_measures_nothing(bench: Watching, caplog: pytest.LogCaptureFixture) -> None:
    bench.elsewhere.add(0b10)
    bench.watch.measure()
    assert "tier cxl is not measured: its nodes had no" in caplog.text
    assert math.isnan(bench.tiers[CXL].speed.idle_latency_s)
    assert [probe.mask for probe in bench.probes] == [0b01], "its memory is given back"
