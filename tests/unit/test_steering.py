"""Steering: a policy that fails is not asked again, a new one takes over at once, and a bad one never does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.conftest import open_files
from tiermem import steering as room
from tiermem.errors import ConfigError, PolicyError
from tiermem.policy import Move, Plan, Request, View, fill_fastest
from tiermem.policy.sample import sample_request, sample_view
from tiermem.steering import Steering

VIEW = sample_view(8)
MOVE = Move(0, 1, 0, 1, "a test")


class FakeRunner:
    """A policy that does what the test says; `version` is what its file holds."""

    live: ClassVar[list[FakeRunner]]
    files: ClassVar[dict[str, int]]
    broken: ClassVar[set[str]]

    def __init__(self, name: str, budget_s: float) -> None:
        if name not in self.files:
            raise ConfigError(f"no policy {name!r}")
        if name in self.broken:
            raise ConfigError(f"policy {name}: importing it raised SyntaxError")
        self.name, self.budget_s, self.version = name, budget_s, self.files[name]
        self.period_s, self.guard_s, self.warnings = float(self.version), 7.0, [f"odd {self.version}"]
        self.cpu_s = 0.0
        self.error = ""
        self.answer: Any = None
        self.live.append(self)

    def plan(self, view: View) -> Plan:
        self._do()
        return [MOVE]

    def place(self, request: Request) -> Any:
        self._do()
        return np.full(len(request), 1, np.int8)

    def _do(self) -> None:
        assert self in self.live, "a policy that was closed is asked"
        time.sleep(0.001)
        assert self in self.live, "a policy is closed while it is asked"
        self.cpu_s += 1.0
        if self.error:
            raise PolicyError(f"policy {self.name}: {self.error}")

    def changed(self) -> bool:
        return self.files.get(self.name) != self.version

    def close(self) -> None:
        if self in self.live:
            self.live.remove(self)


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> type[FakeRunner]:
    runners = type("Runners", (FakeRunner,), {"live": [], "files": {"a": 1, "b": 1}, "broken": set()})
    monkeypatch.setattr(room, "open_runner", runners)
    monkeypatch.setattr(room, "_state_of", lambda name: (runners.files.get(name, 0), name in runners.broken))
    return runners


@pytest.fixture
def steering(runners: type[FakeRunner]) -> Iterator[Steering]:
    made = Steering("a", 0.25)
    yield made
    made.close()
    assert runners.live == []


def in_charge(runners: type[FakeRunner]) -> FakeRunner:
    (runner,) = runners.live
    return runner


def test_a_policy_in_charge_is_asked(steering: Steering, runners: type[FakeRunner]) -> None:
    assert steering.plan(VIEW) == [MOVE]
    request = sample_request(4, VIEW.tiers)
    assert steering.place(request).tolist() == [1] * 4
    assert (steering.name, steering.failure, steering.plans, steering.failures) == ("a", "", 1, 0)
    assert (steering.period_s, steering.guard_s, steering.warnings) == (1.0, 7.0, ["odd 1"])
    assert in_charge(runners).budget_s == 0.25


@pytest.mark.parametrize("step", ["plan", "place"])
def test_a_policy_that_fails_is_not_asked_again(steering: Steering, runners: type[FakeRunner], step: str) -> None:
    runner, request = in_charge(runners), sample_request(4, VIEW.tiers)
    runner.error = "divides by zero"
    for _ in range(3):
        if step == "plan":
            assert steering.plan(VIEW) == []
        else:
            assert steering.place(request).tolist() == fill_fastest(request).tolist()
    assert steering.failure == "policy a: divides by zero"
    assert (steering.failures, runner.cpu_s) == (1, 1.0)
    runner.error = ""
    assert steering.plan(VIEW) == [], "it is not trusted again by itself"
    assert steering.plans == (1 if step == "plan" else 0)


def test_setting_a_policy_brings_moves_back(steering: Steering, runners: type[FakeRunner]) -> None:
    in_charge(runners).error = "fails"
    steering.plan(VIEW)
    assert steering.set("b") == ["odd 1"]
    assert (steering.name, steering.failure, in_charge(runners).name) == ("b", "", "b")
    assert steering.plan(VIEW) == [MOVE]
    assert steering.cpu_s == 2.0, "that of the earlier one included"
    before = in_charge(runners)
    steering.set("b")
    assert in_charge(runners) is not before, "the same one anew"


@pytest.mark.parametrize("name", ["absent", "b"])
def test_a_bad_policy_leaves_the_old_one_in_charge(steering: Steering, runners: type[FakeRunner], name: str) -> None:
    runners.broken.add("b")
    with pytest.raises(ConfigError):
        steering.set(name)
    assert (steering.name, steering.failure) == ("a", "")
    assert steering.plan(VIEW) == [MOVE]


def test_a_bad_policy_does_not_hide_the_failure_of_the_old_one(steering: Steering, runners: type[FakeRunner]) -> None:
    in_charge(runners).error = "fails"
    steering.plan(VIEW)
    with pytest.raises(ConfigError):
        steering.set("absent")
    assert steering.failure == "policy a: fails"


def test_a_changed_file_is_loaded_again(
    steering: Steering, runners: type[FakeRunner], caplog: pytest.LogCaptureFixture
) -> None:
    before = in_charge(runners)
    steering.refresh()
    assert in_charge(runners) is before
    runners.files["a"] = 2
    before.error = "fails"
    steering.plan(VIEW)
    steering.refresh()
    assert (in_charge(runners).version, steering.failure, steering.period_s) == (2, "", 2.0)
    assert "odd 2" in caplog.text


def test_a_file_that_became_bad_holds_until_it_is_mended(steering: Steering, runners: type[FakeRunner]) -> None:
    runners.files["a"] = 2
    runners.broken.add("a")
    for _ in range(3):
        steering.refresh()
    assert "SyntaxError" in steering.failure
    assert steering.failures == 1, "one change is one failure"
    assert steering.plan(VIEW) == []
    runners.broken.clear()
    steering.refresh()
    assert steering.failure == ""
    assert steering.plan(VIEW) == [MOVE]
    del runners.files["a"]
    steering.refresh()
    assert "no policy 'a'" in steering.failure
    runners.files["a"] = 2
    steering.refresh()
    assert steering.failure == "", "the file that was loaded last is back"


def test_threads_may_share_it(steering: Steering, runners: type[FakeRunner]) -> None:
    """Nobody is ever asked after it was closed, and none is left open."""
    stop, errors = threading.Event(), []
    request = sample_request(4, VIEW.tiers)

    def loop(step: Any) -> None:
        try:
            while not stop.is_set():
                step()
        except BaseException as error:
            errors.append(error)

    def change() -> None:
        runners.files["a"] += 1
        steering.refresh()

    steps = [lambda: steering.plan(VIEW), lambda: steering.place(request), lambda: steering.set("b"), change,
             lambda: (steering.period_s, steering.cpu_s, steering.warnings)]  # fmt: skip
    threads = [threading.Thread(target=loop, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    stop.wait(0.3)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert errors == []
    assert len(runners.live) == 1
    assert steering.failure == ""


def test_a_real_file_goes_through_it_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"

    def write(body: str) -> None:
        path.write_text(f"class Mine:\n    period_s = 0.5\n    def plan(self, view):\n        {body}\n")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    write("return []")
    files = open_files()
    steering = Steering(str(path), 5.0)
    try:
        assert (steering.plan(VIEW), steering.period_s, steering.failure) == ([], 0.5, "")
        write("return 1 / 0")
        steering.refresh()
        assert (steering.plan(VIEW), steering.failures) == ([], 1)
        assert "ZeroDivisionError: division by zero, in line 4" in steering.failure
        write("def (")
        steering.refresh()
        assert "SyntaxError" in steering.failure
        write("return []")
        steering.refresh()
        assert steering.failure == ""
        steering.set("lru")
        assert steering.cpu_s > 0
    finally:
        steering.close()
    assert open_files() == files
