"""Starting a daemon where it cannot or must not run: it says why, ends with the right code, and harms nothing there."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiermem
from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tiermem.errors import ConfigError, DaemonUnreachable


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return write_weights(tmp_path / "model")


@pytest.fixture
def fresh() -> Iterator[Daemon]:
    """A daemon that is not started."""
    with Daemon(start=False) as daemon:
        daemon.state.mkdir()
        yield daemon


def outcome(daemon: Daemon, *options: str) -> tuple[int, str]:
    """Exit code and stderr of a daemon that does not come to serve."""
    with daemon.spawn(*options) as child:
        return child.exit_code(), child.errors


@pytest.mark.parametrize("shared", ["address", "state"])
def test_second_daemon_is_refused_and_the_first_unharmed(weights: Weights, shared: str) -> None:
    with Daemon() as first, Daemon(start=False) as second:
        assert first.serves(weights)
        options = {"address": ["--address", first.address], "state": ["--state", str(first.state)]}[shared]
        code, errors = outcome(second, *options)
        assert code == 5
        assert f"served by process {first.pid} already" in errors
        assert first.leftovers
        assert second.leftovers == []
        assert first.serves(weights)
        assert first.terminate() == 0
        first.start()
        assert first.serves(weights)


def test_sockets_of_a_killed_daemon_are_replaced(weights: Weights) -> None:
    with Daemon() as daemon:
        sockets = [daemon.socket, Path(f"{daemon.socket}.fd")]
        daemon.kill9()
        assert all(path.is_socket() for path in sockets)
        daemon.start()
        assert [path.stat().st_mode & 0o077 for path in sockets] == [0, 0]
        assert daemon.serves(weights)


@pytest.mark.parametrize("ending", ["", ".fd"])
@pytest.mark.parametrize("there", ["file", "directory", "link", "listener"])
def test_what_lies_at_the_socket_path_is_left_alone(fresh: Daemon, there: str, ending: str) -> None:
    path = Path(f"{fresh.socket}{ending}")
    other = fresh.directory / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        if there == "file":
            path.write_text("mine")
        elif there == "directory":
            path.mkdir()
        elif there == "link":
            other.write_text("mine")
            path.symlink_to(other)
        else:
            listener.bind(str(path))
            listener.listen()
        before = path.lstat()
        code, errors = outcome(fresh)
        assert code == 5
        assert str(path) in errors
        assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        if there == "listener":
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        elif there in ("file", "link"):
            assert path.read_text() == "mine"
        # It had made its pool before it came to the sockets.
        assert [left for left in fresh.leftovers if not left.startswith(str(fresh.socket))] == []


def test_path_that_is_too_long_for_a_socket_is_named(fresh: Daemon) -> None:
    path = fresh.directory / ("x" * 100)
    code, errors = outcome(fresh, "--address", f"unix:{path}")
    assert code == 2
    assert "a Unix socket's may be 107" in errors
    with pytest.raises(ConfigError, match="a Unix socket's may be 107"):
        tiermem.connect(f"unix:{path}")


def test_other_hosts_are_refused(fresh: Daemon) -> None:
    code, errors = outcome(fresh, "--address", "localhost:7000")
    assert code == 2
    assert "Unix sockets only" in errors
    with pytest.raises(ConfigError, match="Unix sockets only"):
        tiermem.connect("localhost:7000")


@pytest.mark.parametrize("there", [False, True])
def test_nobody_there_is_unreachable(fresh: Daemon, there: bool) -> None:
    if there:
        # Stale sockets answer nobody.
        for ending in ("", ".fd"):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(f"{fresh.socket}{ending}")
    with Child(["-m", "tiermem", "status", "--address", fresh.address]) as child:
        assert child.exit_code() == 3
        assert "start it with: tiermem serve" in child.errors
    with pytest.raises(DaemonUnreachable, match="start it with: tiermem serve"):
        tiermem.connect(fresh.address)


@pytest.mark.root
@pytest.mark.parametrize("owned", ["socket", "state", "segments"])
def test_directory_of_another_user_is_refused(owned: str) -> None:
    with Daemon(start=False, ordinary=True, backing="shm") as daemon:
        forbidden = daemon.directory / "root"
        forbidden.mkdir(mode=0o755)
        place = ["--address", f"unix:{forbidden}/s"] if owned == "socket" else ["--state", str(forbidden / "state")]
        if owned == "segments":
            # Somebody was faster to make the directory that the pool would use in /dev/shm.
            place = []
            daemon.shm.mkdir(mode=0o777)
        code, errors = outcome(daemon, *place)
        assert code == (5 if owned == "segments" else 2)
        assert "belongs to another user" in errors if owned == "segments" else "Permission denied" in errors
        assert "--state" in errors
        assert list(forbidden.iterdir()) == []


def test_full_state_directory_is_refused_at_once(fresh: Daemon) -> None:
    shutil.rmtree(fresh.state)
    fresh.state.write_text("a file")
    code, errors = outcome(fresh)
    assert code == 2
    assert str(fresh.state) in errors


def test_terminated_while_it_starts_leaves_nothing(fresh: Daemon) -> None:
    with fresh.spawn() as child:
        eventually(lambda: fresh.leftovers != [], "it makes its pool", 10)
        for _ in range(2):
            child.signal(signal.SIGTERM)
        assert child.exit_code() == 0
    assert fresh.leftovers == []
