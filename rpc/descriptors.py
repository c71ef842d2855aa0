"""The descriptor socket: descriptors of segment files, and the session's token, over a Unix socket beside gRPC.

Owns both ends and every descriptor in transit. It opens no segment and decides nothing about who may have one. A
session lives as long as its connection.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Generic, NoReturn, ParamSpec, TypeVar

from tiermem.errors import (
    AccessDenied,
    Closed,
    DaemonUnreachable,
    DeadlineExceeded,
    ProtocolError,
    Refused,
    TiermemError,
)
from tiermem.rpc import codec, frames
from tiermem.rpc.messages import PROTOCOL, DescriptorHello, DescriptorReply, DescriptorRequest, DescriptorWelcome

MAX_CONNECTIONS = 1024
HELLO_TIMEOUT_S = 5.0

_CREDENTIALS = struct.Struct("3i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * frames.MAX_DESCRIPTORS)
_LOG = logging.getLogger(__name__)

M = TypeVar("M")
P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


class DescriptorClient:
    """A blocking connection to a pool's descriptor socket. Threads may share it: each waits for its turn."""

    def __init__(self, path: str, timeout_s: float = 5.0) -> None:
        """Connect and say hello; `token` then authorises calls. `timeout_s` bounds each wait, here and in `fetch`.

        Raises DaemonUnreachable, AccessDenied, DeadlineExceeded, ProtocolError, or what the pool answers.
        """
        self.path = path
        self._turn = threading.Lock()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(timeout_s)
        try:
            self.token = self._greet()
        except BaseException:
            self.close()
            raise

    def fetch(self, lease_id: str, indices: Iterable[int]) -> dict[int, int]:
        """Segment index -> a new close-on-exec descriptor, which the caller closes.

        Raises what the pool answers, and serves on; or DaemonUnreachable, DeadlineExceeded, ProtocolError, which end
        the connection. When it raises, no descriptor stays open.
        """
        wanted = set(indices)
        fetched: dict[int, int] = {}
        failure = None
        with self._turn:
            try:
                if wanted:
                    self._send(DescriptorRequest(lease_id, tuple(sorted(wanted))))
                while failure is None and fetched.keys() != wanted:
                    reply, fds = self._receive(DescriptorReply)
                    fresh = dict(zip(reply.segments, fds, strict=False))
                    failure = reply.error
                    if len(fresh) != max(len(reply.segments), len(fds)) or not fresh.keys() <= wanted - fetched.keys():
                        _close_all(fds)
                        raise ProtocolError(f"{self.path}: {len(fds)} descriptors came as segments {reply.segments}")
                    if not fresh and failure is None:
                        raise ProtocolError(f"{self.path}: an answer brought neither descriptors nor an error")
                    fetched |= fresh
            except BaseException:
                # What is still to come would be taken for the answer to the next request.
                self.close()
                _close_all(fetched.values())
                raise
        if failure is not None:
            _close_all(fetched.values())
            raise codec.error_of(failure)
        return fetched

    def close(self) -> None:
        """End the connection and with it the session. Descriptors that were fetched stay open."""
        self._connection.close()

    def _greet(self) -> bytes:
        try:
            self._connection.connect(self.path)
        except PermissionError:
            raise AccessDenied(
                f"{self.path} is another user's pool; run as that user or start a pool of your own"
            ) from None
        except OSError as error:
            raise DaemonUnreachable(
                f"no pool listens at {self.path} ({error.strerror or error}); start it with: tiermem serve"
            ) from None
        with suppress(DaemonUnreachable):  # refused before the hello: the reason is there to be read
            self._send(DescriptorHello(PROTOCOL))
        welcome, fds = self._receive(DescriptorWelcome)
        _close_all(fds)
        if welcome.error is not None:
            raise codec.error_of(welcome.error)
        if not welcome.token:
            raise ProtocolError(f"{self.path}: the welcome holds no token")
        return welcome.token

    def _send(self, message: object) -> None:
        frame = frames.pack(message)
        try:
            self._connection.sendall(frame)
        except OSError as error:
            self._fail(error)

    def _receive(self, kind: type[M]) -> tuple[M, list[int]]:
        fds: list[int] = []
        try:
            body = self._read(frames.body_bytes(self._read(frames.LENGTH.size, fds)), fds)
            return codec.decode(kind, body), fds
        except BaseException:
            _close_all(fds)
            raise

    def _read(self, count: int, fds: list[int]) -> bytes:
        """`count` bytes; descriptors that came with them are appended to `fds`."""
        data = bytearray()
        while len(data) < count:
            try:
                part, ancillary, flags, _ = self._connection.recvmsg(
                    count - len(data), _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                self._fail(error)
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += array.array("i", payload[: len(payload) - len(payload) % 4])
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(
                    f"{self.path}: descriptors were lost; is the limit of open files (ulimit -n) reached?"
                )
            if not part:
                raise DaemonUnreachable(f"the pool at {self.path} closed the connection; is it still running?")
            data += part
        return bytes(data)

    def _fail(self, error: OSError) -> NoReturn:
        if self._connection.fileno() < 0:
            raise Closed(f"the connection to {self.path} is closed; connect again") from None
        if isinstance(error, TimeoutError):
            limit = self._connection.gettimeout() or 0.0
            raise DeadlineExceeded(f"the pool at {self.path} gave no answer within {limit:g} s") from None
        raise DaemonUnreachable(f"the connection to the pool at {self.path} broke: {error.strerror or error}") from None


class DescriptorServer(Generic[S]):
    """The pool's end: one task per connection on the running event loop, which it never blocks.

    `on_connect(pid, uid)` gives the token and the session of a new connection, or raises a TiermemError to refuse it;
    `on_disconnect(session)` follows whenever it has returned. `lookup(session, lease_id, indices)` gives as many
    descriptors, in that order, which the server closes once they are sent; a TiermemError of it is the client's answer.
    All three are called on the loop and must not block.
    """

    def __init__(
        self,
        on_connect: Callable[[int, int], tuple[bytes, S]],
        lookup: Callable[[S, str, Sequence[int]], list[int]],
        on_disconnect: Callable[[S], None],
    ) -> None:
        self._on_connect, self._lookup, self._on_disconnect = on_connect, lookup, on_disconnect
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._path = ""

    async def start(self, path: str) -> None:
        """Listen at `path`, mode 0600; a socket that a dead pool left there is replaced. Raises Refused."""
        listener = _listen(path)
        self._path = path
        self._accepting = asyncio.create_task(self._accept(listener))

    async def stop(self) -> None:
        """End all connections, which ends their sessions, and remove the socket."""
        tasks = [*self._connections, *filter(None, [self._accepting])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:
                    _LOG.error("cannot accept a client at %s: %s", self._path, error)
                    await asyncio.sleep(0.1)
                    continue
                task = loop.create_task(self._serve(connection, crowded=len(self._connections) >= MAX_CONNECTIONS))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket, crowded: bool) -> None:
        with connection:
            try:
                if crowded:
                    raise Refused(f"the pool has {MAX_CONNECTIONS} clients, and takes no more until one of them leaves")
                await self._converse(connection)
            except TiermemError as error:
                with suppress(OSError):
                    await frames.send(connection, DescriptorReply(error=codec.failure_of(error)))
            except OSError as error:
                _LOG.debug("a client left: %s", error)

    async def _converse(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in (os.geteuid(), 0):
            raise AccessDenied(f"this pool serves user {os.geteuid()}, not {uid}; start a pool of your own")
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await frames.receive(connection, DescriptorHello)
        except TimeoutError:
            raise DeadlineExceeded(f"no hello came within {HELLO_TIMEOUT_S:g} s") from None
        if hello is None:
            return
        if hello.protocol != PROTOCOL:
            raise ProtocolError(f"client speaks protocol {hello.protocol}, the pool {PROTOCOL}; upgrade the older one")
        token, session = _ask(self._on_connect, pid, uid)
        try:
            await frames.send(connection, DescriptorWelcome(token=token))
            while (request := await frames.receive(connection, DescriptorRequest)) is not None:
                await self._answer(connection, session, request)
        finally:
            _ask(self._on_disconnect, session)

    async def _answer(self, connection: socket.socket, session: S, request: DescriptorRequest) -> None:
        if not request.segments:
            raise ProtocolError("DescriptorRequest.segments is empty")
        # One batch of descriptors is open at a time, however many are asked for.
        for start in range(0, len(request.segments), frames.MAX_DESCRIPTORS):
            indices = request.segments[start : start + frames.MAX_DESCRIPTORS]
            try:
                fds = _ask(self._lookup, session, request.lease_id, indices)
            except TiermemError as error:
                await frames.send(connection, DescriptorReply(error=codec.failure_of(error)))
                return
            try:
                await frames.send(connection, DescriptorReply(segments=indices), fds)
            finally:
                _close_all(fds)


def _ask(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The answer of the pool behind the server; whatever else than a TiermemError it raises is a defect, and logged."""
    try:
        return function(*args, **kwargs)
    except TiermemError:
        raise
    except Exception as error:
        _LOG.exception("%s failed", function)
        raise TiermemError(f"the pool failed: {type(error).__name__}; its log has the details") from None


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        remove_stale(path)
        mask = os.umask(0o177)  # a chmod after bind would leave a moment for others to connect
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise Refused(
            f"cannot listen at {path}: {error.strerror or error}; choose another path for the socket"
        ) from None
    except BaseException:
        listener.close()
        raise
    return listener


def remove_stale(path: str) -> None:
    """Remove a socket at `path` on which nobody listens. Raises Refused for anything else that is there."""
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise Refused(f"{path} is there and is not a socket; remove it or choose another path for the socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise Refused(f"a pool already listens at {path}; stop it or choose another path for the socket")
