"""Connections that say nothing, or nonsense, or never read: the daemon answers everybody else all the same."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgpack
import pytest

from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tiermem.errors import AccessDenied
from tiermem.rpc import messages
from tiermem.rpc.channel import Channel

CONNECTIONS = 200


def connect(daemon: Daemon, ending: str = ".fd") -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(f"{daemon.socket}{ending}")
    return connection


def frame(message: object) -> bytes:
    body = msgpack.packb(message)
    return struct.pack("<I", len(body)) + bytes(body)


@pytest.mark.parametrize("ending", ["", ".fd"])
def test_silent_connections_disturb_nobody(daemon: Daemon, weights: Weights, ending: str) -> None:
    before = daemon.open_files()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(connect(daemon, ending))
        assert daemon.serves(weights)
        eventually(lambda: daemon.open_files() >= before + CONNECTIONS, "it holds them all")
    eventually(lambda: daemon.open_files() < before + 20, "it let them go")


NONSENSE: dict[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "a length of 4 GiB": struct.pack("<I", 0xFFFFFFFF),
    "a length of zero": struct.pack("<I", 0),
    "half a header": b"\x01\x00",
    "half a body": struct.pack("<I", 100) + b"\x81",
    "not a map": frame([1, 2, 3]),
    "another protocol": frame({"protocol": 2}),
    "a boolean for a number": frame({"protocol": True}),
    "another field": frame({"protocol": 1, "token": b"x"}),
    "nested arrays": struct.pack("<I", 100_000) + b"\x91" * 100_000,
    "an extension": frame({"protocol": msgpack.ExtType(1, b"x")}),
    "a request first": frame({"lease_id": "x", "segments": [0]}),
}


@pytest.mark.parametrize("ending", ["", ".fd"])
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_is_cut_off(daemon: Daemon, weights: Weights, nonsense: str, ending: str) -> None:
    with connect(daemon, ending) as connection:
        try:
            connection.sendall(NONSENSE[nonsense])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except (ConnectionError, BrokenPipeError):
            pass
    assert daemon.child is not None
    assert daemon.child.alive


def hello(connection: socket.socket) -> bytes:
    connection.sendall(frame({"protocol": 1}))
    (length,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
    return bytes(msgpack.unpackb(connection.recv(length, socket.MSG_WAITALL))["token"])


REQUESTS: dict[str, Callable[[str], object]] = {
    "nothing": lambda lease: {"lease_id": lease, "segments": []},
    "negative": lambda lease: {"lease_id": lease, "segments": [-1]},
    "beyond": lambda lease: {"lease_id": lease, "segments": [2]},
    "beyond 63 bits": lambda lease: {"lease_id": lease, "segments": [(1 << 64) - 1]},
    "beyond after 250 good ones": lambda lease: {"lease_id": lease, "segments": [0] * 250 + [9]},
    "a float": lambda lease: {"lease_id": lease, "segments": [0.0]},
    "another lease": lambda lease: {"lease_id": lease[:-1], "segments": [0]},
    "no lease": lambda lease: {"segments": [0]},
    "a lease of bytes": lambda lease: {"lease_id": lease.encode(), "segments": [0]},
}


@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_bad_request_brings_an_error(daemon: Daemon, weights: Weights, request_of: Callable[[str], object]) -> None:
    with daemon.client() as client, client.open(weights.path) as model:
        model.wait()
        session = client._live()
        lease = next(iter(client._leases))
        connection = session.descriptors._connection
        connection.sendall(frame(request_of(lease)))
        failure = None
        while failure is None:
            data, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(4 * 253), socket.MSG_WAITALL)
            for _, _, payload in ancillary:
                for (fd,) in struct.iter_unpack("i", payload):
                    os.close(fd)
            reply = msgpack.unpackb(connection.recv(struct.unpack("<I", data)[0], socket.MSG_WAITALL))
            failure = reply.get("error")
        assert failure["code"] in ("protocol", "refused")


def test_client_that_never_reads_holds_up_nobody(daemon: Daemon, weights: Weights) -> None:
    before = daemon.open_files()
    with unread_descriptors(daemon, weights):
        assert daemon.serves(weights)
        assert daemon.open_files() < before + 300
    eventually(lambda: daemon.leases() == 0, "its lease ended")
    eventually(lambda: daemon.open_files() < before + 20, "its descriptors were closed")


@pytest.mark.root
def test_descriptors_that_nobody_reads_leave_room_for_others() -> None:
    """Linux counts the descriptors on their way of each user, and gives an ordinary one RLIMIT_NOFILE of them."""
    with Daemon(ordinary=True, prefix=("prlimit", "--nofile=1024:1024")) as daemon:
        weights = write_weights(daemon.directory / "model")
        with unread_descriptors(daemon, weights), unread_descriptors(daemon, weights):
            assert daemon.serves(weights)


@contextmanager
def unread_descriptors(daemon: Daemon, weights: Weights) -> Iterator[None]:
    """A client that asks for descriptors, and reads none, until neither side of the socket takes more."""
    with daemon.client() as client, client.open(weights.path) as model:
        model.wait()
        connection = client._live().descriptors._connection
        connection.setblocking(False)
        request = frame({"lease_id": next(iter(client._leases)), "segments": [0, 1] * 400})
        with pytest.raises(BlockingIOError):
            connection.sendall(request * 10_000)
        yield


def test_token_ends_with_its_connection(daemon: Daemon, weights: Weights) -> None:
    with connect(daemon) as connection:
        token = hello(connection)
        channel = Channel(daemon.address, lambda: token)
        opened = channel.call("Open", messages.OpenRequest(str(weights.path)))
        assert daemon.leases() == 1
    eventually(lambda: daemon.leases() == 0, "the lease ended with the connection")
    with pytest.raises(AccessDenied, match="unknown session token"):
        channel.call("Release", messages.ReleaseRequest(opened.lease_id))
    channel.close()
