"""Sender: the data port of a pool. Sends extents of segments to receivers with a token, one thread a connection.

Owns the connections and every descriptor that it is given; bytes go from the segment's file to the socket without a
copy in this process. It decides nothing: grants say who may read what, and the pool behind it what is there. No input
ends it, and no receiver holds a thread for longer than a deadline without taking bytes.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tiermem.errors import AccessDenied, DaemonUnreachable, DeadlineExceeded, ProtocolError, Refused, TiermemError
from tiermem.peer import wire
from tiermem.peer.grants import Grant, Grants
from tiermem.peer.identity import Identity, name_in
from tiermem.peer.wire import Answer, Request, Status

NEAR_SEND_BUFFER_BYTES = 128 << 10
"""Send buffer towards a near receiver (the kernel doubles it). A larger one, which the kernel would choose, lets the
sender run ahead of the receiver and costs both of them 40 % more CPU time per byte."""

NEAR_RTT_US = 100
"""Beyond this round trip a fixed send buffer would bound the rate, and the kernel chooses its size."""

_TLS_STEP_BYTES = 1 << 20
_RTT = struct.Struct("=I")
_RTT_AT = 68
"""Offset of `tcpi_rtt`, in microseconds, in `struct tcp_info` of linux/tcp.h."""

_LOG = logging.getLogger(__name__)

Descriptor = Callable[[Grant, int], int]
Available = Callable[[Grant, int, int, int], bool]


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections: with a token in all and of one peer (by certificate, else by host), and without one yet.
    How long, in seconds: until the hello, and then until the next request comes or a receiver takes more."""

    connections: int = 128
    per_peer: int = 16
    strangers: int = 64
    hello_s: float = 5.0
    quiet_s: float = 30.0


@dataclass(slots=True)
class Figures:
    """What the data port `port` did. `sent`: bytes by party; `refused`: connections and extents; `cut`: receivers that
    took nothing for too long."""

    port: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    accepted: int = 0
    refused: int = 0
    cut: int = 0

    @property
    def sent_bytes(self) -> int:
        """To all parties."""
        return self.sent.total()


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    host: str
    party: str = ""
    thread: threading.Thread = field(init=False)


