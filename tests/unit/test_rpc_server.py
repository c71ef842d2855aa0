"""Server and channel over a real Unix socket: calls, errors, sessions, hostile bodies, the life of a stream."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tiermem import errors
from tiermem.rpc import channel as channel_module
from tiermem.rpc import codec, messages
from tiermem.rpc.channel import Channel
from tiermem.rpc.messages import AttachEvent, AttachRequest, LoadReply, LoadRequest, PinReply, StatusReply
from tiermem.rpc.methods import METHODS
from tiermem.rpc.server import create_server

TOKEN = b"\0token\xff"


class FakePool:
    """Handlers that say what they were called with. `fail` is raised by load, `seen` counts calls by name."""

    def __init__(self) -> None:
        self.fail: BaseException | None = None
        self.seen: list[str] = []
        self.attached = threading.Event()
        self.detached = threading.Event()

    async def attach(self, request: AttachRequest, session: str) -> AsyncGenerator[AttachEvent, None]:
        try:
            yield AttachEvent("attached", pool_id=session, protocol=request.protocol)
            if request.pid:
                yield AttachEvent("ping")
            self.attached.set()
            if request.protocol != messages.PROTOCOL:
                raise errors.ProtocolError("speak 1")
            if not request.pid:
                return
            await asyncio.Event().wait()
        finally:
            self.detached.set()

    async def load(self, request: LoadRequest, session: str) -> LoadReply:
        self.seen.append("load")
        if self.fail is not None:
            raise self.fail
        return LoadReply("id", request.name or session, 1, 2, 3, 4)

    async def wait(self, request: messages.WaitRequest, session: str) -> messages.WaitReply:
        try:
            await asyncio.sleep(60)
        finally:
            self.detached.set()
        raise AssertionError

    async def pin(self, request: messages.PinRequest, session: str) -> PinReply:
        self.seen.append("pin")
        return PinReply(1)

    async def status(self, request: messages.StatusRequest, session: str) -> StatusReply:
        return StatusReply({"blob": bytes(5 << 20)} if request.name == "large" else {"session": session})

    async def unused(self, request: Any, session: str) -> Any:
        raise NotImplementedError

    async def watch(self, request: messages.WatchRequest, session: str) -> AsyncGenerator[messages.WatchEvent, None]:
        raise NotImplementedError
        yield

    async def release(self, request: messages.ReleaseRequest, session: str) -> Any:
        return object()

    unpin: Any = pin
    evict: Any = release
    remove: Any = release
    open = report = heat = paths = policyset = policylog = imagecreate = imageseal = imageopen = unused
    replicas = digests = unused


class Served:
    """A server on an event loop that runs in another thread."""

    def __init__(self, directory: str, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = FakePool()
        self.address = f"unix:{directory}/grpc"
        self._loop = loop
        self._server: Any = None
        self.start()

    def start(self) -> None:
        self._run(self._start)

    def stop(self) -> None:
        self._run(lambda: self._server.stop(None))

    async def _start(self) -> None:
        self._server = create_server(self.pool, {TOKEN: "session"}.get)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    def _run(self, work: Callable[[], Any]) -> None:
        async def call() -> None:
            await work()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all tests: gRPC's loops share a completion socket, and each is woken in vain by the others' events."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def served(loop: asyncio.AbstractEventLoop) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as directory:
        served = Served(directory, loop)
        yield served
        served.stop()


@contextmanager
def connected(served: Served, token: bytes = TOKEN) -> Iterator[Channel]:
    channel = Channel(served.address, lambda: token)
    yield channel
    channel.close()


@contextmanager
def raw_channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address, options=(("grpc.max_send_message_length", -1),)) as channel:
        yield channel


def raw_error(channel: grpc.Channel, path: str, body: bytes, token: bytes | None = TOKEN) -> tuple[Any, Any]:
    """Status and carried exception of a call that is made past our own channel."""
    metadata = () if token is None else ((messages.SESSION_KEY, token),)
    call: Any = channel.unary_unary(path)  # type: ignore[call-arg]
    with pytest.raises(grpc.RpcError) as caught:
        call(body, metadata=metadata, timeout=20)
    error: Any = caught.value
    carried = dict(error.trailing_metadata()).get(messages.ERROR_KEY)
    return error.code(), carried and codec.error_of(codec.decode(messages.Failure, carried))


def test_a_call_reaches_the_handler_with_its_session(served: Served) -> None:
    with connected(served) as channel:
        assert channel.call("Load", LoadRequest("/m")) == LoadReply("id", "session", 1, 2, 3, 4)
        assert channel.call("Load", LoadRequest("/m", name="n")).name == "n"
        assert channel.call("Status", messages.StatusRequest()).body == {"session": "session"}


def test_a_reply_may_be_larger_than_grpc_s_own_limit(served: Served) -> None:
    with connected(served) as channel:
        assert channel.call("Status", messages.StatusRequest("large")).body == {"blob": bytes(5 << 20)}


@pytest.mark.parametrize("kind", errors.BY_CODE.values())
def test_an_exception_of_the_handler_is_raised_by_the_call_and_never_retried(
    served: Served, kind: type[errors.TiermemError]
) -> None:
    served.pool.fail = kind("/pfäd: what; do this")
    with connected(served) as channel, pytest.raises(errors.TiermemError) as caught:
        channel.call("Load", LoadRequest("/m"))
    assert (type(caught.value), str(caught.value)) == (kind, "/pfäd: what; do this")
    assert served.pool.seen == ["load"]


def test_the_longest_error_fits_into_the_trailers(served: Served) -> None:
    served.pool.fail = errors.CheckpointNotFound("ä" * 9000)
    with connected(served) as channel, pytest.raises(errors.CheckpointNotFound, match=r"^ä{1536}$"):
        channel.call("Load", LoadRequest("/m"))


def test_a_defect_in_a_handler_is_internal_logged_and_survived(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.pool.fail = RuntimeError("secret")
    with connected(served) as channel:
        with pytest.raises(errors.TiermemError, match="Load failed in the pool: RuntimeError") as caught:
            channel.call("Load", LoadRequest("/m"))
        with pytest.raises(errors.ProtocolError, match="object cannot be encoded"):
            channel.call("Release", messages.ReleaseRequest("l"))
        served.pool.fail = None
        assert channel.call("Load", LoadRequest("/m")).tensors == 1
    assert "secret" not in str(caught.value)
    assert "RuntimeError: secret" in caplog.text


def test_an_unknown_method_says_what_the_pool_speaks(served: Served) -> None:
    with raw_channel(served) as channel:
        for path in ("/tiermem.Pool/Format", "/other.Service/Load"):
            status, error = raw_error(channel, path, b"")
            assert status is grpc.StatusCode.UNIMPLEMENTED
            assert type(error) is errors.ProtocolError
            assert "protocol 1: Attach, Load" in str(error)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.streams])
def test_a_garbage_body_is_an_invalid_argument(served: Served, name: str) -> None:
    with raw_channel(served) as channel:
        for body in (b"", b"\xc1", b"\x81\xa1x\1", b"\x80\x80", os.urandom(64)):
            status, error = raw_error(channel, METHODS[name].path, body)
            assert (status, type(error)) == (grpc.StatusCode.INVALID_ARGUMENT, errors.ProtocolError)


def test_an_oversized_body_is_refused_by_both_ends(served: Served) -> None:
    with raw_channel(served) as channel:
        status, _ = raw_error(channel, METHODS["Load"].path, bytes(codec.MAX_MESSAGE_BYTES + 1))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    with connected(served) as ours:
        with pytest.raises(errors.ProtocolError, match="LoadRequest has"):
            ours.call("Load", LoadRequest("x" * codec.MAX_MESSAGE_BYTES))
        assert ours.call("Load", LoadRequest("/m")).tensors == 1


@pytest.mark.parametrize(("token", "word"), [(None, "no session token"), (b"wrong", "an unknown session token")])
def test_without_a_session_nothing_is_served(served: Served, token: bytes | None, word: str) -> None:
    with raw_channel(served) as channel:
        for method in METHODS.values():
            status, error = raw_error(channel, method.path, codec.encode(LoadRequest("/m")), token)
            assert status is grpc.StatusCode.UNAUTHENTICATED
            assert type(error) is errors.SessionUnknown
            assert word in str(error)
    assert served.pool.seen == []


def test_a_passed_deadline_names_the_time_and_cancels_the_handler(served: Served) -> None:
    with connected(served) as channel, pytest.raises(errors.DeadlineExceeded, match=r"Wait: .* within 0.1 s"):
        channel.call("Wait", messages.WaitRequest("l"), timeout_s=0.1)
    assert served.pool.detached.wait(1)


def test_nobody_at_the_address_is_unreachable_with_advice(tmp_path: Path) -> None:
    channel = Channel(f"unix:{tmp_path}/none", lambda: TOKEN)
    began = time.monotonic()
    with pytest.raises(errors.DaemonUnreachable, match=r"/none .*start it with: tiermem serve"):
        channel.call("Pin", messages.PinRequest("m"))
    assert time.monotonic() - began < 1
    channel.close()


def test_an_idempotent_call_outlives_a_restart_of_the_pool_and_others_do_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "RETRY_PAUSES_S", (0.6, 1.2))
    with connected(served) as channel:
        channel.call("Load", LoadRequest("/m"))
        served.stop()
        with pytest.raises(errors.DaemonUnreachable):
            channel.call("Pin", messages.PinRequest("m"))
        restart = threading.Timer(0.3, served.start)
        restart.start()
        assert channel.call("Load", LoadRequest("/m")).tensors == 1
        restart.join()
    assert served.pool.seen == ["load", "load"]


def test_retries_stay_within_the_time_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "RETRY_PAUSES_S", (30.0, 30.0))
    channel = Channel(f"unix:{tmp_path}/none", lambda: TOKEN)
    began = time.monotonic()
    with pytest.raises((errors.DaemonUnreachable, errors.DeadlineExceeded)):
        channel.call("Load", LoadRequest("/m"), timeout_s=0.2)
    assert time.monotonic() - began < 2
    channel.close()


def test_a_closed_channel_says_so_also_to_a_call_in_progress(served: Served) -> None:
    channel = Channel(served.address, lambda: TOKEN)
    closing = threading.Timer(0.2, channel.close)
    closing.start()
    with pytest.raises(errors.Closed, match="connect again"):
        channel.call("Wait", messages.WaitRequest("l"))
    with pytest.raises(errors.Closed):
        channel.call("Load", LoadRequest("/m"))
    closing.join()


def test_a_stream_ends_when_the_pool_ends_it_and_raises_what_the_pool_raises(served: Served) -> None:
    with connected(served) as channel:
        assert [event.pool_id for event in channel.stream("Attach", AttachRequest(1, pid=0))] == ["session"]
        stream = channel.stream("Attach", AttachRequest(7, pid=1))
        assert [next(stream).kind, next(stream).kind] == ["attached", "ping"]
        with pytest.raises(errors.ProtocolError, match="speak 1"):
            next(stream)


def test_a_cancelled_stream_ends_and_the_pool_notices(served: Served) -> None:
    with connected(served) as channel:
        stream = channel.stream("Attach", AttachRequest(1, pid=1))
        assert next(stream).kind == "attached"
        assert served.pool.attached.wait(1)
        assert not served.pool.detached.is_set()
        stream.cancel()
        assert list(stream) == []
        assert served.pool.detached.wait(1)


def test_the_end_of_a_stream_is_told_though_events_are_unread(served: Served) -> None:
    ended = threading.Event()
    with connected(served) as channel:
        stream = channel.stream("Attach", AttachRequest(1, pid=1))
        next(stream)
        assert served.pool.attached.wait(1)
        stream.follow(lambda event: None, ended.set)
        assert not ended.wait(0.1)
        served.stop()
        assert ended.wait(2)


def test_a_stream_whose_pool_stops_raises_unreachable(served: Served) -> None:
    with connected(served) as channel:
        stream = channel.stream("Attach", AttachRequest(1, pid=1))
        next(stream)
        served.stop()
        with pytest.raises(errors.DaemonUnreachable):
            list(stream)
    assert served.pool.detached.wait(1)


CLIENT = """
import sys, time
from tiermem.rpc.channel import Channel
from tiermem.rpc.messages import AttachRequest
stream = Channel(sys.argv[1], lambda: bytes.fromhex(sys.argv[2])).stream("Attach", AttachRequest(1, 1))
next(stream); print("attached", flush=True); time.sleep(60)
"""


def test_a_killed_client_is_noticed_within_a_second(served: Served) -> None:
    command = [sys.executable, "-c", CLIENT, served.address, TOKEN.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "attached\n"
        assert not served.pool.detached.is_set()
        client.send_signal(signal.SIGKILL)
        assert served.pool.detached.wait(1)
