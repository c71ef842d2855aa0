"""Relocation: whatever the kernel answers and whatever happens meanwhile, pages are counted once, where they are."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.test_catalog import CXL, DRAM
from tests.unit.tiers_bench import Bench, Kernel
from tiermem import _native, host
from tiermem.catalog import ModelRecord
from tiermem.errors import NativeError
from tiermem.host import NumaNode
from tiermem.migrator import log, relocation
from tiermem.migrator.history import History
from tiermem.migrator.log import MoveLog
from tiermem.migrator.relocation import Order, Relocation
from tiermem.types import PAGE_BYTES


class Moving(Bench):
    """A bench with a relocation on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dram_pages: int = 8, cxl_pages: int = 8) -> None:
        super().__init__(dram_pages, cxl_pages)
        self.kernel = Kernel()
        monkeypatch.setattr(_native, "Numa", lambda: self.kernel)
        monkeypatch.setattr(host, "has_capability", lambda root, bit: bit == host.CAP_SYS_NICE)
        self.log = MoveLog(self.journal)
        self.history = History()
        self.relocation = Relocation(self.memory, self.log, self.history, self.lock)

    def move(
        self, record: ModelRecord, pages: list[int], target: int, *, segment: int = 0, source: int | None = None,
        guard_s: float = 0.0,
    ) -> tuple[int, list[int]]:  # fmt: skip
        """How many pages moved, and which may be tried again."""
        source = CXL + DRAM - target if source is None else source
        order = Order(record, segment, np.array(pages, np.uint32), self.tiers[source], self.tiers[target], "a test")
        moved, left = self.relocation.move(order, guard_s)
        self.check()
        return moved // PAGE_BYTES, left.pages.tolist()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moving]:
    made = Moving(monkeypatch)
    yield made
    made.close()


def test_pages_that_move_are_counted_in_their_new_tier(bench: Moving) -> None:
    record = bench.add("a", [[DRAM], [DRAM] * 4])
    assert bench.move(record, [0, 1, 3], CXL, segment=1) == (3, [])
    assert bench.kernel.calls == [(record.keys[1], [0, 1, 3], 1, True)]
    assert record.placed.tolist() == record.residency.tolist() == [DRAM, CXL, CXL, DRAM, CXL]
    assert bench.used() == (2, 3)
    entries = [(e.first, e.pages, e.source, e.target, e.outcome) for e in bench.log.entries()]
    assert entries == [(4, 1, DRAM, CXL, log.MOVED), (1, 2, DRAM, CXL, log.MOVED)]
    assert bench.log.moved_pages == {(DRAM, CXL): 3}
    assert not bench.log.refused


@pytest.mark.parametrize(
    ("answer", "moved", "again", "refused"),
    [
        ([_native.WAS_THERE] * 3, 3, [], {}),
        (-errno.EBUSY, 0, [0, 1, 2], {}),
        (-errno.EAGAIN, 0, [0, 1, 2], {}),
        (-errno.EACCES, 0, [], {log.SHARED: 3}),
        (-errno.ENOMEM, 0, [], {log.NO_SPACE: 3}),
        (-errno.ENOENT, 0, [], {log.GONE: 3}),
        (-errno.ENODEV, 0, [], {log.OFFLINE: 3}),
        (-errno.EFAULT, 0, [], {"EFAULT": 3}),
        (-9999, 0, [], {"-9999": 3}),
        ([0, -errno.EBUSY, -errno.ENOMEM], 1, [1], {log.NO_SPACE: 1}),
        ([-errno.ENOENT, _native.WAS_THERE, -errno.EACCES], 1, [], {log.GONE: 1, log.SHARED: 1}),
        (NativeError("the node is gone", errno.ENODEV), 0, [], {log.OFFLINE: 3}),
        (NativeError("no right", errno.EPERM), 0, [], {log.SHARED: 3}),
        (NativeError("no memory", errno.ENOMEM), 0, [], {log.NO_SPACE: 3}),
    ],
)
def test_what_the_kernel_answers(
    bench: Moving, answer: Any, moved: int, again: list[int], refused: dict[str, int]
) -> None:
    record = bench.add("a", [[DRAM] * 3])
    bench.kernel.script = [answer]
    assert bench.move(record, [0, 1, 2], CXL) == (moved, again)
    assert bench.used() == (3 - moved, moved)
    assert bench.log.refused == refused
    assert sum(entry.pages for entry in bench.log.entries() if entry.outcome == log.MOVED) == moved


def test_pages_that_failed_are_left_alone_and_busy_ones_are_not(bench: Moving) -> None:
    record = bench.add("a", [[DRAM] * 3])
    bench.kernel.script = [[-errno.EBUSY, -errno.EACCES, -errno.ENODEV]]
    bench.move(record, [0, 1, 2], CXL)
    assert bench.move(record, [0, 1, 2], CXL) == (1, [])
    assert bench.log.refused == {log.SHARED: 1, log.OFFLINE: 1, log.BACKING_OFF: 2}
    order = Order(record, 0, np.array([1], np.uint32), bench.tiers[DRAM], bench.tiers[CXL], "a test")
    bench.relocation.give_up(order)
    assert bench.log.refused[log.BUSY] == 1


