"""`tiermem policy check`: the checks that a policy gets, the table, the JSON and the exit code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tiermem.cli.policy import command
from tiermem.errors import ConfigError
from tiermem.policies.lru import Lru
from tiermem.policy import check_plan, load_policy
from tiermem.policy.probe import cases, requests, steps
from tiermem.policy.sample import sample_view, with_device
from tiermem.types import PAGE_BYTES

GOOD = (
    "from tiermem.policy import evictions\n\nclass Mine:\n    def plan(self, view):\n        return evictions(view)\n"
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["check", *arguments])


def test_a_good_policy_passes_every_check() -> None:
    made = [check() for _, check in steps(Lru(), "", 1000)]
    assert [check.name for check in made if check.result != "ok"] == []
    assert len(made) == len(cases()) + 3


def test_the_views_are_what_their_names_say() -> None:
    found = dict(cases())
    assert [len(views) for views in found.values()] == [1, 1, 2, 1, 1, 1, 1, 3, 5]
    (view,) = found["nothing known"]
    assert not view.pages.known.any()
    assert view.tiers[0].latency_s != view.tiers[0].latency_s
    times = [view.now_s for view in found["time stands still and goes back"]]
    assert times[0] == times[1] > times[2]
    (view,) = found["one memory tier, full, and a load waits"]
    assert view.tiers[0].free_bytes == 0 < view.needed_bytes
    assert [len(view.models) for view in found["models come and go"]] == [3, 5, 2, 0, 5]
    assert [len(request) for _, request in requests()] == [0, 200, 3000]


def test_the_table(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import socket\n" + GOOD)
    result = run(str(tmp_path / "mine.py"), "--pages", "1000")
    assert result.exit_code == 0, result.output
    assert "mine.py:1" in result.output
    assert "time for 1,000 pages" in result.output


def test_json_and_exit_code_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(GOOD + "    def place(self, request):\n        return [0] * len(request)\n")
    result = run(str(path), "--pages", "1000", "--json")
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["schema"] == "tiermem.policy-check/1"
    failed = [check for check in told["results"]["checks"] if check["result"] == "failed"]
    assert [check["name"] for check in failed] == ["place: a model that fits", "place: more than fits"]
    assert "which has room for" in failed[0]["detail"]
    assert (told["results"]["failed"], told["results"]["pages"], told["results"]["file"]) == (2, 1000, str(path))


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        command.main(["check", str(tmp_path / "mine.py")], standalone_mode=False)
    assert caught.value.exit_code == 2


def test_the_manuals_policy_of_devices_copies_the_hottest_pages(tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs/policy.md").read_text()
    (example,) = [part.split("```")[0] for part in manual.split("```python\n") if "class Hottest" in part]
    (tmp_path / "hottest.py").write_text(example)
    result = run(str(tmp_path / "hottest.py"), "--pages", "100000", "--json")
    assert [check for check in json.loads(result.output)["results"]["checks"] if check["result"] != "ok"] == []
    places, policy = 100, load_policy(str(tmp_path / "hottest.py"))
    view = with_device(sample_view(3000, 1), places)
    for _ in range(4):  # a plan changes so many pages at most, and those with a copy must be worth much less
        copied = view.pages.replicas.copy()
        for move in check_plan(view, policy.plan(view)):
            assert (move.kind, 0 in (move.source, move.target)) == ("copy" if move.target == 0 else "drop", True)
            assert "times a second" in move.reason
            copied[move.first : move.first + move.pages] = move.kind == "copy"
        tiers = (replace(view.tiers[0], used_bytes=int(copied.sum()) * PAGE_BYTES), *view.tiers[1:])
        view = replace(view, tiers=tiers, pages=replace(view.pages, replicas=copied))
    rate = np.where(view.pages.leased & view.movable, np.nan_to_num(view.pages.rate), 0)
    assert copied.sum() == places
    assert rate[copied > 0].min() * 1.2 >= np.sort(rate)[-places], "what is not there is not read much more"


def test_the_example_of_the_manual_passes(tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs/policy.md").read_text()
    example = manual.split("```python\n")[1].split("```")[0]
    (tmp_path / "busy.py").write_text(example)
    result = run(str(tmp_path / "busy.py"), "--pages", "100000", "--json")
    checks = json.loads(result.output)["results"]["checks"]
    assert [check for check in checks if check["result"] != "ok"] == []
    moved = [check["detail"] for check in checks if check["name"] == "plan: two memory tiers and disk"]
    assert moved != ["0 moves"]
