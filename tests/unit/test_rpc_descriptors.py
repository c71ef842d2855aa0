"""Descriptor socket: descriptors arrive and read the same bytes; strangers, garbage and silence hurt nobody else."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.conftest import open_files
from tiermem import errors
from tiermem.rpc import codec, descriptors, frames
from tiermem.rpc.descriptors import DescriptorClient, DescriptorServer
from tiermem.rpc.messages import DescriptorHello, DescriptorReply, DescriptorRequest, DescriptorWelcome


class Served:
    """A server on a thread. Segment i of any lease but `none` is a file that holds the text i."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = f"{directory}/fd"
        self.sessions: list[tuple[int, int]] = []
        self.left = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server: DescriptorServer[int] = DescriptorServer(self.on_connect, self.lookup, self.on_disconnect)
        self.run(lambda: self.server.start(self.path))

    def on_connect(self, pid: int, uid: int) -> tuple[bytes, int]:
        self.sessions.append((pid, uid))
        return b"token%d" % len(self.sessions), len(self.sessions)

    def lookup(self, session: int, lease_id: str, indices: Sequence[int]) -> list[int]:
        if lease_id == "none":
            raise errors.AccessDenied(f"session {session} has no lease none")
        if lease_id == "defect":
            raise OSError("secret")
        if lease_id == "two" and indices[0] >= frames.MAX_DESCRIPTORS:
            raise errors.Refused("no more")
        return [self._segment(index) for index in indices]

    def on_disconnect(self, session: int) -> None:
        self.left.set()

    def run(self, work: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    def close(self) -> None:
        self.run(self.server.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _segment(self, index: int) -> int:
        path = Path(self.directory, f"segment{index}")
        path.write_text(str(index))
        return os.open(path, os.O_RDONLY)


@pytest.fixture
def served() -> Iterator[Served]:
    directory = tempfile.mkdtemp()
    served = Served(directory)
    yield served
    served.close()
    assert not os.path.exists(served.path)
    shutil.rmtree(directory)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds within 10 s: the other end closes its descriptors a moment after ours has an answer."""
    deadline = time.monotonic() + 10
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def raw(served: Served) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(served.path)
    return connection


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def read_frame(connection: socket.socket) -> Any:
    header = connection.recv(4, socket.MSG_WAITALL)
    if not header:
        return None
    (length,) = struct.unpack("<I", header)
    return msgpack.unpackb(connection.recv(length, socket.MSG_WAITALL))


HELLO = frame(codec.encode(DescriptorHello(1)))


def test_the_socket_is_its_owners_alone(served: Served) -> None:
    assert stat.S_IMODE(os.stat(served.path).st_mode) == 0o600


def test_the_pool_learns_who_connects_and_when_they_leave(served: Served) -> None:
    client = DescriptorClient(served.path)
    assert client.token == b"token1"
    assert served.sessions == [(os.getpid(), os.geteuid())]
    assert not served.left.is_set()
    client.close()
    assert served.left.wait(1)


@pytest.mark.parametrize("count", [1, 200, 201, 500])
def test_descriptors_read_the_segments_they_were_asked_for(served: Served, count: int) -> None:
    client = DescriptorClient(served.path)
    before = len(open_files())
    fds = client.fetch("lease", range(7, 7 + count))
    assert eventually(lambda: len(open_files()) == before + count), "the server must close its own"
    assert sorted(fds) == list(range(7, 7 + count))
    for index, fd in fds.items():
        assert os.pread(fd, 10, 0) == str(index).encode()
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fd)
    assert client.fetch("lease", []) == {}
    client.close()


def test_an_error_answers_one_request_and_leaks_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    client = DescriptorClient(served.path)
    before = open_files()
    with pytest.raises(errors.AccessDenied, match="session 1 has no lease none"):
        client.fetch("none", [1])
    with pytest.raises(errors.Refused, match="no more"):
        client.fetch("two", range(250))
    assert eventually(lambda: open_files() == before)
    (fd,) = client.fetch("lease", [3]).values()
    os.close(fd)
    with pytest.raises(errors.TiermemError, match="the pool failed: OSError") as caught:
        client.fetch("defect", [1])
    assert "secret" not in str(caught.value)
    assert "OSError: secret" in caplog.text
    client.close()


def test_threads_share_a_client(served: Served) -> None:
    client = DescriptorClient(served.path)
    failures: list[object] = []

    def fetch(index: int) -> None:
        for _ in range(20):
            for found, fd in client.fetch("lease", [index, index + 1]).items():
                if os.pread(fd, 10, 0) != str(found).encode() or found not in (index, index + 1):
                    failures.append(found)
                os.close(fd)

    threads = [threading.Thread(target=fetch, args=(10 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    client.close()


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (frame(b"\xc1"), "DescriptorHello is not msgpack"),
        (frame(msgpack.packb({"protocol": True})), "DescriptorHello.protocol is bool"),
        (frame(msgpack.packb({"protocol": 2})), "client speaks protocol 2, the pool 1"),
        (struct.pack("<I", (1 << 20) + 1), "a frame of 1048577 bytes"),
        (b"GET / HTTP/1.1\r\n", "a frame of"),
        (HELLO + frame(b"junk"), "DescriptorRequest is not msgpack"),
        (HELLO + frame(msgpack.packb({"lease_id": "l", "segments": []})), "segments is empty"),
    ],
)
def test_garbage_ends_its_own_connection_after_an_error_frame(served: Served, sent: bytes, complaint: str) -> None:
    other = DescriptorClient(served.path)
    connection = raw(served)
    connection.sendall(sent)
    answers: list[Any] = []
    with suppress(ConnectionResetError):
        while (answer := read_frame(connection)) is not None:
            answers.append(answer)
    assert answers[-1]["error"]["code"] == "protocol"
    assert complaint in answers[-1]["error"]["message"]
    connection.close()
    os.close(other.fetch("lease", [1])[1])
    other.close()


def test_half_a_frame_then_silence_keeps_nobody_waiting(served: Served) -> None:
    silent = [raw(served) for _ in range(3)]
    silent[0].sendall(HELLO[:3])
    silent[1].sendall(HELLO[:6])
    silent[2].sendall(HELLO + b"\xff\x00")
    began = time.monotonic()
    client = DescriptorClient(served.path)
    os.close(client.fetch("lease", [1])[1])
    assert time.monotonic() - began < 1
    client.close()
    for connection in silent:
        connection.close()


def test_who_says_no_hello_is_told_and_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "HELLO_TIMEOUT_S", 0.1)
    connection = raw(served)
    connection.sendall(HELLO[:5])
    assert read_frame(connection)["error"]["code"] == "deadline"
    assert served.sessions == []
    connection.close()


def test_a_client_that_never_reads_is_cut_off_and_blocks_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "SEND_TIMEOUT_S", 0.3)
    greedy = raw(served)
    greedy.sendall(HELLO)
    request = frame(codec.encode(DescriptorRequest("lease", (1,))))
    before = open_descriptors()
    greedy.settimeout(0.2)
    with suppress(TimeoutError):
        while True:
            greedy.sendall(request)
    client = DescriptorClient(served.path)
    os.close(client.fetch("lease", [1])[1])
    client.close()
    assert served.left.wait(2)
    greedy.close()
    assert eventually(lambda: open_descriptors() < before), "the greedy connection and its descriptors are closed"


def test_one_client_too_many_is_refused_until_another_leaves(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MAX_CONNECTIONS", 1)
    first = DescriptorClient(served.path)
    with pytest.raises(errors.Refused, match="takes no more"):
        DescriptorClient(served.path)
    first.close()
    assert eventually(lambda: admitted(served))


def admitted(served: Served) -> bool:
    with suppress(errors.Refused):
        DescriptorClient(served.path).close()
        return True
    return False


def as_nobody(work: Callable[[], None]) -> str:
    """The error code that `work` raises in a child process of user 65534."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            work()
            os.write(writer, b"nothing was raised")
        except errors.TiermemError as error:
            os.write(writer, error.code.encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_another_user_is_refused_by_the_file_and_by_the_pool(served: Served, mode: int) -> None:
    os.chmod(served.directory, 0o755)
    os.chmod(served.path, mode)
    assert as_nobody(lambda: DescriptorClient(served.path).close()) == "access-denied"
    assert served.sessions == []


def test_a_dead_pools_socket_is_replaced_and_a_living_ones_is_not(served: Served, tmp_path: Path) -> None:
    second: DescriptorServer[int] = DescriptorServer(served.on_connect, served.lookup, served.on_disconnect)
    with pytest.raises(errors.Refused, match="a pool already listens"):
        served.run(lambda: second.start(served.path))
    stale = str(tmp_path / "fd")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(stale)
    served.run(lambda: second.start(stale))
    DescriptorClient(stale).close()
    served.run(second.stop)
    Path(stale).write_text("precious")
    with pytest.raises(errors.Refused, match="is not a socket"):
        served.run(lambda: second.start(stale))
    assert Path(stale).read_text() == "precious"
    with pytest.raises(errors.Refused, match="cannot listen at"):
        served.run(lambda: second.start("/" + "x" * 200))


def test_no_pool_is_unreachable_with_advice(tmp_path: Path) -> None:
    with pytest.raises(errors.DaemonUnreachable, match=r"No such file.*tiermem serve"):
        DescriptorClient(str(tmp_path / "none"))


class FakeServer:
    """Plays the pool's end: says welcome, then answers each request with the next prepared (bytes, descriptors)."""

    def __init__(self, path: str, answers: list[tuple[bytes, list[int]]]) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            read_frame(connection)
            connection.sendall(frame(codec.encode(DescriptorWelcome(b"t"))))
            read_frame(connection)
            for data, fds in self._answers:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                connection.sendmsg([data], [rights] if fds else [])
            with suppress(ConnectionResetError):  # the client leaves without reading the rest
                connection.recv(1)

    def join(self) -> None:
        self._thread.join(10)


def reply(*segments: int) -> bytes:
    return frame(codec.encode(DescriptorReply(segments)))


@pytest.mark.parametrize(
    ("answers", "kind", "complaint"),
    [
        ([(reply(1, 2), [0])], errors.ProtocolError, "1 descriptors came as segments"),
        ([(reply(1), [0, 0])], errors.ProtocolError, "2 descriptors came as segments"),
        ([(reply(1, 1), [0, 0])], errors.ProtocolError, "2 descriptors came as segments"),
        ([(reply(1), [0]), (reply(1), [0])], errors.ProtocolError, "1 descriptors came as segments"),
        ([(reply(9), [0])], errors.ProtocolError, "1 descriptors came as segments"),
        ([(reply(), [])], errors.ProtocolError, "neither descriptors nor an error"),
        ([(reply(*range(201)), [0] * 201)], errors.ProtocolError, "descriptors were lost"),
        ([(frame(b"junk"), [0, 0])], errors.ProtocolError, "DescriptorReply is not msgpack"),
        ([(reply(1), [0]), (reply(2)[:3], [0])], errors.DeadlineExceeded, "no answer within 0.3 s"),
    ],
)
def test_a_broken_answer_ends_the_connection_and_leaks_no_descriptor(
    tmp_path: Path, answers: list[tuple[bytes, list[int]]], kind: type[errors.TiermemError], complaint: str
) -> None:
    path = str(tmp_path / "fd")
    server = FakeServer(path, answers)
    client = DescriptorClient(path, timeout_s=0.3)
    before = open_descriptors()
    with pytest.raises(kind, match=complaint):
        client.fetch("lease", [1, 2])
    server.join()
    assert eventually(lambda: open_descriptors() <= before - 2), "both ends are closed, and all that came"
    with pytest.raises(errors.Closed, match="connect again"):
        client.fetch("lease", [1, 2])
