"""Peers: other hosts' pools as this one knows them: sessions with them, and which of them has a model.

Owns one session per peer, made when it is first needed and again after it ended. Never fetches weights (the peer source
does), and is never called with the pool's lock held: peers are far away, and may be down.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from tiermem.config import Config
from tiermem.errors import (
    CheckpointNotFound,
    Closed,
    DaemonUnreachable,
    ModelNotFound,
    ProtocolError,
    Refused,
    SessionUnknown,
    TiermemError,
    own,
)
from tiermem.peer.address import Address, ModelAddress, foreign, parse_address, parse_model
from tiermem.peer.identity import Identity
from tiermem.peer.rdma_exporter import Figures as ExportFigures
from tiermem.peer.remote import RemoteModel, RemotePool
from tiermem.peer.sender import Figures as SentFigures
from tiermem.peer.tls import Tls, check_clear, open_tls
from tiermem.peer.transport import Transport, Transports
from tiermem.rpc import peer_messages as p
from tiermem.types import Manifest

_TOGETHER_S = 0.5
"""Threads of one load ask for a session together: one try is enough for them."""

_FORGIVEN_S = 30.0
"""A peer that could not be called is left alone so long by those who can do without it."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PeerFigures:
    """What this pool had to do with a peer. `error`: why it last failed, empty since it last answered; `used_s`: when
    it was last called (`time.time`), 0.0 for never."""

    received_bytes: int = 0
    error: str = ""
    used_s: float = 0.0


class _Session(RemotePool):
    """A session with a peer that knows when the peer has ended it."""

    def __init__(self, address: Address, tls: Tls | None) -> None:
        super().__init__(address, tls)
        self.ended = False
        self._stream.follow(lambda _: None, self._end)

    def join(self, model: RemoteModel, listener: Address | None) -> tuple[Address, ...]:
        """Which other pools to ask for a model first, now that this one, which listens there, fetches it."""
        where = None if listener is None else str(listener)
        request = p.HaveRequest(identity=model.manifest.identity, lease_id=model.lease_id, listener=where)
        reply: p.HaveReply = self._channel.call("PeerHave", request)
        try:
            return tuple(map(parse_address, reply.sources))
        except ValueError as error:
            raise ProtocolError(f"the pool at {self.address} names a source that is none: {error}") from None

    def _end(self) -> None:
        self.ended = True


