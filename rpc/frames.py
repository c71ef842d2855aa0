"""Frames of the descriptor socket: a little-endian u32 length, then a msgpack map, with descriptors by SCM_RIGHTS.

Owns their form and limits, and their way over a non-blocking socket on an event loop. It knows no session and no order.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import socket
import struct
import termios
from collections.abc import Sequence
from typing import TypeVar

from tiermem.errors import ProtocolError
from tiermem.rpc import codec

LENGTH = struct.Struct("<I")
MAX_BYTES = 1 << 20
MAX_DESCRIPTORS = 200
"""The kernel takes 253 with one message."""

SEND_TIMEOUT_S = 30.0
"""A peer that reads nothing for so long is given up: descriptors on their way to it are held open."""

M = TypeVar("M")


def pack(message: object) -> bytes:
    """The frame of a message. Raises ProtocolError if it is too large."""
    body = codec.encode(message)
    if len(body) > MAX_BYTES:
        raise ProtocolError(f"{type(message).__name__} has {len(body)} bytes; a frame takes {MAX_BYTES}")
    return LENGTH.pack(len(body)) + body


def body_bytes(header: bytes) -> int:
    """How many bytes follow a header. Raises ProtocolError if they are too many."""
    (length,) = LENGTH.unpack(header)
    if length > MAX_BYTES:
        raise ProtocolError(f"a frame of {length} bytes is announced; at most {MAX_BYTES} are allowed")
    return int(length)


async def receive(connection: socket.socket, kind: type[M]) -> M | None:
    """The next message, or None if the peer has left. Raises ProtocolError for garbage."""
    header = await _read(connection, LENGTH.size)
    body = header and await _read(connection, body_bytes(header))
    return None if body is None else codec.decode(kind, body)


async def _read(connection: socket.socket, count: int) -> bytes | None:
    """`count` bytes, or None if the peer left before the last; a frame cut short asked for nothing."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < count:
        part = await loop.sock_recv(connection, min(count - len(data), 65536))
        if not part:
            return None
        data += part
    return bytes(data)


async def send(connection: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """Send a message and, with its first byte, `fds`, which stay the caller's. Raises OSError, TimeoutError."""
    left = memoryview(pack(message))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    async with asyncio.timeout(SEND_TIMEOUT_S):
        # One message with descriptors is on its way at a time: the kernel limits those of a user, not of a connection.
        while fds and _unread(connection):
            await asyncio.sleep(0.001)
        while left:
            try:
                sent = connection.sendmsg([left], ancillary)
            except BlockingIOError:
                await _writable(connection)
                continue
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                # The user has too many descriptors in flight; they land as peers read.
                await asyncio.sleep(0.01)
                continue
            left, ancillary = left[sent:], []


def _unread(connection: socket.socket) -> bool:
    """Whether the peer has yet to read something that was sent."""
    (waiting,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return bool(waiting)


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(connection)
