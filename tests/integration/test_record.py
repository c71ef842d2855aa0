"""`tiermem record` as users run it: what is in the file, and what is left where something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.child import NOBODY, Child, eventually, rights_of
from tests.integration.daemon import Daemon
from tests.integration.reader import reader
from tests.integration.weights import Weights, write_weights
from tiermem.observations import Rung
from tiermem.recording import Recording, read

LAYERS = 4
EAGER = ("--sampler", "present", "--sample-epoch", "20ms", "--sample-budget", "100%")

USE = """
import sys, time
import tiermem
with tiermem.connect() as client, client.open(sys.argv[1]) as model:
    array = model["model.layers.2.weight"]
    until = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < until:
        array[::4096].sum()
    del array
print("used", flush=True)
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(*EAGER, tier="dram=64MiB") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return write_weights(tmp_path_factory.mktemp("weights") / "model", layers=LAYERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.tm"


def record(path: Path, address: str, *arguments: object, uid: int | None = None) -> Child:
    command = ["-m", "tiermem", "record", "-o", str(path), "--address", address, *map(str, arguments)]
    return Child(command, uid=uid)


def begun(path: Path, nbytes: int = 1) -> None:
    eventually(lambda: path.exists() and path.stat().st_size >= nbytes, "the recording began", 20)


def recording(child: Child, path: Path) -> Recording:
    """What a recorder that succeeds wrote."""
    assert child.exit_code() == 0, child.errors
    found = read(path)
    assert found.notes == []
    return found


def pages_of_samples(found: Recording) -> set[int]:
    """Of all samples, which must all lie in the only model."""
    assert set(found.resolved.model.tolist()) == {0}
    return set(found.resolved.page.tolist())


def touched_pages(found: Recording) -> set[int]:
    return {int(page) for window in found.windows for page in window.bits.pages[window.bits.touched]}


def test_a_running_client_is_recorded(daemon: Daemon, weights: Weights, path: Path) -> None:
    with (
        reader(weights.path, daemon.address, 0, 3) as child,
        record(path, daemon.address, "--pid", child.pid, "--duration", "1500ms", "--json") as recorder,
    ):
        found = recording(recorder, path)
        results = json.loads(b"".join(iter_lines(recorder)))["results"]
        assert child.alive
    assert (found.end_reason, results["end"]) == ("duration", "duration")
    assert pages_of_samples(found) == {0, 3}
    assert touched_pages(found) == {0, 3}
    assert {window.pid for window in found.windows} == set(found.samples["pid"].tolist()) == {child.pid}
    assert (results["windows"], results["samples"]) == (len(found.windows), len(found.samples))
    assert results["bytes"] == path.stat().st_size
    assert [model.name for model in found.models] == ["model"]
    assert {event.rung for event in found.events} <= {Rung.PRESENT, Rung.PERF}
    assert found.comm(child.pid, child.pid).startswith("python")
    assert any("python" in image.path for image in found.images)
    assert found.header.command is None
    assert path.stat().st_mode & 0o077 == 0


def iter_lines(child: Child) -> Iterator[bytes]:
    """All that an ended child printed."""
    assert child._process.stdout is not None
    yield child._process.stdout.read()


def test_a_command_without_a_daemon_gets_a_pool_of_its_own(weights: Weights, path: Path, tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("tiermem-record-*"))
    nowhere = f"unix:{tmp_path}/none"
    arguments = ["--epoch", "20ms", "--budget", "100%", "--", sys.executable, "-c", USE, weights.path, 1.5, 0]
    with record(path, nowhere, *arguments) as recorder:
        assert recorder.line() == "used"
        begun(path)
        found = recording(recorder, path)
        assert f"samples of {sys.executable}" in recorder.errors
        assert f"{path}: " in recorder.line()
    assert found.header.command is not None
    assert found.header.command[:2] == (sys.executable, "-c")
    assert found.end_reason == "the process ended"
    assert pages_of_samples(found) == {2}
    assert touched_pages(found) <= {2}
    assert [frame["kind"] for frame in found.opens] == ["open", "release"]
    (pid,) = {frame["pid"] for frame in found.opens}
    assert set(found.samples["pid"].tolist()) == {pid}
    assert set(Path("/tmp").glob("tiermem-record-*")) == before
    assert not daemons_in(recorder.pid)


def daemons_in(session: int) -> list[int]:
    """Living processes that `tiermem record` started to serve."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"tiermem-record-" in arguments and state[0] != "Z" and int(state[1]) == session:
            found.append(int(entry.name))
    return found


def test_a_command_that_fails_is_told_and_recorded(daemon: Daemon, path: Path) -> None:
    with record(path, daemon.address, "--", "sh", "-c", "exit 7") as recorder:
        assert recorder.exit_code() == 1
        assert "sh ended with exit code 7; what it did until then is recorded" in recorder.errors
    assert read(path).end_reason == "the process ended"


def test_ending_the_recorder_ends_its_command_and_its_pool(path: Path, tmp_path: Path) -> None:
    with record(path, f"unix:{tmp_path}/none", "--", "sh", "-c", "echo $$; exec sleep 60") as recorder:
        command = int(recorder.line())
        (pool,) = daemons_in(recorder.pid)
        recorder.signal(signal.SIGTERM)
        assert recording(recorder, path).end_reason == "interrupted"
        assert not living(command)
        assert not living(pool)


def test_a_command_that_is_no_program(daemon: Daemon, path: Path) -> None:
    with record(path, daemon.address, "--", "no-such-program") as recorder:
        assert recorder.exit_code() == 2
        assert "no-such-program: there is no such program; nothing was recorded" in recorder.errors
    assert not path.exists()


def test_a_command_ends_with_the_duration(daemon: Daemon, path: Path) -> None:
    with record(path, daemon.address, "--duration", "300ms", "--", "sleep", "60") as recorder:
        assert recording(recorder, path).end_reason == "duration"


def test_a_command_has_no_descriptor_of_ours(daemon: Daemon, path: Path) -> None:
    with record(path, daemon.address, "--", "ls", "/proc/self/fd") as recorder:
        assert recorder.exit_code() == 0
        # 3 is the directory that ls reads.
        assert [recorder.line() for _ in range(4)] == ["0", "1", "2", "3"]
        assert recorder.line().startswith(str(path))


def test_interrupting_ends_the_recording_and_not_its_subject(daemon: Daemon, weights: Weights, path: Path) -> None:
    with (
        reader(weights.path, daemon.address, 1) as child,
        record(path, daemon.address, "--pid", child.pid) as recorder,
    ):
        begun(path, 20_000)
        recorder.signal(signal.SIGINT)
        found = recording(recorder, path)
        assert child.alive
    assert found.end_reason == "interrupted"
    assert touched_pages(found) <= {1}


def test_the_end_of_its_subject_ends_the_recording(daemon: Daemon, weights: Weights, path: Path) -> None:
    with (
        reader(weights.path, daemon.address, 1) as child,
        record(path, daemon.address, "--pid", child.pid) as recorder,
    ):
        begun(path, 20_000)
        child.kill9()
        found = recording(recorder, path)
    assert found.end_reason == "the process ended"
    assert [frame["kind"] for frame in found.opens] == ["open", "release"]


def test_the_end_of_the_pool_ends_the_recording(weights: Weights, path: Path) -> None:
    with Daemon() as daemon, record(path, daemon.address) as recorder:
        begun(path)
        eventually(lambda: len(read(path).models) == 0 and read(path).header is not None, "it watches")
        daemon.terminate()
        assert recording(recorder, path).end_reason == "the pool ended"


def test_a_recorder_that_is_killed_leaves_a_file_that_is_read_and_no_pool(
    weights: Weights, path: Path, tmp_path: Path
) -> None:
    arguments = ["--epoch", "20ms", "--budget", "100%", "--", sys.executable, "-c", USE, weights.path, 1.5, 0]
    with record(path, f"unix:{tmp_path}/none", *arguments) as recorder:
        eventually(lambda: path.exists() and bool(read(path).windows), "windows are in the file", 20)
        (pool,) = daemons_in(recorder.pid)
        arguments = Path(f"/proc/{pool}/cmdline").read_text().split("\0")
        directory = Path(arguments[arguments.index("--state") + 1]).parent
        recorder.kill9()
        found = read(path)
        assert found.end_reason is None
        assert any("killed" in note for note in found.notes)
        assert found.windows
        eventually(lambda: not living(pool), "the recorder's pool ended with it")
        assert not list(directory.glob("pool/segments/*")), "and gave its memory back"
        shutil.rmtree(directory)
        assert recorder.line() == "used", "the command went on"


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for four pages of 4 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.root
def test_a_full_disk_ends_the_recording_and_not_the_process(daemon: Daemon, weights: Weights, small_disk: Path) -> None:
    path = small_disk / "run.tm"
    with (
        reader(weights.path, daemon.address, 1, 2) as child,
        record(path, daemon.address, "--pid", child.pid, "--epoch", "10ms") as recorder,
    ):
        assert recorder.exit_code() == 1
        assert f"error: {path}: No space left on device; the recording ends at " in recorder.errors
        assert "Traceback" not in recorder.errors
        assert child.alive
        child.say("close")
    assert read(path).end_reason in ("failed", None)


@pytest.mark.root
def test_a_command_goes_on_where_the_disk_is_full(daemon: Daemon, weights: Weights, small_disk: Path) -> None:
    with record(
        small_disk / "run.tm", daemon.address, "--", sys.executable, "-c", USE, weights.path, 1.8, 0
    ) as recorder:
        assert recorder.line() == "used"
        assert recorder.exit_code() == 1
        assert f"nothing more is recorded; {sys.executable} goes on" in recorder.errors
        assert "No space left on device; the recording ends" in recorder.errors
    read(small_disk / "run.tm")


@pytest.mark.root
def test_a_disk_without_any_room(daemon: Daemon, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(16 << 10))
    with record(small_disk / "run.tm", daemon.address) as recorder:
        assert recorder.exit_code() == 1
        assert f"No space left on device: '{small_disk}/run.tm'" in recorder.errors
        assert "Traceback" not in recorder.errors


def test_a_file_that_cannot_be_made(daemon: Daemon, path: Path) -> None:
    with record(path / "below" / "nothing", daemon.address) as recorder:
        assert recorder.exit_code() == 1
        assert f"No such file or directory: '{path}/below/nothing'" in recorder.errors


def test_no_such_process(daemon: Daemon, path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with record(path, daemon.address, "--pid", gone.pid) as recorder:
        assert recorder.exit_code() == 1
        assert str(gone.pid) in recorder.errors
        assert "Traceback" not in recorder.errors
    assert read(path).end_reason == "failed"


@pytest.mark.root
def test_another_users_process_is_refused() -> None:
    rights_of(NOBODY)
    with Daemon(ordinary=True) as daemon:
        path = daemon.directory / "run.tm"
        with record(path, daemon.address, "--pid", os.getpid(), uid=NOBODY) as recorder:
            assert recorder.exit_code() == 1
            assert str(os.getpid()) in recorder.errors
            assert "Traceback" not in recorder.errors
        assert read(path).end_reason == "failed"


def test_without_a_pool_and_without_a_command_there_is_nothing_to_record(path: Path, tmp_path: Path) -> None:
    with record(path, f"unix:{tmp_path}/none") as recorder:
        assert recorder.exit_code() == 3
        assert "start one with tiermem serve, or record a command" in recorder.errors
    assert not path.exists()


WRONG: dict[str, list[Any]] = {
    "--pid": ["--pid", 1, "--", "true"],
    "--duration": ["--duration", "soon"],
    "--epoch": ["--epoch", "1us"],
    "--budget": ["--budget", "200%"],
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_usage_is_named(daemon: Daemon, path: Path, flag: str) -> None:
    with record(path, daemon.address, *WRONG[flag]) as recorder:
        assert recorder.exit_code() == 2
        assert flag.removeprefix("--") in recorder.errors
    assert not path.exists()


def test_a_process_that_closes_and_opens_is_told_apart(daemon: Daemon, weights: Weights, path: Path) -> None:
    with record(path, daemon.address, "--", sys.executable, "-c", f"{TWICE}", weights.path) as recorder:
        found = recording(recorder, path)
    assert sorted(frame["kind"] for frame in found.opens) == ["open", "open", "release", "release"]
    resolved = found.resolved
    pages = resolved.page[np.argsort(found.samples["time"], kind="stable")]
    assert set(pages.tolist()) <= {0, 1}
    assert (np.diff(pages[resolved.model >= 0]) >= 0).all(), "first layer 0, then layer 1"


TWICE = """
import sys, time
import tiermem
with tiermem.connect() as client:
    for layer in range(2):
        with client.open(sys.argv[1]) as model:
            array = model[f"model.layers.{layer}.weight"]
            for _ in range(100):
                array[::4096].sum()
                time.sleep(0.002)
            del array
"""
