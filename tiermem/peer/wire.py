"""Wire: the frames of a data connection, and their way over a blocking socket. Knows no grant and opens nothing.

    hello     receiver to sender   "tmpd", u32 protocol, 32 bytes of token
    request   receiver to sender   u32 segment, u64 offset, u64 length: 1 byte to 64 MiB
    answer    sender to receiver   u32 status, u32 segment, u64 offset, u64 length

Numbers are little-endian. Every request is answered in its turn, with its own segment and offset; a hello is answered
as a request of zeros would be. `length` counts what follows: after OK exactly the bytes that were asked for (none after
a hello), after LATER nothing, after a refusal at most 512 bytes of text.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tiermem.errors import AccessDenied, DaemonUnreachable, DeadlineExceeded, ProtocolError, Refused, TiermemError

PROTOCOL = 1
TOKEN_BYTES = 32
MAX_EXTENT_BYTES = 64 << 20
MAX_TEXT_BYTES = 512
PROGRESS_BYTES = 64 << 10
"""An end that moves less than this within the deadline of a transfer hangs, however often it moves a byte."""

_MAGIC = b"tmpd"
_HELLO = struct.Struct(f"<4sI{TOKEN_BYTES}s")
_REQUEST = struct.Struct("<IQQ")
_ANSWER = struct.Struct("<IIQQ")
HELLO_BYTES, REQUEST_BYTES, ANSWER_BYTES = _HELLO.size, _REQUEST.size, _ANSWER.size


class Status(IntEnum):
    """How a sender answers."""

    OK = 0
    LATER = 1
    REFUSED = 2
    DENIED = 3
    MALFORMED = 4


_ERRORS: dict[Status, type[TiermemError]] = {
    Status.REFUSED: Refused,
    Status.DENIED: AccessDenied,
    Status.MALFORMED: ProtocolError,
}


@dataclass(frozen=True, slots=True)
class Request:
    """`length` bytes at `offset` of segment number `segment`."""

    segment: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.length} bytes at {self.offset} of segment {self.segment}"


@dataclass(frozen=True, slots=True)
class Answer:
    """`length` bytes follow: the extent's or, after a refusal, those of its text."""

    status: Status
    segment: int = 0
    offset: int = 0
    length: int = 0

    @property
    def error(self) -> type[TiermemError] | None:
        """What the receiver raises with the text that follows; None where nothing was refused."""
        return _ERRORS.get(self.status)


def pack_hello(token: bytes) -> bytes:
    """Raises ProtocolError unless the token has 32 bytes."""
    if len(token) != TOKEN_BYTES:
        raise ProtocolError(f"a token has {TOKEN_BYTES} bytes, not {len(token)}; ask the peer for another")
    return _HELLO.pack(_MAGIC, PROTOCOL, token)


def unpack_hello(frame: bytes) -> bytes:
    """The token. Raises ProtocolError."""
    magic, protocol, token = _unpack(_HELLO, frame, "hello")
    if magic != _MAGIC:
        raise ProtocolError("this is the data port of a pool, and that was no hello of one; was another port meant?")
    if protocol != PROTOCOL:
        raise ProtocolError(f"the receiver speaks protocol {protocol}, the sender {PROTOCOL}; upgrade the older one")
    return bytes(token)


def pack_request(request: Request) -> bytes:
    """Raises ProtocolError for a request that no sender takes."""
    _check_length(request)
    try:
        return _REQUEST.pack(request.segment, request.offset, request.length)
    except struct.error:
        raise ProtocolError(f"no segment has {request}") from None


def unpack_request(frame: bytes) -> Request:
    """Raises ProtocolError."""
    return _check_length(Request(*_unpack(_REQUEST, frame, "request")))


def pack_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(answer.status, answer.segment, answer.offset, answer.length)


