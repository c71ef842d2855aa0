"""Loading policies: from files, by name, and what is said of a file that is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tiermem.errors import ConfigError
from tiermem.policies.hold import Hold
from tiermem.policies.lru import Lru
from tiermem.policy import load_policy
from tiermem.policy.sample import sample_view
from tiermem.policy.source import is_file, seconds_of, warnings_of

GOOD = "class Mine:\n    def plan(self, view):\n        return []\n"


def test_a_policy_is_loaded_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tiermem.policy import Plan, View\n" + GOOD)
    policy = load_policy(str(tmp_path / "mine.py"))
    assert type(policy).__name__ == "Mine"
    assert policy.plan(sample_view(10)) == []
    assert (seconds_of(policy, "period_s", "mine"), seconds_of(policy, "guard_s", "mine")) == (1.0, 10.0)


def test_shipped_policies_are_loaded_by_name() -> None:
    assert isinstance(load_policy("lru"), Lru)
    assert isinstance(load_policy("hold"), Hold)


def test_a_file_is_known_by_its_ending() -> None:
    assert [name for name in ("lru", "mine.py", "./a/b.py", "py", "", ".py.txt") if is_file(name)] == [
        "mine.py", "./a/b.py",
    ]  # fmt: skip


def test_a_policy_may_keep_its_state_in_a_dataclass(tmp_path: Path) -> None:
    """Dataclasses look for their module in sys.modules where annotations are postponed."""
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\n"
    (tmp_path / "mine.py").write_text(head + GOOD.replace("class Mine:\n", "class Mine:\n    tries: int = 3\n\n"))
    assert load_policy(str(tmp_path / "mine.py")).tries == 3  # type: ignore[attr-defined]


def test_loading_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(sys.modules)
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text("1 / 0\n")
    load_policy(str(tmp_path / "mine.py"))
    with pytest.raises(ConfigError):
        load_policy(str(tmp_path / "bad.py"))
    assert set(sys.modules) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.py", "mine.py"]


def test_a_file_is_read_again_each_time(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for period_s in (0.25, 0.5):
        path.write_text(GOOD + f"    period_s = {period_s}\n")
        assert seconds_of(load_policy(str(path)), "period_s", "mine") == period_s


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
        (GOOD + "    def place(self, view): pass\n", r"place\(self, view\) must be place\(self, request\)"),
        (GOOD + "    place = 7\n", r"place must be a method place\(self, request\)"),
        ("import no_such_module_at_all\n" + GOOD, "importing it raised ModuleNotFoundError: .*, in line 1"),
        ("\n\n1 / 0\n" + GOOD, "importing it raised ZeroDivisionError: .*, in line 3"),
        ("def f():\n    raise OSError\nf()\n", "importing it raised OSError, in line 2"),
        ("x = 1\ndef (\n", "importing it raised SyntaxError: .*, in line 2"),
        ("\x00", "importing it raised (SyntaxError|ValueError)"),
        ("import sys\nsys.exit()\n", r"importing it called sys.exit\(\), in line 2"),
        (
            GOOD + "    def __init__(self):\n        raise ValueError('no')\n",
            r"Mine\(\) raised ValueError: no, in line 5",
        ),
        (GOOD + "    def __init__(self, size):\n        pass\n", r"Mine\(\) raised TypeError"),
        (GOOD + "    period_s = 0\n", r"period_s = 0 must be seconds from 0.01 to 3600"),
        (GOOD + "    period_s = 3601\n", r"period_s = 3601 must be seconds from 0.01 to 3600"),
        (GOOD + "    period_s = True\n", r"period_s = True must be"),
        (GOOD + "    period_s = '1s'\n", r"period_s = '1s' must be"),
        (GOOD + "    guard_s = -1\n", r"guard_s = -1 must be seconds from 0 to 3600"),
        (GOOD + "    guard_s = float('nan')\n", r"guard_s = nan must be"),
        (GOOD + "    guard_s = float('inf')\n", r"guard_s = inf must be"),
    ],
)
def test_a_bad_policy_file_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_policy(str(tmp_path / "mine.py"))
    assert str(tmp_path / "mine.py") in str(caught.value)


def test_a_policy_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "directory.py").mkdir()
    for name in ("absent.py", "directory.py"):
        with pytest.raises(ConfigError, match=f"{name}: no such file"):
            load_policy(str(tmp_path / name))


@pytest.mark.parametrize("name", ["fifo", "LRU", "", ".", "a b", "../lru", "lru.Lru", "\0", "__init__"])
def test_an_unknown_name_lists_the_shipped_policies(name: str) -> None:
    with pytest.raises(ConfigError, match=r"shipped one \(.*hold, .*lru.*\)"):
        load_policy(name)


def test_unexpected_imports_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    expected = (
        "import numpy.typing\nfrom collections.abc import Iterator\nfrom tiermem import types\nimport heapq, enum\n"
    )
    path.write_text(expected + "import os, re\nfrom tiermem import pool\nfrom . import x\nimport tiermem.policyx\n")
    assert [text.removesuffix("; a plan needs no more than its view") for text in warnings_of(str(path))] == [
        "line 5: imports os", "line 5: imports re", "line 6: imports tiermem.pool", "line 7: imports .",
        "line 8: imports tiermem.policyx",
    ]  # fmt: skip
    path.write_text(expected)
    assert warnings_of(str(path)) == []
    path.write_text("def (\n")
    assert warnings_of(str(path)) == []
