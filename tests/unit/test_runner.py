"""Runners: a file answers from its process as it would in ours, and keeps its state; frames survive nonsense."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import ConfigError, PolicyError
from tiermem.policies.lru import Lru
from tiermem.policy import Move, View, check_plan, fill_fastest, load_policy
from tiermem.policy.sample import sample_request, sample_view
from tiermem.runner import Runner, open_runner
from tiermem.runner.frames import pack_plan, pack_question, unpack_answer, unpack_plan, unpack_question

BUDGET_S = 5.0

COUNTING = """
import numpy as np
from tiermem.policy import Move, PageState, moves

class Counting:
    period_s = 0.25
    guard_s = 3

    def __init__(self):
        self.seen = PageState(np.int32)

    def plan(self, view):
        seen = self.seen.of(view.pages)
        seen += 1
        rows = np.flatnonzero(view.movable & (view.pages.tier == 0))[: int(seen.max(initial=0))]
        return moves(view, rows, 1, "seen " + str(seen.max(initial=0)))
"""

PLACING = (
    COUNTING
    + """
    def place(self, request):
        return np.arange(len(request)) % 2
"""
)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], Runner]]:
    runners: list[Runner] = []

    def open_text(text: str) -> Runner:
        (tmp_path / "mine.py").write_text(text)
        runners.append(open_runner(str(tmp_path / "mine.py"), BUDGET_S))
        return runners[-1]

    yield open_text
    for runner in runners:
        runner.close()
        runner.close()


def test_a_file_answers_as_it_would_in_process(opened: Callable[[str], Runner]) -> None:
    runner = opened(COUNTING)
    own = load_policy(runner.name)
    assert (runner.period_s, runner.guard_s, runner.warnings) == (0.25, 3.0, [])
    for number in range(4):
        view = sample_view(500 + 100 * number, number // 2)
        answer = runner.plan(view)
        assert answer == own.plan(view)
        assert answer
    assert runner.plan(sample_view(0)) == own.plan(sample_view(0)) == []


def test_places_of_a_file_that_has_them_and_of_one_that_has_not(opened: Callable[[str], Runner]) -> None:
    request = sample_request(50, sample_view(3000).tiers)
    assert opened(PLACING).place(request).tolist() == [0, 1] * 25
    assert opened(COUNTING).place(request).tolist() == fill_fastest(request).tolist()
    more = sample_request(3000, request.tiers)
    assert -1 in opened(COUNTING).place(more).tolist()
    assert opened(PLACING).place(sample_request(0, request.tiers)).shape == (0,)


def test_a_change_of_the_file_is_seen(opened: Callable[[str], Runner]) -> None:
    runner = opened(COUNTING)
    path = Path(runner.name)
    assert not runner.changed()
    facts = path.stat()
    path.write_text(COUNTING.replace("0.25", "0.50"))
    assert runner.changed()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert not runner.changed()  # same file, size and time
    path.rename(path.with_suffix(".old"))
    assert runner.changed()
    path.write_text(COUNTING)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert runner.changed()  # another file


def test_it_counts_the_time_that_it_takes_and_takes_none_at_rest(opened: Callable[[str], Runner]) -> None:
    runner = opened("class Mine:\n    def plan(self, view):\n        sum(range(5_000_000))\n        return []\n")
    before_s, wall_s = runner.cpu_s, time.monotonic()
    runner.plan(sample_view(10))
    wall_s = time.monotonic() - wall_s
    used_s = runner.cpu_s - before_s
    assert 0.02 < used_s < wall_s + 0.02
    resting_s = runner.cpu_s
    time.sleep(0.3)
    assert runner.cpu_s - resting_s < 0.005
    runner.close()
    assert runner.cpu_s >= resting_s


def test_threads_ask_one_after_the_other(opened: Callable[[str], Runner]) -> None:
    runner = opened(PLACING)
    view, answers = sample_view(3000, 1), []
    request = sample_request(4, view.tiers)

    def ask() -> None:
        for _ in range(20):
            answers.append(runner.plan(view)[0].reason)
            runner.place(replace(request))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(f"seen {number}" for number in range(1, 61))


def test_numpy_numbers_are_as_good_as_any(opened: Callable[[str], Runner]) -> None:
    head = "import numpy as np\nfrom tiermem.policy import Move\n"
    text = "class Mine:\n    def plan(self, view):\n"
    text += "        row = np.flatnonzero(view.movable & (view.pages.tier == 0))[0]\n"
    text += "        return [Move(row, np.int32(1), view.pages.tier[row], np.int8(1), 'r' * 9999)]\n"
    (move,) = opened(head + text).plan(sample_view(300, 1))
    assert (type(move.first), type(move.source), move.pages, move.target) == (int, int, 1, 1)
    assert move.reason == "r" * 200


def test_a_closed_runner_says_so(opened: Callable[[str], Runner]) -> None:
    for runner in (opened(COUNTING), open_runner("lru", BUDGET_S)):
        runner.close()
        with pytest.raises(PolicyError, match="answers no more: it was closed"):
            runner.plan(sample_view(10))


def test_no_such_policy() -> None:
    for name, words in (("/absent/mine.py", "no such file"), ("fifo", "name a shipped one"), ("/tmp/..py", "no such")):
        with pytest.raises(ConfigError, match=words):
            open_runner(name, BUDGET_S)


def test_a_shipped_policy_runs_here() -> None:
    runner = open_runner("lru", BUDGET_S)
    view = sample_view(2000, 1, memory_tiers=1, needed_bytes=1 << 28)
    plan = runner.plan(view)
    assert plan == Lru().plan(view) != []
    assert not runner.changed()
    assert runner.cpu_s > 0
    request = sample_request(50, view.tiers)
    assert runner.place(request).tolist() == fill_fastest(request).tolist()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda view: threading.Event().wait(0.1) or [], r"plan\(view\) took 0.1\d* s, 0.05 s are allowed"),
        (lambda view: 1 / 0, r"plan\(view\) raised ZeroDivisionError: division by zero"),
        (lambda view: [Move(9, 1, 0, 1, "")], "the view has rows"),
    ],
)
def test_a_shipped_policy_that_fails(monkeypatch: pytest.MonkeyPatch, answer: Any, words: str) -> None:
    monkeypatch.setattr(Lru, "plan", lambda self, view: answer(view))
    runner = open_runner("lru", 0.05)
    with pytest.raises(PolicyError, match=f"policy lru: .*{words}"):
        runner.plan(sample_view(2, 1))
    with pytest.raises(PolicyError, match="policy lru answers no more"):
        runner.plan(sample_view(2, 1))


def through_the_pipe(view: View) -> Any:
    parts = pack_question(7, ("plan", view))
    data = bytearray().join(parts)
    head, arrays = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    assert len(data) == 16 + head + arrays
    number, (word, again) = unpack_question(bytes(data[16 : 16 + head]), memoryview(data)[16 + head :])
    assert (number, word) == (7, "plan")
    return again


@pytest.mark.parametrize("pages", [0, 1, 777])
def test_a_view_arrives_whole_and_cannot_be_written(pages: int) -> None:
    view = sample_view(pages, 2)
    view = replace(view, pages=replace(view.pages, rate=view.pages.rate.copy()))  # one that is writable here
    again = through_the_pipe(view)
    assert repr((again.now_s, again.tiers, again.models)) == repr((view.now_s, view.tiers, view.models))
    for name in view.pages.__slots__:
        column = getattr(again.pages, name)
        np.testing.assert_array_equal(column, getattr(view.pages, name))
        if pages:
            with pytest.raises(ValueError, match="WRITEABLE"):
                column.flags.writeable = True


some_plans = st.lists(
    st.builds(Move, *[st.integers(0, 1 << 40)] * 4, st.text(max_size=20), st.sampled_from(["move", "copy", "drop"])),
    max_size=5,
)


@given(some_plans)
def test_a_plan_comes_back_as_it_was(plan: list[Move]) -> None:
    assert unpack_plan(unpack_answer(msgpack.packb(["plan", *pack_plan(plan)]))[1:]) == plan


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.binary(max_size=40) | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.binary(max_size=60) | junk.map(msgpack.packb))
def test_nonsense_from_the_child_is_an_error_or_a_harmless_plan(data: bytes) -> None:
    try:
        plan = unpack_plan(unpack_answer(data)[1:])
    except PolicyError:
        return
    assert all(isinstance(move, Move) for move in plan)


@given(st.lists(junk, max_size=4))
def test_columns_that_are_none_are_refused(columns: list[Any]) -> None:
    try:
        plan = unpack_plan(columns)
        check_plan(sample_view(3), plan)
    except PolicyError:
        return
    assert plan == []
