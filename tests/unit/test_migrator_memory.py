"""What a migrator remembers: its quota, its history and its log."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_catalog import CXL, DISK, DRAM, record_of
from tiermem.journal import Journal
from tiermem.migrator import Quota, log
from tiermem.migrator.history import History
from tiermem.migrator.log import MoveLog, runs
from tiermem.recording import frame
from tiermem.types import PAGE_BYTES

# --- quota ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 500), st.floats(0, 3), st.booleans()), min_size=1, max_size=30),
)
def test_in_no_time_more_than_the_quota_and_one_batch_is_spent(
    bytes_s: int, steps: list[tuple[int, float, bool]]
) -> None:
    """Steps: bytes, seconds that something else takes, and whether whoever spends had to be patient anyway."""
    quota, now_s, spent = Quota(bytes_s), 100.0, []
    for nbytes, pause, patient in steps:
        delay = quota.delay(now_s)
        assert delay >= 0
        now_s += max(delay, pause) if patient else delay
        assert quota.delay(now_s) <= 1e-9
        quota.spend(nbytes, now_s)
        spent.append((now_s, nbytes))
        now_s += pause
    for i, (begin_s, _) in enumerate(spent):
        for j in range(i, len(spent)):
            moved = sum(nbytes for _, nbytes in spent[i:j])
            assert moved <= bytes_s * (spent[j][0] - begin_s) + 1e-6, "all but the last batch are paid for"


def test_an_idle_quota_gathers_nothing_and_waits_no_longer_than_it_must() -> None:
    quota = Quota(10)
    assert quota.delay(5.0) == 0
    quota.spend(20, 5.0)
    assert quota.delay(5.0) == pytest.approx(2)
    assert quota.delay(6.5) == pytest.approx(0.5)
    assert quota.delay(1000.0) == 0
    quota.spend(20, 1000.0)
    assert quota.delay(1000.0) == pytest.approx(2), "a long rest is no credit"
    quota.spend(20, 1000.0)
    assert quota.delay(1000.0) == pytest.approx(4)


# --- history --------------------------------------------------------------------------------------------------------

RECORD = record_of("model", [0], [4])


def rows(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


def test_a_page_does_not_go_back_within_the_guard_and_may_go_on() -> None:
    history = History()
    assert not history.bounces(RECORD, slice(0, 4), DRAM, 0.0, 10.0).any()
    history.moved(RECORD, rows(1, 2), DRAM, 100.0)
    assert history.bounces(RECORD, slice(0, 4), DRAM, 109.9, 10.0).tolist() == [False, True, True, False]
    assert not history.bounces(RECORD, rows(1, 2), CXL, 100.0, 10.0).any(), "elsewhere it may go"
    assert not history.bounces(RECORD, rows(1, 2), DRAM, 110.0, 10.0).any()
    assert not history.bounces(RECORD, rows(1, 2), DRAM, 100.0, 0.0).any()
    history.moved(RECORD, rows(1), CXL, 105.0)
    assert history.bounces(RECORD, rows(1, 2), DRAM, 106.0, 10.0).tolist() == [False, True]
    assert not history.bounces(record_of("other", [1], [4]), slice(0, 4), DRAM, 100.0, 10.0).any()


def test_a_clock_that_goes_back_guards_no_longer_than_the_guard() -> None:
    history = History()
    history.moved(RECORD, rows(0), DRAM, 1000.0)
    assert history.bounces(RECORD, rows(0), DRAM, 995.0, 10.0).all()
    assert not history.bounces(RECORD, rows(0), DRAM, 5.0, 10.0).any()


@pytest.mark.parametrize("now_s", [0.0, 100.0, 1e5, 1e9])
def test_pages_that_fail_are_left_alone_for_twice_as_long_each_time(now_s: float) -> None:
    """Whatever the time is: a host that runs for years knows a tenth of a second."""
    history = History()
    for wait_s in (1, 2, 4, 8, 16, 32, 64, 64, 64):
        history.failed(RECORD, rows(2), now_s)
        assert history.backs_off(RECORD, slice(0, 4), now_s + wait_s - 0.01).tolist() == [False, False, True, False]
        assert not history.backs_off(RECORD, slice(0, 4), now_s + wait_s).any()
        now_s += wait_s
    history.moved(RECORD, rows(2), DRAM, now_s)
    history.failed(RECORD, rows(2), now_s)
    assert not history.backs_off(RECORD, rows(2), now_s + 1).any(), "a page that moved begins anew"


def test_a_full_tier_is_left_alone_for_twice_as_long_each_time() -> None:
    history, now_s = History(), 100.0
    assert not history.is_full(CXL, now_s)
    for wait_s in (1, 2, 4, 8, 16, 32, 64, 64):
        history.filled(CXL, now_s)
        assert history.is_full(CXL, now_s + wait_s - 0.01)
        assert not history.is_full(DRAM, now_s)
        now_s += wait_s
        assert not history.is_full(CXL, now_s)
    history.filled(CXL, now_s)
    history.took(CXL)
    assert not history.is_full(CXL, now_s)
    history.filled(CXL, now_s)
    assert not history.is_full(CXL, now_s + 1)


# --- log ------------------------------------------------------------------------------------------------------------


def filled() -> MoveLog:
    moves, other = MoveLog(Journal()), record_of("other", [1], [9])
    moves.done(RECORD, 0, 2, DRAM, CXL, "cold", log.MOVED)
    moves.refuse(other, 5, 4, CXL, DRAM, "hot", log.BUSY)
    moves.done(other, 0, 3, DRAM, DISK, "unused", log.EVICTED)
    moves.refuse(RECORD, 1, 1, CXL, DRAM, "hot", log.PING_PONG)
    moves.done(RECORD, 3, 1, DRAM, CXL, "x" * 1000, log.MOVED)
    return moves


def test_entries_come_newest_first_by_model_and_by_page() -> None:
    moves = filled()

    def found(**which: object) -> list[tuple[str, int, str]]:
        return [(entry.model, entry.first, entry.outcome) for entry in moves.entries(**which)]  # type: ignore[arg-type]

    newest = [("model", 3, "moved"), ("model", 1, "ping-pong"), ("other", 0, "evicted"), ("other", 5, "busy"),
              ("model", 0, "moved")]  # fmt: skip
    assert found() == newest
    assert found(limit=2) == newest[:2]
    assert found(limit=0) == []
    assert found(model="other") == newest[2:4]
    assert found(model="model", limit=1) == newest[:1]
    assert found(model="model", page=1) == [newest[1], newest[4]]
    assert found(model="other", page=8) == [newest[3]]
    assert found(model="other", page=9) == found(model="absent") == []
    assert len(moves.entries()[0].reason) == 500
    assert [entry.unix_s for entry in moves.entries()] == sorted((e.unix_s for e in moves.entries()), reverse=True)


def test_sums_are_of_pages() -> None:
    moves = filled()
    assert moves.moved_pages == {(DRAM, CXL): 3, (DRAM, DISK): 3}
    assert moves.refused == {log.BUSY: 4, log.PING_PONG: 1}


def test_the_oldest_entries_go() -> None:
    moves = MoveLog(Journal())
    for number in range(20_001):
        moves.refuse(RECORD, number, 1, DRAM, CXL, "", log.BUSY)
    kept = moves.entries(limit=30_000)
    assert (len(kept), kept[0].first, kept[-1].first) == (20_000, 20_000, 1)
    assert moves.refused[log.BUSY] == 20_001


def test_who_watches_is_told_of_moves_and_not_of_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    journal, told = Journal(), list[dict[str, Any]]()
    watcher = journal.watch(lambda: None)

    def telling(kind: str, at_s: float, **fields: Any) -> bytes:
        told.append(fields)
        return frame(kind, at_s, **fields)

    monkeypatch.setattr("tiermem.journal.frame", telling)
    moves = MoveLog(journal)
    moves.refuse(RECORD, 0, 1, DRAM, CXL, "why", log.BUSY)
    moves.done(RECORD, 1, 2, DRAM, CXL, "cold", log.MOVED)
    assert told == [{"model": RECORD.id, "first": 1, "pages": 2, "source": DRAM, "target": CXL,
                     "nbytes": 2 * PAGE_BYTES, "reason": "cold"}]  # fmt: skip
    assert len(watcher.take()[0]) > 0


@given(st.sets(st.integers(0, 30)))
def test_runs_cover_just_these_rows(chosen: set[int]) -> None:
    found = runs(np.array(sorted(chosen), np.int64))
    assert [row for first, count in found for row in range(first, first + count)] == sorted(chosen)
    assert all(a + n < b for (a, n), (b, _) in pairwise(found)), "neighbours are joined"
