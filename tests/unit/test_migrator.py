"""The migrator: acts on what still holds, refuses the rest, and outlives any policy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_view import record_of
from tiermem.errors import Refused
from tiermem.migrator import Migrator
from tiermem.policy import Move, Plan, View
from tiermem.tier import DISK, DRAM, Tier
from tiermem.types import PAGE_BYTES
from tiermem.view import Place, view_of

REASON = "a test"


class Scripted:
    """Plans what it was told, or raises it."""

    def __init__(self, script: Any) -> None:
        self.script = script
        self.calls = 0

    def plan(self, view: View) -> Plan:
        self.calls += 1
        if isinstance(self.script, Exception):
            raise self.script
        plan: Plan = self.script() if callable(self.script) else self.script
        return plan


class Memory:
    """Three segments of 2, 1 and 3 pages; `held` are those that may not go."""

    def __init__(self, held: set[int] | None = None) -> None:
        self.record = record_of("model", 0, [2, 1, 3])
        self.held = held or set()
        self.evicted: list[int] = []
        for segment in range(3):
            self.record.begin(segment, str(segment))
            self.record.complete(segment)

    def evict(self, place: Place, reason: str) -> int:
        assert reason == REASON
        record, segment = place
        if segment in self.held or record.keys[segment] is None:
            raise Refused(f"segment {segment} is leased or gone")
        record.drop(segment)
        self.evicted.append(segment)
        return record.manifest.segments[segment].page_bytes

    def relieve(self, migrator: Migrator) -> int:
        return migrator.relieve(*view_of([self.record], lambda _: False, (Tier(DRAM, "dram", 1),), {DRAM: 1}, 0.0))


def evict(first: int, pages: int, target: int = DISK) -> Move:
    return Move(first, pages, DRAM, target, REASON)


def test_whole_segments_are_evicted_in_the_order_of_the_plan() -> None:
    memory = Memory()
    migrator = Migrator(Scripted([evict(3, 3), evict(0, 2)]), memory.evict)
    assert memory.relieve(migrator) == 5 * PAGE_BYTES
    assert memory.evicted == [2, 0]
    assert migrator.evicted_bytes == 5 * PAGE_BYTES
    assert not migrator.refused
    assert migrator.policy_s > 0


@pytest.mark.parametrize(
    ("move", "words"),
    [
        (evict(3, 2), "only whole segments"),
        (evict(3, 4), "only whole segments"),
        (evict(0, 3), "only whole segments"),
        (evict(1, 1), "only whole segments"),
        (evict(6, 1), "only whole segments"),
        (evict(-1, 1), "only whole segments"),
        (evict(2, 0), "only whole segments"),
        (evict(2, 1, DRAM), "takes no moves"),
        (evict(2, 1, 7), "takes no moves"),
        (evict(2, 1), "leased or gone"),
    ],
)
def test_a_move_that_does_not_hold_is_refused_and_the_rest_goes_on(move: Move, words: str) -> None:
    memory = Memory(held={1})
    migrator = Migrator(Scripted([move, evict(0, 2)]), memory.evict)
    assert memory.relieve(migrator) == 2 * PAGE_BYTES
    assert memory.evicted == [0]
    ((reason, count),) = migrator.refused.items()
    assert words in reason
    assert count == 1
    assert not migrator.failure


def test_a_segment_is_evicted_once_however_often_it_is_planned() -> None:
    memory = Memory()
    migrator = Migrator(Scripted([evict(0, 2)] * 3), memory.evict)
    assert memory.relieve(migrator) == 2 * PAGE_BYTES
    assert sum(migrator.refused.values()) == 2


def late() -> Any:
    yield evict(0, 2)
    raise ValueError("late")


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (RecursionError("deep"), "RecursionError: deep"),
        (None, "TypeError"),
        (7, "TypeError"),
        ([evict(0, 2), None], "TypeError"),
        ([(0, 2, 0, 1, "a tuple is no move")], "TypeError"),
        (late, "ValueError: late"),
    ],
)
def test_a_policy_that_fails_is_replaced_by_holding(script: Any, failure: str) -> None:
    memory = Memory()
    policy = Scripted(script)
    migrator = Migrator(policy, memory.evict)
    for _ in range(2):
        assert memory.relieve(migrator) == 0
        assert failure in migrator.failure
    assert policy.calls == 1, "it is not asked again"
    assert memory.evicted == [], "nothing of a plan is done that could not be read to its end"


def test_an_error_of_the_pool_is_not_swallowed() -> None:
    def broken(_place: Place, _reason: str) -> int:
        raise AssertionError("the catalog is damaged")

    migrator = Migrator(Scripted([evict(0, 2)]), broken)
    with pytest.raises(AssertionError, match="damaged"):
        Memory().relieve(migrator)
    assert not migrator.failure