def unpack_answer(frame: bytes, request: Request) -> Answer:
    """The answer to `request`. Raises ProtocolError unless it can be one."""
    status, segment, offset, length = _unpack(_ANSWER, frame, "answer")
    if (segment, offset) != (request.segment, request.offset):
        raise ProtocolError(f"{request} were asked for, an answer for {offset} of segment {segment} came")
    try:
        answer = Answer(Status(status), segment, offset, length)
    except ValueError:
        raise ProtocolError(f"{request} were asked for, an answer of unknown status {status} came") from None
    if answer.error is not None:
        fits = length <= MAX_TEXT_BYTES
    else:
        fits = length == (request.length if answer.status is Status.OK else 0)
    if not fits:
        raise ProtocolError(f"{request} were asked for, {answer.status.name} with {length} bytes came")
    return answer


def pack_refusal(status: Status, text: str, segment: int = 0, offset: int = 0) -> bytes:
    """An answer of that status, and the text behind it, cut to what an answer takes."""
    body = text.encode(errors="replace")[:MAX_TEXT_BYTES]
    return pack_answer(Answer(status, segment, offset, len(body))) + body


def unpack_text(body: bytes) -> str:
    """The text of a refusal, fit to be shown: whoever wrote it is not to write to a terminal or a log as he likes."""
    text = body[:MAX_TEXT_BYTES].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)


class Pace:
    """The deadline of a transfer that moves on: each 64 KiB have `timeout_s` from those before them."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._moved = 0
        self._deadline = time.monotonic() + timeout_s

    def moved(self, count: int) -> None:
        """`count` further bytes were moved. Raises TimeoutError where it took too long."""
        self._moved += count
        now = time.monotonic()
        if self._moved >= PROGRESS_BYTES:
            self._moved, self._deadline = 0, now + self._timeout_s
        elif now >= self._deadline:
            raise TimeoutError


def set_timeout(connection: socket.socket, timeout_s: float) -> None:
    """Bound each wait on a socket; on a plain one the kernel does it, so that a call can move all that it is given."""
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(timeout_s)
        return
    connection.settimeout(None)
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def receive(connection: socket.socket, target: memoryview, timeout_s: float, what: str) -> None:
    """Fill `target`, which is `what`, from a socket whose waits `set_timeout` bounded likewise.

    Raises DeadlineExceeded where it moves on too slowly, DaemonUnreachable where it breaks; both say how far it came.
    """
    flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL
    filled, pace = 0, Pace(timeout_s)
    try:
        while filled < len(target):
            count = connection.recv_into(target[filled:], 0, flags)
            if count == 0:
                raise ConnectionResetError(None, "the other end closed it")
            filled += count
            pace.moved(count)
    except (TimeoutError, BlockingIOError):
        raise DeadlineExceeded(
            f"{what}: {filled} of {len(target)} bytes came, and too few more within {timeout_s:g} s"
        ) from None
    except OSError as error:
        raise DaemonUnreachable(
            f"{what}: {filled} of {len(target)} bytes came, then the connection broke: {error.strerror or error}"
        ) from error


def receive_frame(connection: socket.socket, nbytes: int, timeout_s: float, what: str) -> bytes:
    """`nbytes` of a frame, which is `what`. Raises as `receive` does."""
    frame = bytearray(nbytes)
    receive(connection, memoryview(frame), timeout_s, what)
    return bytes(frame)


def cut(connection: socket.socket) -> None:
    """End a connection at once, whichever thread uses it, and have what is on its way dropped when that thread closes
    it. The caller sees to it that this does not happen meanwhile."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # SSLSocket's own shutdown ends TLS first: another thread that sends would go on in the clear.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _unpack(form: struct.Struct, frame: bytes, noun: str) -> tuple[Any, ...]:
    if len(frame) != form.size:
        raise ProtocolError(f"the {noun} has {len(frame)} bytes, not {form.size}")
    return form.unpack(frame)


def _check_length(request: Request) -> Request:
    if not 1 <= request.length <= MAX_EXTENT_BYTES:
        raise ProtocolError(f"{request} were asked for; 1 to {MAX_EXTENT_BYTES} bytes can be had at a time")
    return request
