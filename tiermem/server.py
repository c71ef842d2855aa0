"""Server: a pool behind two Unix sockets, gRPC for control and one for descriptors, and for other hosts' pools behind
TCP (peer_service). Decides nothing about weights.

The event loop never waits for I/O: what may block runs on threads, and a wait for bytes is a future of the pool.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import secrets
import signal
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from tiermem.catalog import ModelRecord
from tiermem.config import Config, descriptor_path, socket_path
from tiermem.digests import DIGEST_BYTES
from tiermem.errors import ConfigError, ProtocolError, Refused
from tiermem.images import Images
from tiermem.lease import Opened, Session
from tiermem.metrics import MetricsServer
from tiermem.observer import Observer
from tiermem.opener import Opener, ready_bits, until_ready
from tiermem.peer_listener import serve_peers
from tiermem.pool import Pool
from tiermem.rpc import messages as m
from tiermem.rpc.descriptors import DescriptorServer, remove_stale
from tiermem.rpc.replica_messages import CarryOrder, DigestsReply, DigestsRequest, ReplicasRequest
from tiermem.rpc.server import create_server
from tiermem.status import heat_of, moves_of, paths_of, status_of

_THREADS = 16
_STOP_GRACE_S = 1.0
_log = logging.getLogger(__name__)


class PoolService:
    """The methods of rpc/methods.py over a pool; one session per client."""

    def __init__(self, pool: Pool, config: Config) -> None:
        """On the running event loop. Raises ConfigError where the sampler that `config` names is not to be had."""
        self.pool = pool
        self._images = Images(pool)
        loop = asyncio.get_running_loop()
        self._attached: set[asyncio.Event] = set()
        self._observer = Observer(pool, config, lambda: loop.call_soon_threadsafe(self._order))
        self._sessions: dict[bytes, Session] = {}
        self._opener = Opener(pool, ThreadPoolExecutor(_THREADS, "tiermem-rpc"))
        self._blocking = self._opener.blocking

    def close(self) -> None:
        self._observer.close()

    def session_of(self, token: bytes) -> Session | None:
        return self._sessions.get(token)

    def connected(self, pid: int, uid: int) -> tuple[bytes, Session]:
        token, session = secrets.token_bytes(16), Session(pid, uid)
        self._sessions[token] = session
        return token, session

    def disconnected(self, session: Session) -> None:
        self._sessions = {token: other for token, other in self._sessions.items() if other is not session}
        self.pool.end_session(session)

    def descriptors(self, session: Session, lease_id: str, segments: Sequence[int]) -> list[int]:
        return self.pool.share(self.pool.lease(session, lease_id), segments)

    async def attach(self, request: m.AttachRequest, session: Session) -> AsyncGenerator[m.AttachEvent, None]:
        if request.protocol != m.PROTOCOL:
            raise ProtocolError(
                f"the client speaks protocol {request.protocol}, this pool {m.PROTOCOL}; upgrade the older one"
            )
        refused = tuple(
            lease.lease_id
            for lease in request.leases
            if not self.pool.announce(session, lease.lease_id, lease.model_id)
        )
        loop, changed, orders = asyncio.get_running_loop(), asyncio.Event(), deque[CarryOrder]()

        def put(order: CarryOrder) -> None:
            orders.append(order)
            changed.set()

        self._attached.add(changed)
        session.give = lambda order: loop.call_soon_threadsafe(put, order)
        try:
            yield m.AttachEvent("attached", self.pool.id, m.PROTOCOL, refused)
            told: m.SamplingOrder | None = None
            while True:
                changed.clear()
                if told != (told := self._observer.order):
                    yield m.AttachEvent("sample", sampling=told)
                while orders:
                    yield m.AttachEvent("carry", carry=orders.popleft())
                await changed.wait()
        finally:
            self._attached.discard(changed)
            self.pool.end_session(session)

    async def load(self, request: m.LoadRequest, session: Session) -> m.LoadReply:
        record, _ = await self._blocking(self.pool.load, request.path, request.name, request.layers)
        manifest, ready = record.manifest, record.ready
        ready_bytes = sum(t.nbytes for t, r in zip(manifest.tensors, ready, strict=True) if r)
        return m.LoadReply(
            record.id, record.name, len(manifest.tensors), len(manifest.segments), manifest.nbytes, ready_bytes
        )

    async def open(self, request: m.OpenRequest, session: Session) -> m.OpenReply:
        pool = self.pool
        reply, _ = await self._open(lambda: (pool.open(session, request.path, request.name, request.layers), False))
        return reply

    async def imagecreate(self, request: m.ImageCreateRequest, session: Session) -> m.ImageCreateReply:
        asked = (request.fingerprint, request.tensors, request.name, request.metadata)
        reply, draft = await self._open(lambda: self._images.create(session, *asked))
        return m.ImageCreateReply(draft, reply)

    async def imageseal(self, request: m.ImageSealRequest, session: Session) -> m.Empty:
        future = await self._blocking(self._images.seal, self.pool.lease(session, request.lease_id))
        await asyncio.shield(asyncio.wrap_future(future))
        return m.Empty()

    async def imageopen(self, request: m.ImageOpenRequest, session: Session) -> m.OpenReply:
        images = self._images
        reply, _ = await self._open(lambda: (images.open(session, request.fingerprint, request.name), False))
        return reply

    async def paths(self, request: m.PathsRequest, session: Session) -> m.PathsReply:
        return m.PathsReply(await self._blocking(paths_of, self.pool, request.name))

    async def wait(self, request: m.WaitRequest, session: Session) -> m.WaitReply:
        lease = self.pool.lease(session, request.lease_id)
        future = await self._blocking(self.pool.when_ready, lease, request.tensors)
        await until_ready(future, request.timeout_s)
        record = self.pool.record(lease)
        return m.WaitReply(ready_bits(record), _grants(record))

    async def release(self, request: m.ReleaseRequest, session: Session) -> m.Empty:
        # A lease that ended already is what the caller wants; refusing it would make a repeated call an error.
        with suppress(Refused):
            self.pool.release(self.pool.lease(session, request.lease_id))
        return m.Empty()

    async def pin(self, request: m.PinRequest, session: Session) -> m.PinReply:
        return m.PinReply(await self._blocking(self.pool.pin, request.name))

    async def unpin(self, request: m.UnpinRequest, session: Session) -> m.PinReply:
        return m.PinReply(await self._blocking(self.pool.unpin, request.name))

    async def evict(self, request: m.EvictRequest, session: Session) -> m.EvictReply:
        return m.EvictReply(await self._blocking(self.pool.evict, request.name))

    async def remove(self, request: m.RemoveRequest, session: Session) -> m.RemoveReply:
        return m.RemoveReply(await self._blocking(self.pool.remove, request.name))

    async def report(self, request: m.ReportRequest, session: Session) -> m.Empty:
        await self._blocking(self.pool.report, session, request)
        return m.Empty()

    async def replicas(self, request: ReplicasRequest, session: Session) -> m.Empty:
        await self._blocking(self.pool.tiering.report, session, request)
        return m.Empty()

    async def digests(self, request: DigestsRequest, session: Session) -> DigestsReply:
        record = self.pool.record(self.pool.lease(session, request.lease_id))
        return DigestsReply(b"".join(digest or bytes(DIGEST_BYTES) for digest in record.digests))

    async def heat(self, request: m.HeatRequest, session: Session) -> m.HeatReply:
        found = await self._blocking(heat_of, self.pool, request.name)
        columns = found.columns
        layers, pages = zip(*found.layers, strict=True) if found.layers else ((), ())
        return m.HeatReply(
            layers, pages, columns.sampled.tobytes(), columns.observed.tobytes(), columns.rate.tobytes(),
            columns.age_s.tobytes(), columns.sampled_age_s.tobytes(), columns.rung.tobytes(), found.tiers,
            found.tier.tobytes(),
        )  # fmt: skip

    async def policyset(self, request: m.PolicySetRequest, session: Session) -> m.PolicySetReply:
        return m.PolicySetReply(tuple(await self._blocking(self.pool.tiering.steering.set, request.name)))

    async def policylog(self, request: m.PolicyLogRequest, session: Session) -> m.PolicyLogReply:
        return m.PolicyLogReply(await self._blocking(moves_of, self.pool, request.model, request.page, request.limit))

    async def watch(self, request: m.WatchRequest, session: Session) -> AsyncGenerator[m.WatchEvent, None]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()
        watcher = await self._blocking(self.pool.watch, lambda: loop.call_soon_threadsafe(more.set))
        try:
            with self._observer.wish(request.epoch_s, request.budget):
                while await more.wait():
                    more.clear()
                    while any(taken := watcher.take()):
                        yield m.WatchEvent(*taken)
        finally:
            self.pool.journal.unwatch(watcher)

    async def status(self, request: m.StatusRequest, session: Session) -> m.StatusReply:
        return m.StatusReply(await self._blocking(status_of, self.pool, request.name))

    async def _open(self, open_: Callable[[], tuple[Opened, bool]]) -> tuple[m.OpenReply, bool]:
        """What an open gives the client, and whether it is a draft."""
        opened, manifest, draft = await self._opener.open(open_)
        record, lease = opened.record, opened.lease
        reply = m.OpenReply(
            lease.id, record.id, record.name, manifest, _grants(record), ready_bits(record), opened.files
        )
        return reply, draft

    def _order(self) -> None:
        for changed in self._attached:
            changed.set()


def _grants(record: ModelRecord) -> tuple[m.SegmentGrant, ...]:
    return tuple(
        m.SegmentGrant(key, i, segment.page_bytes)
        for i, (key, segment) in enumerate(zip(record.keys, record.manifest.segments, strict=True))
        if key is not None
    )


async def serve(config: Config, on_ready: Callable[[Pool], None]) -> None:
    """Run a pool's daemon until SIGTERM or SIGINT. `on_ready` is called once clients can connect.

    Raises Refused where another daemon has the address or the state directory, and ConfigError.
    """
    path = socket_path(config.address)
    os.umask(0o077)
    _raise_file_limit()
    for directory in (path.parent, config.state):
        _make_directory(directory)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as ending:
        ending.callback(os.close, _lock(Path(f"{path}.lock"), config.address))
        ending.callback(os.close, _lock(config.state / "lock", str(config.state)))
        pool = await loop.run_in_executor(None, Pool, config)
        ending.push_async_callback(loop.run_in_executor, None, pool.close)
        service = PoolService(pool, config)
        ending.callback(service.close)
        if config.metrics_port:
            ending.callback(MetricsServer(pool, config.metrics_port).close)
        control = create_server(service, service.session_of)
        remove_stale(str(path))  # gRPC itself would unlink whatever is there
        try:
            control.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen at {config.address}: {error}; choose another --address") from error
        ending.callback(path.unlink, missing_ok=True)
        await control.start()
        ending.push_async_callback(control.stop, _STOP_GRACE_S)
        descriptors = DescriptorServer(service.connected, service.descriptors, service.disconnected)
        ending.push_async_callback(descriptors.stop)
        await descriptors.start(str(descriptor_path(path)))
        await serve_peers(pool, config, ending)
        on_ready(pool)
        if not pool.tiers.steered:  # else the control loop does, before its first tick
            ending.push_async_callback(asyncio.wait, [loop.run_in_executor(None, pool.tiering.watch.measure)])
        await stop.wait()
        _log.info("stopping: %d leases end, segments are %s", len(pool.leases), "kept" if config.keep else "freed")


def _raise_file_limit() -> None:
    """Every segment, client and file being read is a descriptor; the soft limit of 1024 is for users of select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> ConfigError:
    advice = f"with --address and --state choose what user {os.geteuid()} may write"
    return ConfigError(f"{path}: {error.strerror}; {advice}")


def _lock(path: Path, what: str) -> int:
    """Hold `path` for as long as this process lives. Raises Refused where another process does."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Refused(
            f"{what} is served by process {pid} already; use that daemon, or another --address and --state"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
