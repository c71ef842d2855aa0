"""Policies of a real daemon, set and watched by a client: live, reloaded when their file changes, and never trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import until
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tiermem import cli
from tiermem.client import Client
from tiermem.errors import CapacityError, ConfigError, ModelNotFound

NEWEST = """
from dataclasses import replace
from tiermem.policy import evictions
class Newest:
    def plan(self, view):
        return [replace(move, reason="{reason}") for move in evictions(view, lambda run: (run.first,))]
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """Room for two of the models."""
    with Daemon("--policy-budget", "5s", tier="dram=8MiB") as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture
def models(tmp_path: Path) -> list[Weights]:
    """Models `m0` to `m3`, two of which fit."""
    return [write_weights(tmp_path / f"m{i}", layers=2, seed=i) for i in range(4)]


def write(path: Path, text: str) -> None:
    """A new version of a file, its time of change included, however soon it follows the one before."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(0, before + 10**9))


def load(client: Client, weights: Weights) -> str:
    return client.load(weights.path)


def migration(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = client.status()["migration"]
    return found


def test_a_policy_is_set_while_the_daemon_runs(client: Client, models: list[Weights], tmp_path: Path) -> None:
    assert (migration(client)["policy"], migration(client)["policy_failure"]) == ("lru", "")
    mine = tmp_path / "mine.py"
    write(mine, "import socket\n" + NEWEST.format(reason="first version"))
    (warning,) = client.set_policy(str(mine))
    assert "line 1: imports socket" in warning
    assert (migration(client)["policy"], migration(client)["policy_warnings"]) == (str(mine), (warning,))
    for weights in models[:3]:
        load(client, weights)
    assert [entry.reason for entry in client.policy_log()] == ["first version"] * 2
    assert {entry.model for entry in client.policy_log()} == {"m1"}, "the policy's choice, not the least recently used"
    write(mine, NEWEST.format(reason="second version"))
    load(client, models[3])
    assert [entry.reason for entry in client.policy_log()] == ["second version"] * 2 + ["first version"] * 2
    assert migration(client)["policy_warnings"] == ()
    assert client.set_policy("lru") == ()
    assert migration(client)["policy"] == "lru"


def test_a_policy_that_fails_is_shown_and_holds_until_it_is_set(
    daemon: Daemon, client: Client, models: list[Weights], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    write(mine, "class Mine:\n    def plan(self, view):\n        return 1 / 0\n")
    client.set_policy(str(mine))
    load(client, models[0])
    load(client, models[1])
    for _ in range(2):
        with pytest.raises(CapacityError, match="held by the policy"):
            load(client, models[2])
    assert "ZeroDivisionError: division by zero, in line 3" in migration(client)["policy_failure"]
    assert (migration(client)["plans"], migration(client)["failures"]) == (1, 1)
    eventually(lambda: "nothing is moved until it is set again" in daemon.log, "the log says so", 10)
    assert daemon.serves(models[0]), "who reads notices nothing"
    client.set_policy("lru")
    assert migration(client)["policy_failure"] == ""
    assert load(client, models[2]) == "m2"


def test_a_file_that_becomes_wrong_holds_and_one_that_is_mended_goes_on(
    client: Client, models: list[Weights], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    write(mine, NEWEST.format(reason="fine"))
    client.set_policy(str(mine))
    load(client, models[0])
    load(client, models[1])
    write(mine, "class Mine:\n    def plan(self view):\n")
    with pytest.raises(CapacityError):
        load(client, models[2])
    assert "SyntaxError" in migration(client)["policy_failure"]
    write(mine, NEWEST.format(reason="mended"))
    assert load(client, models[2]) == "m2"
    assert (migration(client)["policy_failure"], client.policy_log()[0].reason) == ("", "mended")


@pytest.mark.parametrize("name", ["no-such-policy", "/nowhere/mine.py", ""])
def test_an_unknown_policy_leaves_the_old_one(client: Client, models: list[Weights], name: str) -> None:
    with pytest.raises(ConfigError):
        client.set_policy(name)
    assert (migration(client)["policy"], migration(client)["policy_failure"]) == ("lru", "")
    for weights in models[:3]:
        load(client, weights)
    assert client.policy_log()[0].model == "m0"


def test_the_log_is_of_a_model_or_a_page(client: Client, models: list[Weights]) -> None:
    assert client.policy_log() == ()
    for weights in models[:2]:
        load(client, weights)
    assert client.evict("m1") > 0
    entries = client.policy_log("m1")
    assert [(e.first, e.pages, e.source, e.target, e.reason, e.outcome) for e in entries] == [
        (1, 1, "dram", "disk", "asked for", "evicted"), (0, 1, "dram", "disk", "asked for", "evicted")
    ]  # fmt: skip
    assert client.policy_log("m0") == client.policy_log("m1", 7) == ()
    assert client.policy_log("m1", 1) == entries[:1]
    assert client.policy_log(limit=1) == entries[:1]
    for limit in (0, -5):
        assert client.policy_log(limit=limit) == ()
    assert client.policy_log(limit=1 << 40) == entries
    with pytest.raises(ModelNotFound):
        client.policy_log("absent")


def test_no_process_of_a_policy_outlives_it(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    def children() -> set[str]:
        found = Path(f"/proc/{daemon.pid}/task").glob("*/children")
        return {child for path in found for child in path.read_text().split()}

    mine = tmp_path / "mine.py"
    write(mine, NEWEST.format(reason=""))
    assert children() == set()
    client.set_policy(str(mine))
    first = children()
    assert len(first) == 1
    client.set_policy(str(mine))
    assert len(children()) == 1
    assert children() != first
    client.set_policy("hold")
    until(lambda: children() == set())
    client.set_policy(str(mine))
    (left,) = children()
    daemon.kill9()
    until(lambda: not Path(f"/proc/{left}").exists())


def test_the_command_line_sets_a_policy_and_shows_the_log(
    daemon: Daemon, client: Client, models: list[Weights], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.py", NEWEST.format(reason="as I like"))
    address = ["--address", daemon.address]
    assert cli.main(["policy", "set", "mine.py", *address]) == 0
    assert migration(client)["policy"] == str(tmp_path / "mine.py"), "a relative path is the caller's"
    for weights in models[:3]:
        load(client, weights)
    capsys.readouterr()
    assert cli.main(["policy", "log", "--json", *address]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["reason"] for row in report["results"]["entries"]} == {"as I like"}
    assert cli.main(["policy", "set", "absent.py", *address]) == 2
    assert "no such file" in capsys.readouterr().err
    assert migration(client)["policy"] == str(tmp_path / "mine.py")
