"""The client's glue: blocking calls over one gRPC channel. Never keeps state of the pool, never starts a daemon.

Owns deadlines, the retry of idempotent calls, and the translation of statuses back into exceptions. A channel may be
used by several threads at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import grpc._channel  # gRPC would import it at the first channel: several ms in the middle of a first call

from tiermem.errors import Closed, DaemonUnreachable, DeadlineExceeded, ProtocolError, TiermemError
from tiermem.rpc import codec
from tiermem.rpc.messages import ERROR_KEY, SESSION_KEY, Failure
from tiermem.rpc.methods import METHODS, PEER_KEEPALIVE_S, PEER_METHODS, Method

RETRY_PAUSES_S = (0.05, 0.15)
"""Before the second and third try of an idempotent call; together longer than the first reconnect's back-off."""

_OPTIONS = (
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),
    # Otherwise clients in one process share connections, and one client's dead connection is the next one's.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the time that one attempt to connect may take; a busy daemon needs more than the 100 ms between attempts.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_LOCAL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.default_authority", "localhost"))
_PEER_OPTIONS = (
    ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(PEER_KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PEER_KEEPALIVE_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PEER_KEEPALIVE_S * 1000)),  # where the keepalive's own is not heeded
    ("grpc.http2.max_pings_without_data", 0),  # else it asks twice, and never again until the next call
)


class Channel:
    """A connection to the pool of this host at `address` (`unix:PATH`), made when it is first used.

    `token_source` gives the session token for each call.
    """

    methods = METHODS
    serve_command = "tiermem serve"

    def __init__(self, address: str, token_source: Callable[[], bytes]) -> None:
        self.address = address
        self._token_source = token_source
        self._closed = False
        self._channel = self._connect()
        self._calls = {name: self._multicallable(method) for name, method in self.methods.items()}

    def _connect(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=_OPTIONS + _LOCAL_OPTIONS)

    def call(self, name: str, request: Any, timeout_s: float | None = None) -> Any:
        """The reply to `request`, of the class that the table gives for method `name`.

        `timeout_s` replaces the table's deadline and covers all tries. Raises what the pool's handler raised, or
        DaemonUnreachable, DeadlineExceeded, ProtocolError, Closed.
        """
        method, data = self.methods[name], codec.encode(request)
        limit = method.deadline_s if timeout_s is None else timeout_s
        deadline = None if limit is None else time.monotonic() + limit
        for pause in (*(RETRY_PAUSES_S if method.idempotent else ()), None):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                return codec.decode(method.reply, self._invoke(method, data, left))
            except grpc.RpcError as error:
                if pause is None or not _is_transport_failure(error) or self._closed:
                    raise self._exception(method, error, limit) from None
            time.sleep(pause if left is None else min(pause, left))
        raise AssertionError("the last try returns or raises")

    def stream(self, name: str, request: Any) -> Stream:
        """Start a streaming method; the client's leases live as long as its `Attach`. Iterating it raises errors."""
        method = self.methods[name]
        return Stream(self, method, self._invoke(method, codec.encode(request), None))

    def close(self) -> None:
        """End all calls and streams; they and later ones raise Closed."""
        self._closed = True
        self._channel.close()

    def _multicallable(self, method: Method) -> Any:
        create: Any = self._channel.unary_stream if method.streams else self._channel.unary_unary
        return create(method.path)

    def _invoke(self, method: Method, data: bytes, timeout_s: float | None) -> Any:
        token = self._token_source()
        try:
            return self._calls[method.name](data, timeout=timeout_s, metadata=((SESSION_KEY, token),))
        except ValueError:
            # How gRPC says that its channel is closed.
            if self._closed:
                raise self._closed_error() from None
            raise

    def _closed_error(self) -> Closed:
        return Closed(f"the connection to the pool at {self.address} is closed; connect again")

    def _exception(self, method: Method, error: grpc.RpcError, limit: float | None) -> TiermemError:
        failure = _failure_in(error)
        if failure is not None:
            return codec.error_of(failure)
        status, details = error.code(), error.details()
        if self._closed:
            return self._closed_error()
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            given = "its deadline" if limit is None else f"{limit:g} s"
            return DeadlineExceeded(f"{method.name}: the pool at {self.address} gave no answer within {given}")
        if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return DaemonUnreachable(
                f"no pool answers {method.name} at {self.address} ({details}); start it with: {self.serve_command}"
            )
        if status in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED):
            return ProtocolError(f"{method.name} is refused by what answers at {self.address}: {details}")
        return TiermemError(f"{method.name} failed at {self.address}: {status.name} {details}")


class PeerChannel(Channel):
    """A connection to another host's pool at `address` (HOST:PORT), by the methods that peers have.

    `tls`: key, certificate and CA, in PEM; None talks in the clear.
    """

    methods = PEER_METHODS
    serve_command = "tiermem serve --listen"

    def __init__(self, address: str, token_source: Callable[[], bytes], tls: tuple[bytes, bytes, bytes] | None) -> None:
        self._tls = tls
        super().__init__(address, token_source)

    def _connect(self) -> grpc.Channel:
        options = _OPTIONS + _PEER_OPTIONS
        if self._tls is None:
            return grpc.insecure_channel(self.address, options=options)
        key, certificate, authority = self._tls
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return grpc.secure_channel(self.address, credentials, options=options)


class Stream(Iterator[Any]):
    """The events of a streaming call. Iteration ends when the pool ends the stream or `cancel` was called.

    It raises what the pool raised, DaemonUnreachable when the connection broke, Closed when the channel was closed.
    """

    def __init__(self, channel: Channel, method: Method, stream: Any) -> None:
        self._channel, self._method, self._stream = channel, method, stream
        self._cancelled = False

    def __next__(self) -> Any:
        try:
            data = next(self._stream)
        except grpc.RpcError as error:
            if self._cancelled:
                raise StopIteration from None
            raise self._channel._exception(self._method, error, None) from None
        return codec.decode(self._method.reply, data)

    def follow(self, on_event: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """Leave the rest of the stream to a thread, which calls `on_event` for each event, and `on_end` when the stream
        has ended, however it ended."""
        threading.Thread(target=self._run, args=(on_event, on_end), name="tiermem-stream", daemon=True).start()

    def _run(self, on_event: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        with suppress(TiermemError):
            for event in self:
                on_event(event)
        on_end()

    def cancel(self) -> None:
        """End the stream, and with that of Attach the client's leases; from any thread."""
        self._cancelled = True
        self._stream.cancel()


def _failure_in(error: Any) -> Failure | None:
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            return codec.decode(Failure, value)
    return None


def _is_transport_failure(error: Any) -> bool:
    return error.code() is grpc.StatusCode.UNAVAILABLE and _failure_in(error) is None
