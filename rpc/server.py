"""The server's glue: a gRPC server over an object with one async method per row of the table. Never decides anything.

Owns decoding, the session check and the translation of exceptions into statuses. Whatever a client sends or a handler
raises, the server answers it and lives on.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from tiermem import errors
from tiermem.errors import AccessDenied, ProtocolError, TiermemError
from tiermem.rpc import codec, messages
from tiermem.rpc.messages import ERROR_KEY, PROTOCOL, SESSION_KEY
from tiermem.rpc.methods import METHODS, Method

MAX_CONCURRENT_STREAMS = 1024
"""Calls in progress per connection; a client's threads share one connection."""

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
    errors.Closed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.CheckpointError: grpc.StatusCode.DATA_LOSS,
    errors.DigestMismatch: grpc.StatusCode.DATA_LOSS,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status of an error, or of its nearest base class. Never UNAVAILABLE, which is the transport's own word."""

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


def create_server(handlers: Handlers[S], session_of: Callable[[bytes], S | None]) -> grpc.aio.Server:
    """A server without a port, to be created and started on the running event loop.

    `session_of` turns the token that a call carries into the session that its handler gets; None refuses the call.
    """
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
            # A dead local client is noticed by its socket; the pings are for clients on other hosts.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.so_reuseport", 0),
        )
    )
    server.add_generic_rpc_handlers((_Service(handlers, session_of),))
    return server


class _Unauthenticated(AccessDenied):
    """No session: crosses the wire as AccessDenied, under a status of its own."""


class _Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs alone
    """Finds the handler of a call by its path."""

    def __init__(self, handlers: Handlers[S], session_of: Callable[[bytes], S | None]) -> None:
        self._session_of = session_of
        self._routes = {
            method.path: self._route(method, getattr(handlers, method.name.lower())) for method in METHODS.values()
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return self._routes.get(handler_call_details.method) or grpc.stream_stream_rpc_method_handler(_refuse_unknown)

    def _route(self, method: Method, handler: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            async def work() -> bytes:
                session = self._admit(context)
                return codec.encode(await handler(codec.decode(method.request, data), session))

            return await _guard(method.name, context, work())

        async def stream(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            async def work() -> None:
                session = self._admit(context)
                # Closed here and not by the garbage collector: the end of the stream ends the client's leases.
                async with aclosing(handler(codec.decode(method.request, data), session)) as events:
                    async for event in events:
                        await context.write(codec.encode(event))

            await _guard(method.name, context, work())

        if method.streams:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(answer)

    def _admit(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Any:
        token = dict(context.invocation_metadata() or ()).get(SESSION_KEY)
        session = self._session_of(token) if isinstance(token, bytes) else None
        if session is None:
            raise _Unauthenticated(
                f"the call carries {'an unknown' if token else 'no'} session token ({SESSION_KEY}); "
                "take one from the pool's descriptor socket, anew after each restart of the pool"
            )
        return session


T = TypeVar("T")


async def _guard(name: str, context: grpc.aio.ServicerContext[bytes, bytes], work: Awaitable[T]) -> T:
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
    if isinstance(error, _Unauthenticated):
        return grpc.StatusCode.UNAUTHENTICATED
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], status: grpc.StatusCode, error: TiermemError) -> None:
    failure = codec.failure_of(error)
    # The details are for people with other tools; percent-encoding would triple what is not ASCII.
    details = failure.message.encode("ascii", "replace")[:512].decode()
    await context.abort(status, details, ((ERROR_KEY, codec.encode(failure)),))


async def _refuse_unknown(_requests: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    error = ProtocolError(f"the pool does not know this method; it speaks protocol {PROTOCOL}: {', '.join(METHODS)}")
    await _abort(context, grpc.StatusCode.UNIMPLEMENTED, error)