def test_a_tier_without_memory_is_left_alone_until_it_took_a_page(
    bench: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(relocation, "time", SimpleNamespace(monotonic=lambda: now_s))
    record = bench.add("a", [[DRAM] * 3 + [CXL]])
    for wait_s in (1, 2):
        bench.kernel.script = [-errno.ENOMEM]
        assert bench.move(record, [0], CXL) == (0, [])
        assert bench.move(record, [1], CXL) == (0, []), "no page goes there"
        assert bench.move(record, [3], DRAM) == (1, []), "to other tiers pages go"
        assert bench.move(record, [3], CXL) == (0, [])
        bench.memory.place(record, np.array([3]), bench.tiers[DRAM], bench.tiers[CXL])
        now_s += wait_s
    assert bench.move(record, [1], CXL) == (1, [])
    bench.kernel.script = [-errno.ENOMEM]
    bench.move(record, [2], CXL)
    now_s += 1
    assert bench.move(record, [2], CXL) == (1, []), "a tier that took a page begins anew"
    assert bench.log.refused == {log.NO_SPACE: 7}


def test_without_the_right_pages_of_others_are_left_alone(bench: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench.add("a", [[DRAM] * 2])
    bench.kernel.script = [NativeError("a filter", errno.EPERM)]
    assert bench.relocation.shared
    bench.move(record, [0], CXL)
    assert not bench.relocation.shared
    bench.move(record, [1], CXL)
    assert [shared for *_, shared in bench.kernel.calls] == [True, False]
    monkeypatch.setattr(host, "has_capability", lambda *_: False)
    assert not Relocation(bench.memory, bench.log, bench.history, bench.lock).shared


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_segment_may_leave_memory_while_it_moves(bench: Moving, reloaded: bool, early: bool) -> None:
    """Before the kernel looks at it, and after."""
    record = bench.add("a", [[DRAM] * 3])

    def leave() -> None:
        bench.memory.drop(record, 0)
        if reloaded:
            bench.load(record, [[DRAM] * 3])
        bench.check()

    kernel_moves = bench.kernel.move
    if early:
        bench.kernel.script = [leave]
    else:

        def moves_then_leaves(*args: Any, **options: Any) -> Any:
            results = kernel_moves(*args, **options)
            leave()
            return results

        bench.kernel.move = moves_then_leaves  # type: ignore[method-assign]
    assert bench.move(record, [0, 1, 2], CXL) == (0, [])
    assert bench.log.refused == {log.GONE: 3}
    assert bench.used() == (3 if reloaded else 0, 0)


def test_room_is_kept_while_pages_move(bench: Moving) -> None:
    record = bench.add("a", [[DRAM] * 3])
    seen = []

    def look() -> int:
        bench.check()
        seen.append(bench.used())
        return -errno.EBUSY

    bench.kernel.script = [look]
    bench.move(record, [0, 1], CXL)
    assert seen == [(3, 2)]
    assert bench.used() == (3, 0)


def test_pages_that_do_not_hold_any_more_are_refused_by_cause(bench: Moving) -> None:
    record, loading = bench.add("a", [[DRAM, CXL, DRAM, DRAM]]), bench.add("b", [[DRAM]], file=1, loading=True)
    assert bench.move(record, [0, 1, 2], CXL) == (2, [])
    assert bench.log.refused == {log.ELSEWHERE: 1}
    assert bench.move(record, [0, 2], DRAM, guard_s=10.0) == (0, [])
    assert bench.log.refused[log.PING_PONG] == 2
    assert bench.move(record, [0, 2], DRAM, guard_s=0.0) == (2, [])
    record.pins = 1
    assert bench.move(record, [3], CXL) == (0, [])
    assert bench.log.refused[log.PINNED] == 1
    assert bench.move(loading, [0], CXL) == (0, [])
    assert bench.log.refused[log.LOADING] == 1
    record.pins, bench.tiers[CXL].online = 0, False
    assert bench.move(record, [3], CXL) == (0, [])
    assert bench.log.refused[log.OFFLINE] == 1
    bench.memory.drop(record, 0)
    assert bench.move(record, [3], CXL) == (0, [])
    assert bench.log.refused[log.GONE] == 1
    assert len(bench.kernel.calls) == 2, "the kernel is not asked for nothing"


def test_no_more_moves_than_the_tier_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Moving(monkeypatch, dram_pages=4, cxl_pages=3)
    record, _ = bench.add("a", [[DRAM] * 4]), bench.add("b", [[CXL]], file=1)
    assert bench.move(record, [0, 1, 2, 3], CXL) == (2, [])
    assert record.placed.tolist() == [CXL, CXL, DRAM, DRAM]
    assert bench.log.refused == {log.NO_SPACE: 2}
    bench.close()


def test_promotions_leave_the_reserve_and_demotions_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Moving(monkeypatch, dram_pages=100, cxl_pages=100)
    full, cold = bench.add("a", [[DRAM] * 95]), bench.add("b", [[CXL] * 95], file=1)
    assert bench.tiers[DRAM].low_bytes == 2 * PAGE_BYTES
    assert bench.move(cold, list(range(10)), DRAM) == (3, []), "two of the five free pages stay"
    assert bench.log.refused == {log.NO_SPACE: 7}
    assert bench.move(full, list(range(10)), CXL) == (8, []), "all eight pages that are free by now"
    bench.close()


def test_of_several_nodes_the_emptiest_is_chosen(bench: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench.add("a", [[DRAM] * 2])
    bench.tiers[CXL].nodes = (1, 2, 3)
    free = {0: 99, 1: 5, 2: 7, 3: 6}
    monkeypatch.setattr(host, "numa_nodes", lambda: [NumaNode(n, "", 100, free[n]) for n in free])
    bench.move(record, [0], CXL)
    free[3] = 8
    bench.move(record, [1], CXL)
    assert [node for _, _, node, _ in bench.kernel.calls] == [2, 3]
