"""`tiermem top` against a daemon with a busy client: its numbers are those of the heat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.reader import reader
from tests.integration.weights import Weights, write_weights
from tiermem import cli
from tiermem.client import Client

LAYERS = 4


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    options = ("--sampler", "present", "--sample-epoch", "20ms", "--sample-budget", "100%")
    with Daemon(*options, tier="dram=64MiB") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def weights(daemon: Daemon, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A client read layers 1 and 2 of them, and is gone; another model was never opened by anybody who reads."""
    found = write_weights(tmp_path_factory.mktemp("weights") / "model", layers=LAYERS)
    client.load(write_weights(tmp_path_factory.mktemp("others") / "unread", layers=1).path)

    def seen() -> bool:
        columns = client.heat("model").columns
        return bool(columns.known.all()) and int((columns.rate > 0).sum()) == 2

    with reader(found.path, daemon.address, 1, 2) as child, reader(found.path, daemon.address, writable=True):
        eventually(seen, "both layers were seen")
        eventually(lambda: "writable=False" in "".join(shown(daemon)), "the other client's refusal is shown")
        assert child.alive
    eventually(lambda: daemon.leases() == 0, "the readers are gone")
    return found


def shown(daemon: Daemon) -> list[str]:
    with Child(["-m", "tiermem", "top", "--address", daemon.address]) as top:
        assert top.exit_code() == 0, top.errors
        assert top._process.stdout is not None
        return top._process.stdout.read().decode().splitlines()


def facts(daemon: Daemon, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["top", "--json", "--address", daemon.address, *arguments]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert report["schema"] == "tiermem.top/1"
    return report["results"]


def test_models_as_json(daemon: Daemon, client: Client, weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(daemon, capsys)
    assert set(found) == {"sampling", "models"}
    assert found["sampling"]["rung"] == "present"
    assert found["sampling"]["clients"] == []
    models = {model.pop("name"): model for model in found["models"]}
    rate = client.heat("model").columns.rate
    assert models["model"].pop("touches_per_s") == pytest.approx(float(rate.sum()))
    assert models["model"] == {
        "bytes": LAYERS * 200_000, "pages": LAYERS, "known_pages": LAYERS, "touched_pages": 2, "rungs": ["present"],
    }  # fmt: skip
    assert models["unread"] == {
        "bytes": 200_000, "pages": 1, "known_pages": 0, "touched_pages": 0, "touches_per_s": 0, "rungs": ["declared"],
    }  # fmt: skip


def test_layers_as_json(daemon: Daemon, client: Client, weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    layers = facts(daemon, capsys, "model")["layers"]
    heat = client.heat("model")
    assert [layer["layer"] for layer in layers] == [f"model.layers.{i}" for i in range(LAYERS)]
    for layer, (name, rows) in zip(layers, heat.by_layer(), strict=True):
        assert (layer["layer"], layer["pages"], layer["known_pages"]) == (name, 1, 1)
        assert layer["touches_per_s"] == pytest.approx(float(rows.rate[0]))
        assert 0 <= layer["age_s"] <= float(rows.age_s[0])
    assert [layer["touched_pages"] for layer in layers] == [0, 1, 1, 0]
    (unread,) = facts(daemon, capsys, "unread")["layers"]
    assert (unread["known_pages"], unread["touches_per_s"]) == (0, None)


def test_models_on_screen(daemon: Daemon, weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--once", "--address", daemon.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sampling: present (")
    head = " ".join(" ".join(lines).split())
    assert "pages touched, cost" in head
    assert "of the clients' CPU time" in head
    hot, unknown = (line.rstrip() for line in lines[-2:])
    assert hot.split()[:5] == ["model", "781.2", "KiB", "0", "100%"]
    assert hot.split()[5] == "50%"
    assert hot.endswith("present")
    assert unknown.split()[:6] == ["unread", "195.3", "KiB", "0", "0%", "unknown"]


def test_layers_on_screen(daemon: Daemon, weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--once", "model", "--address", daemon.address]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model.layers.")]
    assert ["#" in row for row in rows] == [False, True, True, False]
    assert [row.split()[2:4] for row in rows] == [["100%", "0%"], ["100%", "100%"], ["100%", "100%"], ["100%", "0%"]]
    assert cli.main(["top", "unread", "--address", daemon.address]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:5] == ["1", "0%", "unknown", "unknown"]


@pytest.mark.parametrize("form", ["--once", "--json"])
def test_no_such_model(daemon: Daemon, weights: Weights, capsys: pytest.CaptureFixture[str], form: str) -> None:
    assert cli.main(["top", "nothing", form, "--address", daemon.address]) == 4
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_an_interval_that_is_none(daemon: Daemon, capsys: pytest.CaptureFixture[str], interval: str) -> None:
    assert cli.main(["top", "--interval", interval, "--address", daemon.address]) == 2
    assert "--interval" in capsys.readouterr().err


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--address", f"unix:{tmp_path}/none"]) == 3
    assert "tiermem serve" in capsys.readouterr().err
