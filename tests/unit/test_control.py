"""The control loop: looks, asks, acts, once a period; nothing that fails in a tick ends it, and closing is quick."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import until
from tiermem.control import Control
from tiermem.policy import Move

PLAN = [Move(0, 1, 0, 1, "a test")]


class Pool:
    """Everything that the loop calls, and in which order it did."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.period_s, self.guard_s, self.failure = 0.01, 3.0, ""
        self.answer: Any = PLAN
        self.errors: list[Exception] = []
        self.quota = SimpleNamespace(bytes_s=1000)
        self.control = Control(self, self, self, self.view)  # type: ignore[arg-type]

    def note(self, what: Any) -> None:
        self.seen.append(what)

    def measure(self) -> None:
        self.note("measure")

    def look(self) -> None:
        self.note("look")
        if self.errors:
            raise self.errors.pop()

    def refresh(self) -> None:
        self.note("refresh")

    def view(self, quota_bytes: int, period_s: float) -> Any:
        self.note(("view", quota_bytes, period_s))
        return "view", "rows"

    def plan(self, view: Any) -> Any:
        self.note(("plan", view))
        return self.answer

    def execute(self, plan: Any, rows: Any, end_s: float, guard_s: float, stop: threading.Event) -> None:
        self.note(("execute", plan, rows, guard_s))
        assert time.monotonic() < end_s <= time.monotonic() + self.period_s
        self.stop = stop

    def run(self, ticks: int) -> None:
        self.control.start()
        until(lambda: self.control.ticks >= ticks)
        self.control.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.control.close()


def test_a_tick_looks_asks_and_acts(pool: Pool) -> None:
    pool.run(2)
    tick = ["look", "refresh", ("view", 10, 0.01), ("plan", "view"), ("execute", PLAN, "rows", 3.0)]
    assert pool.seen[:11] == ["measure", *tick, *tick]
    assert pool.stop.is_set(), "a plan that is being executed is told to end"
    assert pool.control.cpu_s > 0


def test_an_empty_plan_is_not_executed(pool: Pool) -> None:
    pool.answer = []
    pool.run(2)
    assert not [what for what in pool.seen if what[0] == "execute"]


def test_a_policy_that_failed_is_looked_at_and_not_asked(pool: Pool) -> None:
    pool.failure = "it failed"
    pool.run(2)
    assert set(pool.seen) == {"measure", "look", "refresh"}


def test_a_tick_that_fails_does_not_end_the_loop(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    pool.errors = [RuntimeError("the kernel"), ValueError("numpy")]
    pool.run(4)
    assert pool.seen.count(("plan", "view")) >= 2
    assert caplog.text.count("a tick of the control loop failed") == 2


def test_ticks_come_once_a_period_and_late_ones_are_not_made_up_for(pool: Pool) -> None:
    pool.period_s = 0.1
    pauses = iter([0.35])

    def slow_once(view: Any) -> Any:
        time.sleep(next(pauses, 0.0))
        return []

    pool.plan = slow_once  # type: ignore[method-assign]
    begin_s = time.monotonic()
    pool.control.start()
    time.sleep(0.75)
    pool.control.close()
    assert time.monotonic() - begin_s < 5
    assert 3 <= pool.control.ticks <= 6, "one of 0.35 s, then one each 0.1 s: not four at once"


def test_closing_ends_a_loop_that_waits_at_once(pool: Pool) -> None:
    pool.period_s = 3600
    pool.control.start()
    until(lambda: pool.control.ticks == 1)
    begin_s = time.monotonic()
    pool.control.close()
    assert time.monotonic() - begin_s < 1
    pool.control.close()


def test_a_loop_that_never_ran_is_closed(pool: Pool) -> None:
    pool.control.close()
    assert pool.seen == []
