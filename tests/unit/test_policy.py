"""Policies: loading them from files says what is wrong, and the shipped ones decide as they promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import ConfigError
from tiermem.policies.hold import Hold
from tiermem.policies.lru import Lru
from tiermem.policy import Pages, TierView, View, load_policy
from tiermem.tier import DISK, DRAM
from tiermem.types import LOADING, PAGE_BYTES

GOOD = "class Mine:\n    def plan(self, view):\n        return []\n"

Segment = tuple[int, int, int, float, bool, bool]
"""(model, pages, tier, last used, leased, pinned); segments of a model are numbered in order"""


def view_of(segments: Sequence[Segment], needed: int = 0) -> View:
    rows: list[tuple[int, int, int, float, bool, bool]] = []
    numbers: dict[int, int] = {}
    for model, pages, tier, last_used_s, leased, pinned in segments:
        numbers[model] = numbers.get(model, -1) + 1
        rows += [(model, numbers[model], tier, last_used_s, leased, pinned)] * pages
    types = (np.int32, np.int32, np.int8, np.float64, np.bool_, np.bool_)
    columns = zip(*rows, strict=True) if rows else [()] * 6
    arrays: list[Any] = [np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)]
    used = sum(s[1] for s in segments if s[2] != DISK) * PAGE_BYTES
    tiers = (TierView(DRAM, "dram", used, used, needed), TierView(DISK, "disk", None, 0, 0))
    models = tuple(f"m{number}" for number in range(len(numbers)))
    return View(100.0, tiers, models, Pages(*arrays))


def test_a_policy_is_loaded_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tiermem.policy import Plan, View\n" + GOOD)
    policy = load_policy(str(tmp_path / "mine.py"))
    assert type(policy).__name__ == "Mine"
    assert policy.plan(view_of([])) == []


def test_shipped_policies_are_loaded_by_name() -> None:
    assert isinstance(load_policy("lru"), Lru)
    assert isinstance(load_policy("hold"), Hold)


def test_a_policy_may_keep_its_state_in_a_dataclass(tmp_path: Path) -> None:
    """Dataclasses look for their module in sys.modules where annotations are postponed."""
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\n"
    (tmp_path / "mine.py").write_text(head + GOOD.replace("class Mine:\n", "class Mine:\n    tries: int = 3\n\n"))
    assert load_policy(str(tmp_path / "mine.py")).tries == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "0 classes with a method"),
        ("from tiermem.policies.lru import Lru\n", "0 classes with a method"),
        (GOOD + GOOD.replace("Mine", "Other"), "2 classes with a method"),
        (GOOD.replace("view", "self_view"), r"plan\(self, self_view\) must be plan\(self, view\)"),
        (GOOD.replace("self, view", "self, view, more"), r"must be plan\(self, view\)"),
        (GOOD.replace("self, view", "self"), r"must be plan\(self, view\)"),
        (GOOD.replace("def plan", "def plans"), "0 classes with a method"),
        ("import no_such_module_at_all\n" + GOOD, "importing it raised ModuleNotFoundError"),
        ("1 / 0\n" + GOOD, "importing it raised ZeroDivisionError"),
        ("def (\n", "importing it raised SyntaxError"),
        (GOOD + "    def __init__(self):\n        raise ValueError('no')\n", r"Mine\(\) raised ValueError: no"),
        (GOOD + "    def __init__(self, size):\n        pass\n", r"Mine\(\) raised TypeError"),
    ],
)
def test_a_bad_policy_file_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_policy(str(tmp_path / "mine.py"))
    assert str(tmp_path / "mine.py") in str(caught.value)


def test_a_policy_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(ConfigError, match=r"no such file|name a shipped one"):
            load_policy(str(path))
    (tmp_path / "directory.py").mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        load_policy(str(tmp_path / "directory.py"))


@pytest.mark.parametrize("name", ["fifo", "LRU", "", ".", "a b", "../lru", "lru.Lru", "\0"])
def test_an_unknown_name_lists_the_shipped_policies(name: str) -> None:
    with pytest.raises(ConfigError, match=r"hold, lru"):
        load_policy(name)


def test_a_view_gives_whole_segments_that_may_move() -> None:
    view = view_of([
        (0, 2, DRAM, 1.0, False, False),
        (0, 3, DISK, 2.0, False, False),
        (1, 1, DRAM, 3.0, True, False),
        (2, 1, DRAM, 4.0, False, True),
        (3, 1, LOADING, 5.0, False, False),
        (4, 4, DRAM, 6.0, False, False),
    ])  # fmt: skip
    assert [(run.first, run.pages, run.last_used_s) for run in view.segments(DRAM)] == [(0, 2, 1.0), (8, 4, 6.0)]
    assert [run.first for run in view.segments(DISK)] == [2]
    assert [run.nbytes for run in view.segments(DRAM)] == [2 * PAGE_BYTES, 4 * PAGE_BYTES]


def test_a_segment_that_is_partly_elsewhere_does_not_move() -> None:
    whole = view_of([(0, 3, DRAM, 1.0, False, False), (0, 1, DRAM, 1.0, False, False)])
    whole.pages.tier[1] = LOADING
    assert [run.first for run in whole.segments(DRAM)] == [3]


def test_an_empty_pool_has_no_segments() -> None:
    assert list(view_of([]).segments(DRAM)) == []
    assert Lru().plan(view_of([], needed=PAGE_BYTES)) == []


def test_lru_evicts_the_coldest_first_and_only_as_much_as_is_needed() -> None:
    segments = [(0, 2, DRAM, 30.0, False, False), (1, 2, DRAM, 10.0, False, False), (2, 2, DRAM, 20.0, False, False)]
    for needed, firsts in ((0, []), (1, [2]), (4 << 20, [2]), ((4 << 20) + 1, [2, 4]), (1 << 40, [2, 4, 0])):
        plan = Lru().plan(view_of(segments, needed))
        assert [move.first for move in plan] == firsts
    assert {(move.source, move.target, move.pages) for move in plan} == {(DRAM, DISK, 2)}
    assert plan[0].reason == "unused for 90.0 s"


def test_lru_evicts_the_last_layer_first_among_equals() -> None:
    segments: list[Segment] = [(0, 1, DRAM, 7.0, False, False)] * 4
    assert [move.first for move in Lru().plan(view_of(segments, 2 * PAGE_BYTES))] == [3, 2]


def test_hold_moves_nothing() -> None:
    assert Hold().plan(view_of([(0, 1, DRAM, 1.0, False, False)], needed=1 << 40)) == []


segments_strategy = st.lists(
    st.tuples(
        st.just(0), st.integers(1, 3), st.sampled_from([DRAM, DISK, LOADING]), st.sampled_from([1.0, 2.0, 3.0]),
        st.booleans(), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


@given(segments_strategy, st.integers(0, 20))
def test_lru_never_touches_what_is_held_and_stops_when_it_has_enough(segments: list[Segment], pages: int) -> None:
    plan = Lru().plan(view_of(segments, pages * PAGE_BYTES))
    starts = np.cumsum([0] + [segment[1] for segment in segments]).tolist()
    moved = [segments[starts.index(move.first)] for move in plan]
    assert all(tier == DRAM and not leased and not pinned for _, _, tier, _, leased, pinned in moved)
    assert [move.pages for move in plan] == [segment[1] for segment in moved]
    assert [segment[3] for segment in moved] == sorted(segment[3] for segment in moved)
    freed = sum(move.pages for move in plan)
    free = sum(s[1] for s in segments if s[2] == DRAM and not s[4] and not s[5])
    assert freed >= min(pages, free)
    assert freed - (plan[-1].pages if plan else 0) < max(pages, 1)
