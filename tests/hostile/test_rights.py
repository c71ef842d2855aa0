"""Another user's process: neither socket lets it in, nor what is behind them, and nothing on disk is readable."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.integration.child import NOBODY, Child
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights

pytestmark = pytest.mark.root


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """Root's daemon, in a directory that anyone may enter."""
    with Daemon() as daemon:
        daemon.directory.chmod(0o755)
        yield daemon


@pytest.fixture
def weights(daemon: Daemon) -> Weights:
    return write_weights(daemon.directory / "model")


CONNECT = """
import socket
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            say("connected")
        except PermissionError:
            say("denied")
"""

# Says the class and the message of the error that each way in ends with.
ENTER = """
import grpc, secrets
from tiermem.rpc import messages
from tiermem.rpc.channel import Channel
def attempt(act):
    try:
        act()
        say("done")
    except tiermem.TiermemError as error:
        say(f"{type(error).__name__} {error.exit_code} {error}")
address = sys.argv[1]
attempt(lambda: tiermem.connect(address))
attempt(lambda: tiermem.open(sys.argv[2], address=address))
os.environ["TIERMEM_ADDRESS"] = address
attempt(lambda: tiermem.open(sys.argv[2]))
for token in (b"", bytes(16), secrets.token_bytes(16)):
    channel = Channel(address, lambda: token)
    attempt(lambda: channel.call("Status", messages.StatusRequest()))
    attempt(lambda: channel.call("Open", messages.OpenRequest(sys.argv[2])))
    attempt(lambda: next(channel.stream("Attach", messages.AttachRequest(1, 1))))
"""


def test_modes_keep_other_users_out(daemon: Daemon, weights: Weights) -> None:
    for mode in (0o755, 0o700):
        daemon.directory.chmod(mode)
        with Child.script(CONNECT, daemon.socket, f"{daemon.socket}.fd", uid=NOBODY) as child:
            assert [child.line(), child.line()] == ["denied", "denied"]
        with Child.script(ENTER, daemon.address, weights.path, uid=NOBODY) as child:
            for _ in range(3):
                assert child.line().startswith("AccessDenied 5")
            for _ in range(9):
                assert child.line().startswith("DaemonUnreachable")
    with Child(["-m", "tiermem", "status", "--address", daemon.address], uid=NOBODY) as child:
        assert child.exit_code() == 5
        assert "another user's pool" in child.errors


def test_open_sockets_keep_other_users_out(daemon: Daemon, weights: Weights) -> None:
    for ending in ("", ".fd"):
        os.chmod(f"{daemon.socket}{ending}", 0o777)
    with Child.script(CONNECT, daemon.socket, f"{daemon.socket}.fd", uid=NOBODY) as child:
        assert [child.line(), child.line()] == ["connected", "connected"]
    with Child.script(ENTER, daemon.address, weights.path, uid=NOBODY) as child:
        for _ in range(3):
            assert child.line() == "AccessDenied 5 this pool serves user 0, not 65534; start a pool of your own"
        for _ in range(9):
            line = child.line()
            assert line.startswith("SessionUnknown 5 the call carries")
            assert "session token" in line
    assert daemon.status()["models"] == ()
    assert daemon.serves(weights)


def test_files_are_the_owners_alone(daemon: Daemon, weights: Weights) -> None:
    assert daemon.serves(weights)
    daemon.settle()
    files = [path for root in (daemon.state, daemon.digests) for path in (root, *root.rglob("*"))]
    assert len([path for path in files if path.is_file()]) >= 5
    assert [str(path) for path in files if path.lstat().st_mode & 0o077] == []


READER = """
import mmap
model = tiermem.open(sys.argv[1], address=sys.argv[2])
fd = model._holder.descriptors([0])[0]
size = os.fstat(fd).st_size
def attempt(what, act):
    try:
        act()
        say(f"{what}: done")
    except (OSError, ValueError):
        say(f"{what}: refused")
attempt("write", lambda: os.pwrite(fd, b"x", 0))
attempt("cut", lambda: os.ftruncate(fd, 0))
attempt("map", lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
attempt("reopen", lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
array = next(iter(model.values()))
attempt("assign", lambda: array.__setitem__(0, 1))
attempt("unprotect", lambda: array.setflags(write=True))
say(digest_of(model))
"""


@pytest.mark.parametrize("backing", ["shm", "memfd"])
def test_reader_cannot_write_what_others_read(backing: str) -> None:
    with Daemon(ordinary=True, backing=backing) as daemon:
        weights = write_weights(daemon.directory / "model")
        with daemon.client() as client:
            client.load(weights.path)
        daemon.settle()  # a segment is sealed when it is whole
        with Child.script(READER, weights.path, daemon.address, uid=NOBODY) as child:
            for what in ("write", "cut", "map", "reopen", "assign", "unprotect"):
                assert child.line() == f"{what}: refused"
            assert child.line() == weights.digest


def test_root_may_use_an_ordinary_users_daemon() -> None:
    with Daemon(ordinary=True) as daemon:
        assert daemon.serves(write_weights(daemon.directory / "model"))
