"""Receiver: a data connection to another host's pool, which fills memory with extents of its segments.

Owns the connection. It believes that the sender says which bytes come, and nothing of what they hold: whoever asked
for them checks their digests before anybody sees them.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import Self

from tiermem.errors import AccessDenied, Closed, DaemonUnreachable, DeadlineExceeded, Refused
from tiermem.peer import wire
from tiermem.peer.address import Address
from tiermem.peer.wire import Request, Status

WINDOW_BYTES, WINDOW_REQUESTS = 16 << 20, 64
"""What is asked for ahead of its arrival, so that a sender always has the next request: until one of the two is
reached, and two requests in any case."""

_HELLO = Request(0, 0, 0)
"""What a hello is answered as."""

Want = tuple[int, int, memoryview]
"""(segment, offset, memory that the bytes from there on are to fill: writable, contiguous, at most 64 MiB)"""


class DataConnection:
    """One connection, opened with one token. One thread at a time uses and closes it; any may `cut` it."""

    def __init__(self, address: Address, token: bytes, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        """Connect and say hello. `timeout_s` bounds that, and then how long 64 KiB may take to come.

        Raises DaemonUnreachable, DeadlineExceeded, AccessDenied, ProtocolError, or what the peer answers.
        """
        self.address = address
        self.received_bytes = 0
        self._timeout_s = timeout_s
        hello = wire.pack_hello(token)
        self._socket = _connect(address, tls, timeout_s)
        try:
            self._send(hello)
            self._receive_answer(_HELLO)
        except BaseException as error:
            self.close()
            if isinstance(error.__cause__, ssl.SSLError):  # a server tells its verdict once the handshake has ended
                raise _untrusted(address, error.__cause__) from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def fetch(self, segment: int, offset: int, target: memoryview) -> None:
        """Fill `target`. Raises as `fetch_many` does, and Refused where the peer has not received the bytes itself."""
        if not list(self.fetch_many([(segment, offset, target)])):
            request = Request(segment, offset, len(target))
            raise Refused(f"{self.address} has not received {request} itself yet; ask later, or another peer")

    def fetch_many(self, wants: Iterable[Want]) -> Generator[int, None, None]:
        """Fill targets in order, and give the number of each once it is full. One that the peer has not received itself
        yet is passed over.

        An error closes the connection, as leaving before the end does: DaemonUnreachable, DeadlineExceeded,
        ProtocolError, Refused, Closed. All of them say how far it came; a target that was not given is not full.
        """
        if self.closed:
            raise Closed(f"the connection to {self.address} is closed; connect again")
        waiting: deque[tuple[int, Request, memoryview]] = deque()
        left = enumerate(wants)
        try:
            while self._ask(left, waiting):
                number, request, target = waiting[0]
                status = self._receive_answer(request)
                if status is Status.OK:
                    wire.receive(self._socket, target, self._timeout_s, f"{self.address}: {request}")
                    self.received_bytes += len(target)
                waiting.popleft()
                if status is Status.OK:
                    yield number
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def cut(self) -> None:
        """End it, so that the thread that waits for bytes is told; it must not be closed meanwhile."""
        wire.cut(self._socket)

    def _ask(self, left: Iterator[tuple[int, Want]], waiting: deque[tuple[int, Request, memoryview]]) -> bool:
        """Have a whole window of requests on its way, while there are any; whether an answer is still to come."""
        frames = bytearray()
        ahead = sum(request.length for _, request, _ in waiting)
        while len(waiting) < 2 or (len(waiting) < WINDOW_REQUESTS and ahead < WINDOW_BYTES):
            number, want = next(left, (0, None))
            if want is None:
                break
            segment, offset, target = want
            request = Request(segment, offset, len(target))
            frames += wire.pack_request(request)
            waiting.append((number, request, target))
            ahead += request.length
        if frames:
            self._send(frames)
        return bool(waiting)

    def _send(self, frames: bytes | bytearray) -> None:
        try:
            self._socket.sendall(frames)
        except (TimeoutError, BlockingIOError):
            raise DeadlineExceeded(f"{self.address} took no request within {self._timeout_s:g} s") from None
        except OSError:
            pass  # reading says how the connection ended: a refusal may be there

    def _receive_answer(self, request: Request) -> Status:
        """The answer to a request, OK or LATER. Raises what the peer answers."""
        what = f"{self.address}: the answer to " + ("the hello" if request is _HELLO else str(request))
        frame = wire.receive_frame(self._socket, wire.ANSWER_BYTES, self._timeout_s, what)
        answer = wire.unpack_answer(frame, request)
        if answer.error is not None:
            text = wire.receive_frame(self._socket, answer.length, self._timeout_s, what)
            raise answer.error(f"{self.address}: {wire.unpack_text(text)}")
        return answer.status


def _connect(address: Address, tls: ssl.SSLContext | None, timeout_s: float) -> socket.socket:
    try:
        plain = socket.create_connection((address.host, address.port), timeout_s)
    except TimeoutError:
        raise DeadlineExceeded(f"{address} did not answer within {timeout_s:g} s; is its host up?") from None
    except OSError as error:
        raise DaemonUnreachable(f"{address} cannot be reached: {error.strerror or error}; is a pool there?") from None
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secured = plain if tls is None else tls.wrap_socket(plain, server_hostname=address.host)
        wire.set_timeout(secured, timeout_s)
        return secured
    except TimeoutError:
        plain.close()
        raise DeadlineExceeded(f"{address} did not end the TLS handshake within {timeout_s:g} s") from None
    except OSError as error:
        plain.close()
        if isinstance(error, ssl.SSLError):
            raise _untrusted(address, error) from None
        raise DaemonUnreachable(f"{address}: the connection broke at once: {error.strerror or error}") from None


def _untrusted(address: Address, error: ssl.SSLError) -> AccessDenied:
    reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error
    return AccessDenied(f"TLS with {address} failed: {reason}; check both ends' certificates, and that both use TLS")
