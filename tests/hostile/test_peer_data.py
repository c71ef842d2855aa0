"""Data connections whose other end says nonsense, too little, too much or nothing: it costs them theirs, and no more.

First what receivers do to a data port, then what a sender does to a receiver.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.certificates import Authority, Certificate
from tests.conftest import until
from tiermem.errors import AccessDenied, DaemonUnreachable, DeadlineExceeded, ProtocolError, Refused, TiermemError
from tiermem.peer import wire
from tiermem.peer.address import Address
from tiermem.peer.grants import Grants
from tiermem.peer.receiver import DataConnection
from tiermem.peer.sender import DataServer, Limits
from tiermem.peer.wire import Answer, Request, Status

HOST = "127.0.0.1"
NBYTES = 32 << 20
DATA = np.random.default_rng(6).bytes(NBYTES)
STRANGERS = 8
QUIET_S = 0.5


def memory(length: int) -> memoryview:
    return memoryview(bytearray(length))


class Port:
    """A data port with short deadlines. Used as a context, it still serves at the end, and nothing is left of it."""

    def __init__(self, tls: ssl.SSLContext | None = None, hello_s: float = QUIET_S) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        self._file.write(DATA)
        self._file.flush()
        self.grants = Grants()
        limits = Limits(per_peer=4, strangers=STRANGERS, hello_s=hello_s, quiet_s=QUIET_S)
        self.server = DataServer(
            self.grants, lambda *_: os.dup(self._file.fileno()), lambda *_: True, tls and (lambda: tls), limits=limits
        )
        self.address = Address("localhost" if tls else HOST, self.server.start(HOST, 0))

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self._file.close()
        self.grants.check()
        assert self.server.figures().connections == 0
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tiermem-peer")]

    def token(self, peer: str = "") -> bytes:
        return self.grants.issue("lease", {0: NBYTES}, peer, 60.0)

    def raw(self) -> socket.socket:
        return socket.create_connection((HOST, self.address.port), 10)

    def greeted(self) -> socket.socket:
        """A connection whose token was taken."""
        connection = self.raw()
        connection.sendall(wire.pack_hello(self.token()))
        assert connection.recv(wire.ANSWER_BYTES, socket.MSG_WAITALL) == wire.pack_answer(Answer(Status.OK))
        return connection

    def serves(self, tls: ssl.SSLContext | None = None, peer: str = "") -> bool:
        target = memory(1 << 20)
        with DataConnection(self.address, self.token(peer), tls, 10.0) as connection:
            connection.fetch(0, 4096, target)
        return bytes(target) == DATA[4096 : 4096 + len(target)]


@pytest.fixture
def port() -> Iterator[Port]:
    with Port() as port:
        yield port
        assert port.serves()
        until(lambda: port.server.figures().connections == 0)


def rest(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


REQUEST = struct.pack("<IQQ", 0, 0, 10)
NONSENSE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "another protocol": b"tmpd" + struct.pack("<I", 2) + bytes(32),
    "a request first": REQUEST * 10,
    "a TLS hello": bytes.fromhex("160301020001") + bytes(600),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_for_a_hello_is_cut_off(port: Port, nonsense: str) -> None:
    with port.raw() as connection:
        with suppress(ConnectionError):
            connection.sendall(NONSENSE[nonsense])
        assert len(rest(connection)) <= wire.ANSWER_BYTES + wire.MAX_TEXT_BYTES
    assert port.server.figures().sent_bytes == 0


def test_wrong_tokens_are_answered_alike(port: Port) -> None:
    used = port.token()
    hello = wire.pack_hello(used)
    with port.raw() as first:
        first.sendall(hello)
        first.recv(1)
        answers = set()
        forged = bytearray(port.token())
        forged[0] ^= 1
        for token in (used, bytes(forged), bytes(32), port.token("another peer")):
            with port.raw() as connection:
                connection.sendall(wire.pack_hello(token))
                answers.add(rest(connection))
    (answer,) = answers
    assert wire.unpack_answer(answer[: wire.ANSWER_BYTES], Request(0, 0, 0)).error is AccessDenied
    assert port.server.figures().sent_bytes == 0


@pytest.mark.parametrize("length", range(wire.HELLO_BYTES))
def test_hello_that_is_cut_short(port: Port, length: int) -> None:
    with port.raw() as connection:
        connection.sendall(wire.pack_hello(port.token())[:length])
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


@pytest.mark.parametrize("length", range(1, wire.REQUEST_BYTES))
def test_request_that_is_cut_short(port: Port, length: int) -> None:
    with port.greeted() as connection:
        connection.sendall(REQUEST[:length])
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


def test_requests_of_random_bytes_bring_errors_and_never_bytes_beyond_the_grant(port: Port) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        with port.greeted() as connection:
            with suppress(OSError):
                connection.sendall(random.bytes(wire.REQUEST_BYTES * 3))
                connection.shutdown(socket.SHUT_WR)
            received = rest(connection)
            assert len(received) <= 3 * (wire.ANSWER_BYTES + wire.MAX_TEXT_BYTES)
    assert port.server.figures().sent_bytes == 0


@pytest.mark.parametrize("length", [0, wire.MAX_EXTENT_BYTES + 1, (1 << 64) - 1])
def test_length_that_is_not_allowed_ends_the_connection(port: Port, length: int) -> None:
    with port.greeted() as connection:
        connection.sendall(struct.pack("<IQQ", 0, 0, length))
        status, _, _, nbytes = struct.unpack_from("<IIQQ", answer := rest(connection))
        assert status == Status.MALFORMED
        assert len(answer) == wire.ANSWER_BYTES + nbytes


def test_hello_that_comes_a_byte_at_a_time_has_one_deadline(port: Port) -> None:
    begin = time.monotonic()
    with port.raw() as connection, suppress(ConnectionError):
        for byte in wire.pack_hello(port.token()):
            connection.sendall(bytes([byte]))
            time.sleep(QUIET_S / 4)  # a tenth of it would be too much for the whole
    assert time.monotonic() - begin < 40 * QUIET_S / 4
    until(lambda: port.server.figures().connections == 0)


def test_connection_that_asks_for_nothing_ends(port: Port) -> None:
    with port.greeted() as connection:
        assert rest(connection) == b""


def test_silent_connections_keep_nobody_out() -> None:
    """Ten times as many as may be without a token, and none of them reaches its deadline during the test."""
    with Port(hello_s=60.0) as port, ExitStack() as stack:
        for _ in range(10 * STRANGERS):
            stack.enter_context(port.raw())
        assert port.serves()
        until(lambda: port.server.figures().accepted == 10 * STRANGERS + 1)
        assert port.server.figures().connections <= STRANGERS


def ask(connection: socket.socket, length: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(struct.pack("<IQQ", 0, 0, length))


def test_receiver_that_stops_reading_is_cut(port: Port) -> None:
    with port.greeted() as connection:
        ask(connection, NBYTES)
        until(lambda: port.server.figures().cut == 1)
        until(lambda: port.server.figures().connections == 0)
        assert len(rest(connection)) < NBYTES


def test_receiver_that_reads_a_little_now_and_then_is_cut(port: Port) -> None:
    with port.greeted() as connection:
        ask(connection, NBYTES)
        deadline = time.monotonic() + 20
        while not port.server.figures().cut:
            with suppress(ConnectionError):
                connection.recv(1024)
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_receiver_that_leaves_in_the_middle(port: Port) -> None:
    for _ in range(20):
        with port.greeted() as connection:
            ask(connection, NBYTES)
            connection.recv(10)
    until(lambda: port.server.figures().connections == 0)


def test_flood_of_requests_waits_in_the_socket(port: Port) -> None:
    """Whoever asks for a thousand times what he reads is held up by his own connection."""
    with port.greeted() as connection:
        connection.setblocking(False)
        request = struct.pack("<IQQ", 0, 0, NBYTES)
        with suppress(BlockingIOError, ConnectionError):
            for _ in range(1000):
                connection.sendall(request * 1000)
        assert port.server.figures().sent_bytes < 2 * NBYTES
        assert port.serves()


def test_port_of_a_thousand_tokens_that_nobody_had(port: Port) -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        with port.raw() as connection:
            connection.sendall(wire.pack_hello(random.bytes(32)))
            rest(connection)
    assert port.server.figures().sent_bytes == 0


# TLS


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    return Authority(tmp_path_factory.mktemp("ca")), Authority(tmp_path_factory.mktemp("other"), "other")


def client_of(certificate: Certificate | None, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificate is not None:
        context.load_cert_chain(certificate.cert, certificate.key)
    context.load_verify_locations(ca)
    return context


@contextmanager
def secured(authority: Authority, certificate: Certificate) -> Iterator[Port]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    context.load_verify_locations(authority.cert)
    context.verify_mode = ssl.CERT_REQUIRED
    with Port(context) as port:
        yield port
        good = client_of(authority.issue("good"), authority.cert)
        assert port.serves(good, "good")


def test_strangers_certificates_open_nothing(authorities: tuple[Authority, Authority]) -> None:
    ours, theirs = authorities
    with secured(ours, ours.issue("sender")) as port:
        for certificate in (None, theirs.issue("good"), ours.issue("late", subject="/CN=good", days=-1)):
            with pytest.raises(AccessDenied, match="certificate"):
                DataConnection(port.address, port.token("good"), client_of(certificate, ours.cert), 10.0)
        assert port.server.figures().sent_bytes == 0


def test_senders_certificate_must_be_of_the_ca_and_of_its_host(authorities: tuple[Authority, Authority]) -> None:
    ours, theirs = authorities
    good = ours.issue("good")
    with secured(ours, ours.issue("sender")) as port, pytest.raises(AccessDenied, match="certificate"):
        DataConnection(port.address, port.token("good"), client_of(good, theirs.cert), 10.0)
    with Port(context := ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) as port:
        elsewhere = ours.issue("elsewhere", alternatives="DNS:elsewhere")
        context.load_cert_chain(elsewhere.cert, elsewhere.key)
        with pytest.raises(AccessDenied, match="localhost"):
            DataConnection(port.address, port.token("good"), client_of(good, ours.cert), 10.0)


def test_tls_at_one_end_only_opens_nothing(authorities: tuple[Authority, Authority]) -> None:
    ours, _ = authorities
    good = client_of(ours.issue("good"), ours.cert)
    with Port() as port, pytest.raises((AccessDenied, DaemonUnreachable, DeadlineExceeded)):
        DataConnection(port.address, port.token(), good, 10.0)
    with secured(ours, ours.issue("sender")) as other, pytest.raises(TiermemError):
        DataConnection(other.address, other.token("good"), None, 10.0)


def test_handshake_that_is_never_ended_has_a_deadline(authorities: tuple[Authority, Authority]) -> None:
    ours, _ = authorities
    with secured(ours, ours.issue("sender")) as port, port.raw() as connection:
        connection.sendall(bytes.fromhex("1603010200"))
        assert len(rest(connection)) < 100


def test_tls_receiver_that_stops_reading_is_cut(authorities: tuple[Authority, Authority]) -> None:
    ours, _ = authorities
    good = client_of(ours.issue("good"), ours.cert)
    with secured(ours, ours.issue("sender")) as port, good.wrap_socket(port.raw(), server_hostname=HOST) as connection:
        connection.sendall(wire.pack_hello(port.token("good")) + struct.pack("<IQQ", 0, 0, NBYTES))
        until(lambda: port.server.figures().cut == 1)
        until(lambda: port.server.figures().connections == 0)


# What a sender does to a receiver

Script = Callable[[socket.socket], object]
WANTED = [(3, 100, 1000), (3, 5000, 2000)]


@contextmanager
def sender(script: Script) -> Iterator[DataConnection]:
    """A connection to a sender that welcomes, and then follows the script once two requests have come."""
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(wire.HELLO_BYTES, socket.MSG_WAITALL)
            connection.sendall(wire.pack_answer(Answer(Status.OK)))
            connection.recv(2 * wire.REQUEST_BYTES, socket.MSG_WAITALL)
            if script(connection) is not HANG:
                return
            done.wait(20)

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with DataConnection(Address(HOST, listener.getsockname()[1]), bytes(32), None, QUIET_S) as connection:
                yield connection
        finally:
            done.set()
            thread.join()


HANG = object()


def says(*parts: bytes, then: object = None) -> Script:
    def script(connection: socket.socket) -> object:
        connection.sendall(b"".join(parts))
        return then

    return script


def answer(number: int = 0, status: int = 0, length: int | None = None) -> bytes:
    segment, offset, wanted = WANTED[number]
    return struct.pack("<IIQQ", status, segment, offset, wanted if length is None else length)


def trickle(connection: socket.socket) -> None:
    connection.sendall(answer())
    for _ in range(1000):
        connection.sendall(b"x")
        time.sleep(QUIET_S / 10)


GOOD = answer() + bytes(1000)
SCRIPTS: dict[str, tuple[Script, type[TiermemError], int]] = {
    "hangs at once": (says(then=HANG), DeadlineExceeded, 0),
    "hangs within an answer": (says(answer()[:10], then=HANG), DeadlineExceeded, 0),
    "hangs within the bytes": (says(answer(), bytes(999), then=HANG), DeadlineExceeded, 0),
    "hangs after the first": (says(GOOD, then=HANG), DeadlineExceeded, 1),
    "a byte now and then": (trickle, DeadlineExceeded, 0),
    "leaves at once": (says(), DaemonUnreachable, 0),
    "leaves within an answer": (says(answer()[:10]), DaemonUnreachable, 0),
    "leaves within the bytes": (says(answer(), bytes(999)), DaemonUnreachable, 0),
    "leaves after the first": (says(GOOD), DaemonUnreachable, 1),
    "short": (says(answer(), bytes(999), answer(1), bytes(2000), then=HANG), ProtocolError, 1),
    "long": (says(GOOD, b"x", answer(1), bytes(2000)), ProtocolError, 1),
    "less than asked for": (says(answer(length=999), bytes(999)), ProtocolError, 0),
    "more than asked for": (says(answer(length=1001), bytes(1001)), ProtocolError, 0),
    "more than memory": (says(answer(length=(1 << 64) - 1)), ProtocolError, 0),
    "in another order": (says(answer(1), bytes(2000), GOOD), ProtocolError, 0),
    "the same again": (says(GOOD, GOOD), ProtocolError, 1),
    "an unknown status": (says(answer(status=99)), ProtocolError, 0),
    "later, with bytes": (says(answer(status=1)), ProtocolError, 0),
    "a refusal": (says(answer(status=2, length=4), b"no\x1b["), Refused, 0),
    "a refusal without end": (says(answer(status=2, length=513), bytes(513)), ProtocolError, 0),
    "a refusal cut short": (says(answer(status=2, length=4), b"no"), DaemonUnreachable, 0),
    "http": (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), ProtocolError, 0),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_that_a_sender_does_fills_a_target_wrongly(name: str) -> None:
    script, error, filled = SCRIPTS[name]
    targets = [memory(length) for _, _, length in WANTED]
    given: list[int] = []
    with sender(script) as connection:
        wants = [(segment, offset, target) for (segment, offset, _), target in zip(WANTED, targets, strict=True)]
        with pytest.raises(error) as raised:  # noqa: PT012
            for number in connection.fetch_many(wants):
                given.append(number)
        assert connection.closed
        assert str(connection.address) in str(raised.value) or error is ProtocolError
        assert str(raised.value).isprintable()
        assert connection.received_bytes == sum(WANTED[number][2] for number in given)
    assert given == list(range(filled))


@pytest.mark.parametrize("at", range(0, 2 * wire.ANSWER_BYTES + 20))
def test_connection_that_breaks_anywhere(at: int) -> None:
    frames = struct.pack("<IIQQ", 0, 3, 100, 20) + bytes(20) + answer(1)
    with sender(says(frames[:at])) as connection:
        wants = [(3, 100, memory(20)), (3, 5000, memory(2000))]
        fetched = connection.fetch_many(wants)
        if at >= wire.ANSWER_BYTES + 20:
            assert next(fetched) == 0
        with pytest.raises(DaemonUnreachable):
            next(fetched)


def test_sender_that_never_welcomes() -> None:
    with socket.create_server((HOST, 0)) as listener:
        address = Address(HOST, listener.getsockname()[1])
        with pytest.raises(DeadlineExceeded, match="the hello"):
            DataConnection(address, bytes(32), None, QUIET_S)