class Peers:
    """Of one pool. Raises ConfigError for TLS that cannot be used.

    Set by who listens for peers on the pool's behalf: `listener`, `own_id`, and snapshots of what was sent (`sent`), of
    what may be read by RDMA (`exports`) and of who has a session with this pool (`guests`, once for each).
    """

    def __init__(self, config: Config) -> None:
        self.configured: tuple[Address, ...] = config.peer
        self.listener: Address | None = None
        self.own_id = ""
        self.sent: Callable[[], SentFigures] = SentFigures
        self.exports: Callable[[], ExportFigures] = ExportFigures
        self.guests: Callable[[], list[Identity]] = list
        self.transports = Transports(config.transport)
        self.own_tls = open_tls(config)
        if self.own_tls is not None:
            self.own_tls.warn()
        self._insecure = config.insecure
        self._lock = threading.Lock()
        self._sessions: dict[Address, _Session] = {}
        self._connecting: defaultdict[Address, threading.Lock] = defaultdict(threading.Lock)
        self._refused: dict[Address, tuple[float, Exception]] = {}  # when it was tried last in vain, and why so
        self._figures: defaultdict[Address, PeerFigures] = defaultdict(PeerFigures)
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """Who this pool is to its peers, by its certificate; empty without TLS."""
        return "" if self.own_tls is None else self.own_tls.name

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What data connections are secured with."""
        return None if self.own_tls is None else self.own_tls.client

    def manifest(self, path: str) -> Manifest:
        """The manifest of the model at a `tiermem://` address: from now on that is its path, and its identity foreign.

        Raises CheckpointNotFound for an address that is none, ModelNotFound, DaemonUnreachable, AccessDenied.
        """
        try:
            address = parse_model(path)
        except ValueError as error:
            raise CheckpointNotFound(f"{path}: {error}") from None
        model = self.call(address.pool, lambda pool: pool.open(name=address.name))
        self.call(address.pool, lambda pool: pool.release(model.lease_id))
        return replace(model.manifest, path=str(address), identity=foreign(model.manifest.identity))

    def find(self, name: str) -> Manifest | None:
        """The manifest of the model that the first of the configured peers has under that name; None where none has."""
        for address in self.configured:
            try:
                return self.manifest(str(ModelAddress(address, name)))
            except ModelNotFound:
                continue
            except TiermemError as error:
                _log.warning("peer %s was not asked for %s: %s", address, name, error)
        return None

    def having(self, manifest: Manifest) -> Iterator[Address]:
        """Peers to ask for the model: where it came from, and then those of the configuration."""
        origin = parse_model(manifest.path).pool
        yield origin
        yield from (address for address in self.configured if address != origin)

    def answering(self) -> list[Address]:
        """The configured peers but for those that could not be called just now."""
        now_s = time.monotonic()
        with self._lock:
            failed = {address for address, (at_s, _) in self._refused.items() if now_s < at_s + _FORGIVEN_S}
        return [address for address in self.configured if address not in failed]

    def join(self, address: Address, model: RemoteModel) -> tuple[Address, ...]:
        """The pools that the peer sends those to who fetch the model from it, as we do now; nearest first."""
        listener = self.listener
        if listener is not None and listener.loopback and not address.loopback:
            listener = None  # only this host finds it there
        return self.call(address, lambda pool: pool.join(model, listener))

    def call(self, address: Address, ask: Callable[[_Session], T]) -> T:
        """What `ask` gets of the session with that peer, in a new one if the old one ended meanwhile."""
        figures = self._figures[address]
        figures.used_s = time.time()
        try:
            session = self._session(address)
            try:
                answer = ask(session)
            except (DaemonUnreachable, SessionUnknown):
                self._drop(address, session)
                answer = ask(self._session(address))
        except TiermemError as error:
            figures.error = "" if isinstance(error, ModelNotFound) else str(error)
            raise
        figures.error = ""
        return answer

    def data_address(self, address: Address) -> Address:
        """Where the peer's weights come from by TCP."""
        return self._session(address).data

    def transport(self, address: Address) -> Transport | None:
        """By which way its weights come, and why; None without a session."""
        with self._lock:
            session = self._sessions.get(address)
        return None if session is None or session.ended else self.transports.choose(address, session.rdma)

    def received(self, address: Address, nbytes: int) -> None:
        """Count bytes of weights that a peer sent."""
        with self._lock:
            self._figures[address].received_bytes += nbytes

    def figures(self) -> dict[Address, PeerFigures]:
        """A snapshot: every peer of the configuration, and every other that was called."""
        with self._lock:
            known = dict.fromkeys((*self.configured, *list(self._figures)))
            return {address: replace(self._figures[address]) for address in known}

    def connected(self, address: Address) -> bool:
        """Whether there is a session with the peer now."""
        with self._lock:
            session = self._sessions.get(address)
        return session is not None and not session.ended

    def rest(self, pause_s: float) -> None:
        """Give peers time to come back. Raises Closed as soon as the pool closes."""
        if self._closed.wait(pause_s):
            raise self._closed_error()

    def close(self) -> None:
        """End all sessions, and with them their leases."""
        with self._lock:
            self._closed.set()
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.close()
        self.transports.close()

    def _session(self, address: Address) -> _Session:
        asked_s = time.monotonic()
        with self._lock:
            connecting = self._connecting[address]
        with connecting:
            with self._lock:
                if self._closed.is_set():
                    raise self._closed_error()
                session = self._sessions.get(address)
                refused_s, error = self._refused.get(address, (0.0, None))
            if session is not None and not session.ended:
                return session
            if error is not None and refused_s > asked_s - _TOGETHER_S:
                raise own(error)  # it was tried while we waited
            begun_s = time.monotonic()
            try:
                made = self._connect(address)
            except TiermemError as failure:
                with self._lock:
                    self._refused[address] = (begun_s, own(failure).with_traceback(None))
                raise
            with self._lock:
                closed = self._closed.is_set()
                if not closed:
                    self._sessions[address] = made
            if closed:
                made.close()
                raise self._closed_error()
            if session is not None:
                session.close()
            return made

    def _connect(self, address: Address) -> _Session:
        check_clear(address, self.own_tls, self._insecure)
        made = _Session(address, self.own_tls)
        if made.id == self.own_id:
            made.close()
            raise Refused(f"{address} is this pool itself; leave it out of --peer, or name another")
        return made

    def _drop(self, address: Address, session: RemotePool) -> None:
        with self._lock:
            if self._sessions.get(address) is session:
                del self._sessions[address]
        session.close()

    def _closed_error(self) -> Closed:
        return Closed("the pool is closed")