class DataServer:
    """`descriptor(grant, segment)` gives a new descriptor of a segment, which the server closes; `available(grant,
    segment, offset, length)` says whether those bytes are there and were verified. Both are called from many threads
    and may raise a TiermemError, which the log has and the receiver hears of as a refusal. `tls` gives the context of a
    connection."""

    def __init__(
        self,
        grants: Grants,
        descriptor: Descriptor,
        available: Available,
        tls: Callable[[], ssl.SSLContext] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._grants, self._descriptor, self._available = grants, descriptor, available
        self._tls = tls
        self._limits = limits or Limits()
        self._figures = Figures()
        self._lock = threading.Lock()  # of all below, and of closing a socket that another thread may cut
        self._ended = threading.Condition(self._lock)
        self._strangers: dict[_Connection, None] = {}  # oldest first
        self._admitted: dict[_Connection, None] = {}
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._stopping = threading.Event()

    def start(self, host: str, port: int) -> int:
        """Listen; the port, which the kernel chooses where it is 0. Raises Refused."""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=self._limits.connections)
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (while ")[0]
            raise Refused(
                f"cannot listen for peers at {host}, data port {port or 'any'}: {reason}; choose another --listen or "
                "--data-port"
            ) from None
        self._accepting = threading.Thread(target=self._accept, name="tiermem-peer-accept", daemon=True)
        self._accepting.start()
        self._figures.port = int(self._listener.getsockname()[1])
        return self._figures.port

    def stop(self) -> None:
        """End all connections, and return when every thread has ended. Idempotent."""
        self._stopping.set()
        if self._listener is None or self._accepting is None:
            return
        wire.cut(self._listener)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            left = [*self._strangers, *self._admitted]
            for connection in left:
                wire.cut(connection.socket)
        for connection in left:
            connection.thread.join()

    def figures(self) -> Figures:
        """A snapshot."""
        with self._lock:
            connections = len(self._strangers) + len(self._admitted)
            return replace(self._figures, sent=self._figures.sent.copy(), connections=connections)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stopping.is_set():
            try:
                accepted, address = self._listener.accept()
            except OSError as error:
                if not self._stopping.is_set():
                    _LOG.error("cannot accept a peer: %s", error)
                    self._stopping.wait(0.1)
                continue
            connection = _Connection(accepted, address[0])
            connection.thread = threading.Thread(target=self._run, args=(connection,), name="tiermem-peer", daemon=True)
            with self._lock:
                self._figures.accepted += 1
                while len(self._strangers) >= self._limits.strangers:
                    # Whoever opens connections and says nothing must not keep out those who have a token.
                    wire.cut(next(iter(self._strangers)).socket)
                    self._ended.wait()
                self._strangers[connection] = None
            try:
                connection.thread.start()
            except RuntimeError as error:
                _LOG.error("cannot start a thread for a peer: %s", error)
                self._end(connection)

    def _run(self, connection: _Connection) -> None:
        try:
            self._converse(connection)
        except (TiermemError, OSError) as error:
            _LOG.debug("a connection of %s ended: %s", connection.host, error)
        except Exception:
            _LOG.exception("a connection of %s failed", connection.host)
        finally:
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        with self._lock:
            connection.socket.close()
            self._strangers.pop(connection, None)
            self._admitted.pop(connection, None)
            self._ended.notify()

    def _converse(self, connection: _Connection) -> None:
        peer = self._greet(connection)
        what = f"hello of {connection.host}"
        hello = wire.receive_frame(connection.socket, wire.HELLO_BYTES, self._limits.hello_s, what)
        try:
            grant = self._admit(connection, wire.unpack_hello(hello), peer)
        except TiermemError as error:
            self._count(refused=1)
            connection.socket.sendall(wire.pack_refusal(_status_of(error), str(error)))
            return
        try:
            connection.socket.sendall(wire.pack_answer(Answer(Status.OK)))
            self._serve(connection, grant)
        finally:
            self._grants.leave(grant)

    def _greet(self, connection: _Connection) -> Identity:
        """Set up the socket, and TLS where it is used; who the peer is."""
        plain = connection.socket
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # For what the kernel still holds once we left; before that, our own deadline is the earlier one.
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.quiet_s * 4000))
        if _rtt_us(plain) < NEAR_RTT_US:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_SEND_BUFFER_BYTES)
        wire.set_timeout(plain, self._limits.hello_s)
        if self._tls is None:
            return Identity("", connection.host)
        with self._lock:
            secure = self._tls().wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
            connection.socket = secure
        wire.set_timeout(secure, self._limits.hello_s)
        secure.do_handshake()
        return Identity(name_in(secure.getpeercert() or {}), connection.host)

    def _admit(self, connection: _Connection, token: bytes, peer: Identity) -> Grant:
        grant = self._grants.redeem(token, peer.name, lambda: self._cut(connection))
        limits = self._limits
        with self._lock:
            of_party = sum(other.party == peer.party for other in self._admitted)
            if of_party < limits.per_peer and len(self._admitted) < limits.connections:
                connection.party = peer.party
                self._strangers.pop(connection, None)
                self._admitted[connection] = None
                self._ended.notify()
                return grant
        self._grants.leave(grant)
        raise Refused(
            f"{of_party} connections of this peer are open, and at most {limits.per_peer} of a peer and "
            f"{limits.connections} of all may be: use those that there are"
        )

    def _cut(self, connection: _Connection) -> None:
        with self._lock:
            wire.cut(connection.socket)

    def _serve(self, connection: _Connection, grant: Grant) -> None:
        quiet_s = self._limits.quiet_s
        wire.set_timeout(connection.socket, quiet_s)
        while True:
            frame = wire.receive_frame(connection.socket, wire.REQUEST_BYTES, quiet_s, "request")
            try:
                self._answer(connection, grant, wire.unpack_request(frame))
            except ProtocolError as error:
                self._count(refused=1)
                connection.socket.sendall(wire.pack_refusal(Status.MALFORMED, str(error)))
                return
            except (TimeoutError, BlockingIOError):
                self._count(cut=1)
                self._cut(connection)
                raise DeadlineExceeded(f"it took nothing for {quiet_s:g} s") from None

    def _answer(self, connection: _Connection, grant: Grant, request: Request) -> None:
        segment, offset, length = request.segment, request.offset, request.length
        to = connection.socket
        try:
            if not grant.allows(segment, offset, length):
                raise AccessDenied(f"{request} are not granted; ask for what the lease's manifest names")
            if not self._available(grant, segment, offset, length):
                to.sendall(wire.pack_answer(Answer(Status.LATER, segment, offset)))
                return
            fd = self._descriptor(grant, segment)
        except TiermemError as error:
            self._count(refused=1)
            _LOG.info("lease %s: %s were not sent: %s", grant.lease_id, request, error)
            # What the pool says of itself, such as a path, is not a peer's business.
            text = f"{request} cannot be had; open the model again"
            to.sendall(wire.pack_refusal(Status.REFUSED, text, segment, offset))
            return
        try:
            send = self._send_tls if isinstance(to, ssl.SSLSocket) else self._send_file
            send(connection, fd, request, wire.pack_answer(Answer(Status.OK, segment, offset, length)))
        finally:
            os.close(fd)

    def _send_file(self, connection: _Connection, fd: int, request: Request, header: bytes) -> None:
        to = connection.socket
        to.sendall(header, socket.MSG_MORE)
        offset, end = request.offset, request.offset + request.length
        while offset < end:
            # Room in the send buffer comes by a third of it, so that a call which moves anything moves enough.
            count = os.sendfile(to.fileno(), fd, offset, end - offset)
            self._sent(connection, count, request)
            offset += count

    def _send_tls(self, connection: _Connection, fd: int, request: Request, header: bytes) -> None:
        """By way of a small buffer: a mapping of the file would have to be made, and would crash us were it cut."""
        to = connection.socket
        to.sendall(header)
        buffer = memoryview(bytearray(min(_TLS_STEP_BYTES, request.length)))
        offset, end = request.offset, request.offset + request.length
        while offset < end:
            count = os.preadv(fd, [buffer[: end - offset]], offset)
            to.sendall(buffer[:count])
            self._sent(connection, count, request)
            offset += count

    def _sent(self, connection: _Connection, count: int, request: Request) -> None:
        if count == 0:
            raise DaemonUnreachable(f"{request} were promised, and its file ended before them")
        with self._lock:
            self._figures.sent[connection.party] += count

    def _count(self, refused: int = 0, cut: int = 0) -> None:
        with self._lock:
            self._figures.refused += refused
            self._figures.cut += cut


def _status_of(error: TiermemError) -> Status:
    if isinstance(error, AccessDenied):
        return Status.DENIED
    return Status.MALFORMED if isinstance(error, ProtocolError) else Status.REFUSED


def _rtt_us(connection: socket.socket) -> int:
    """Round trip of the handshake that opened a connection, in microseconds; a large number where it ended already."""
    with suppress(OSError):
        facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + _RTT.size)
        return int(_RTT.unpack_from(facts, _RTT_AT)[0])
    return NEAR_RTT_US
