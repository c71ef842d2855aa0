"""The server's glue: a gRPC server over an object with one async method per row of a table. Never decides anything.

Owns decoding, the session check and the translation of exceptions into statuses. Whatever a client sends or a handler
raises, the server answers it and lives on. Clients of the host and other hosts' pools have a server each, with a table
and sessions of its own: what one gives, the other does not take.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio

from tiermem import errors
from tiermem.errors import ProtocolError, TiermemError
from tiermem.rpc import codec, messages
from tiermem.rpc import peer_messages as p
from tiermem.rpc.messages import ERROR_KEY, PROTOCOL, SESSION_KEY
from tiermem.rpc.methods import METHODS, PEER_KEEPALIVE_S, PEER_METHODS, Method

MAX_CONCURRENT_STREAMS = 1024
"""Calls in progress per connection; a client's threads share one connection."""

MAX_PEER_STREAMS = 64
MAX_PEER_REQUEST_BYTES = 1 << 20

PEER_HANDSHAKE_S = 10.0
PEER_IDLE_S = 60.0
"""A connection without a call: a peer with a session has one, its hello."""

_LOG = logging.getLogger(__name__)

_STATUS: dict[type[TiermemError], grpc.StatusCode] = {
    TiermemError: grpc.StatusCode.UNKNOWN,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.TensorNotFound: grpc.StatusCode.NOT_FOUND,
    errors.CheckpointNotFound: grpc.StatusCode.NOT_FOUND,
    errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TransportUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Closed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.SessionUnknown: grpc.StatusCode.UNAUTHENTICATED,
    errors.CheckpointError: grpc.StatusCode.DATA_LOSS,
    errors.DigestMismatch: grpc.StatusCode.DATA_LOSS,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status of an error, or of its nearest base class. Never UNAVAILABLE, which is the transport's own word."""

_Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class Handlers(Protocol[S_contra]):
    """What a server calls: one method per row of the table, with the decoded request and the caller's session.

    A stream's generator is closed as soon as the client's stream ends, however it ends: `attach`'s `finally` is the
    place where leases end.
    """

    def attach(
        self, request: messages.AttachRequest, session: S_contra
    ) -> AsyncGenerator[messages.AttachEvent, None]: ...
    async def load(self, request: messages.LoadRequest, session: S_contra) -> messages.LoadReply: ...
    async def open(self, request: messages.OpenRequest, session: S_contra) -> messages.OpenReply: ...
    async def wait(self, request: messages.WaitRequest, session: S_contra) -> messages.WaitReply: ...
    async def release(self, request: messages.ReleaseRequest, session: S_contra) -> messages.Empty: ...
    async def pin(self, request: messages.PinRequest, session: S_contra) -> messages.PinReply: ...
    async def unpin(self, request: messages.UnpinRequest, session: S_contra) -> messages.PinReply: ...
    async def evict(self, request: messages.EvictRequest, session: S_contra) -> messages.EvictReply: ...
    async def remove(self, request: messages.RemoveRequest, session: S_contra) -> messages.RemoveReply: ...
    async def report(self, request: messages.ReportRequest, session: S_contra) -> messages.Empty: ...
    async def heat(self, request: messages.HeatRequest, session: S_contra) -> messages.HeatReply: ...
    def watch(self, request: messages.WatchRequest, session: S_contra) -> AsyncGenerator[messages.WatchEvent, None]: ...
    async def status(self, request: messages.StatusRequest, session: S_contra) -> messages.StatusReply: ...


class PeerHandlers(Protocol[S_contra]):
    """What a server of peers calls. `peerhello` begins the session, with the caller in place of one."""

    def peerhello(self, request: p.HelloRequest, caller: Caller) -> AsyncGenerator[p.HelloEvent, None]: ...
    async def peerhave(self, request: p.HaveRequest, session: S_contra) -> p.HaveReply: ...
    async def peeropen(self, request: p.OpenRequest, session: S_contra) -> p.OpenReply: ...
    async def peergrant(self, request: p.GrantRequest, session: S_contra) -> p.GrantReply: ...
    async def peerwait(self, request: messages.WaitRequest, session: S_contra) -> p.WaitReply: ...
    async def peerrelease(self, request: messages.ReleaseRequest, session: S_contra) -> messages.Empty: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the transport knows it: the session token that the call carries, the names in the certificate that
    was proved (none without TLS), and the host."""

    token: bytes | None
    common_names: tuple[str, ...]
    dns_names: tuple[str, ...]
    host: str


def create_server(handlers: Handlers[S], session_of: Callable[[bytes], S | None]) -> grpc.aio.Server:
    """A server without a port, to be created and started on the running event loop.

    `session_of` turns the token that a call carries into the session that its handler gets; None refuses the call.
    """

    def known(context: _Context) -> S | None:
        token = _token(context)
        return None if token is None else session_of(token)

    options = (
        ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.so_reuseport", 0),
    )
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_Service(METHODS, handlers, known),))
    return server


def create_peer_server(
    handlers: PeerHandlers[S], session_of: Callable[[Caller], S | None], connections: int
) -> grpc.aio.Server:
    """As create_server, for other hosts' pools: `connections` of them at most, whose requests are small.

    A connection that is half open, or that asks for nothing, is closed within a bounded time.
    """
    options = (
        ("grpc.max_receive_message_length", MAX_PEER_REQUEST_BYTES),
        ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", MAX_PEER_STREAMS),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", int(PEER_HANDSHAKE_S * 1000)),
        ("grpc.max_connection_idle_ms", int(PEER_IDLE_S * 1000)),
        ("grpc.keepalive_time_ms", int(PEER_KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(PEER_KEEPALIVE_S * 1000)),
        ("grpc.http2.ping_timeout_ms", int(PEER_KEEPALIVE_S * 1000)),  # where the keepalive's own is not heeded
        ("grpc.http2.max_pings_without_data", 0),  # else it asks twice, and never again until the next call
        # Peers ask as often whether this end lives, which gRPC would take for an attack.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(PEER_KEEPALIVE_S * 500)),
        ("grpc.so_reuseport", 0),
    )
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_Service(PEER_METHODS, handlers, lambda context: session_of(_caller(context))),))
    return server


def peer_credentials(read: Callable[[], tuple[bytes, bytes, bytes]]) -> grpc.ServerCredentials:
    """Mutual TLS: a peer without a certificate of the authority gets no connection.

    `read` gives key, certificate and authority, in PEM, and is called for each connection; what is no longer the same
    object replaces what was used before.
    """
    used = read()

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([used[:2]], used[2])

    def replacement() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        now = read()
        if now is used:
            return None
        used = now
        return configuration()

    # Its stub does not know that None means no change.
    return grpc.dynamic_ssl_server_credentials(configuration(), replacement, True)  # type: ignore[arg-type]


class _Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs alone
    """Finds the handler of a call by its path."""

    def __init__(
        self, methods: Mapping[str, Method], handlers: object, session_of: Callable[[_Context], object | None]
    ) -> None:
        self._session_of = session_of
        self._methods = methods
        self._routes = {
            method.path: self._route(method, getattr(handlers, method.name.lower())) for method in methods.values()
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        known = self._routes.get(handler_call_details.method)
        return known or grpc.stream_stream_rpc_method_handler(self._refuse_unknown)

    def _route(self, method: Method, handler: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(data: bytes, context: _Context) -> bytes:
            async def work() -> bytes:
                session = self._admit(method, context)
                return codec.encode(await handler(codec.decode(method.request, data), session))

            return await _guard(method.name, context, work())

        async def stream(data: bytes, context: _Context) -> None:
            async def work() -> None:
                session = self._admit(method, context)
                # Closed here and not by the garbage collector: the end of the stream ends the client's leases.
                async with aclosing(handler(codec.decode(method.request, data), session)) as events:
                    async for event in events:
                        await context.write(codec.encode(event))

            await _guard(method.name, context, work())

        if method.streams:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(answer)

    def _admit(self, method: Method, context: _Context) -> Any:
        if method.begins:
            return _caller(context)
        session = self._session_of(context)
        if session is None:
            giver = next((method.name for method in self._methods.values() if method.begins), "descriptor socket")
            raise errors.SessionUnknown(
                f"the call carries {'an unknown' if _token(context) else 'no'} session token ({SESSION_KEY}); take one "
                f"from the pool's {giver}, anew after each restart of the pool"
            )
        return session

    async def _refuse_unknown(self, _requests: Any, context: _Context) -> None:
        known = ", ".join(self._methods)
        error = ProtocolError(f"the pool does not know this method here; it speaks protocol {PROTOCOL}: {known}")
        await _abort(context, grpc.StatusCode.UNIMPLEMENTED, error)


def _token(context: _Context) -> bytes | None:
    token = dict(context.invocation_metadata() or ()).get(SESSION_KEY)
    return token if isinstance(token, bytes) else None


def _caller(context: _Context) -> Caller:
    proved = context.auth_context()
    common, dns = (
        tuple(name.decode(errors="replace") for name in proved.get(key, ())) for key in ("x509_common_name", "peer_dns")
    )
    # `ipv4:10.0.0.2:40022`, `ipv6:%5B::1%5D:40022`
    host = unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
    return Caller(_token(context), common, dns, host)


T = TypeVar("T")


async def _guard(name: str, context: _Context, work: Awaitable[T]) -> T:
    """The result of `work`; an exception ends the call with a status instead. Cancellation passes through."""
    try:
        return await work
    except TiermemError as error:
        failure, status = error, _status_of(error)
    except Exception as error:
        if context.cancelled():
            raise
        _LOG.exception("%s failed", name)
        text = f"{name} failed in the pool: {type(error).__name__}; its log has the details"
        failure, status = TiermemError(text), grpc.StatusCode.INTERNAL
    await _abort(context, status, failure)
    raise AssertionError("abort raises")


def _status_of(error: TiermemError) -> grpc.StatusCode:
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


async def _abort(context: _Context, status: grpc.StatusCode, error: TiermemError) -> None:
    failure = codec.failure_of(error)
    # The details are for people with other tools; percent-encoding would triple what is not ASCII.
    details = failure.message.encode("ascii", "replace")[:512].decode()
    await context.abort(status, details, ((ERROR_KEY, codec.encode(failure)),))
