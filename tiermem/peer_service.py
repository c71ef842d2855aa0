"""Peer service: what other hosts' pools may ask of this one. Decides who may read what, and sends no weights itself.

A peer has a session for as long as its PeerHello lasts, leases like a local client's, and tokens for data connections.
Its calls run on threads of their own, so that local clients never wait for those of strangers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, replace

from tiermem.catalog import ModelRecord
from tiermem.errors import ModelNotFound, ProtocolError, Refused, TiermemError, TransportUnavailable
from tiermem.lease import Lease, Session
from tiermem.lookup import Found
from tiermem.opener import Opener, ready_bits, until_ready
from tiermem.peer.access import Access
from tiermem.peer.address import Address, native, parse_address
from tiermem.peer.fanout import FanOut
from tiermem.peer.grants import Grant, Grants
from tiermem.peer.identity import Identity, certified_name
from tiermem.peer.rdma import End
from tiermem.peer.rdma_exporter import Exporter
from tiermem.pool import Pool
from tiermem.rpc import messages as m
from tiermem.rpc import peer_messages as p
from tiermem.rpc.server import Caller

SESSIONS_PER_PEER = 16
TOKENS_PER_GRANT = 16
TOKEN_TTL_S = 30.0
LEASE_IDLE_S = 600.0
"""A lease for which so long nothing was asked ends: its peer may have forgotten it, and what is leased stays here."""
RDMA_PAUSE_S = 60.0

_ANY = ("0.0.0.0", "::")
_THREADS = 4
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class PeerSession(Session):
    """A session of another host's pool. Its process, as far as this host is concerned, is the one that sends."""

    peer: Identity


@dataclass(slots=True, eq=False)
class _Held:
    """A lease, and when something was last asked for it (`time.monotonic`)."""

    lease: Lease
    used_s: float


class PeerService:
    """The methods of PEER_METHODS over a pool. `certified`: peers prove a name; `fetches`: leases of one at once."""

    def __init__(self, pool: Pool, access: Access, grants: Grants, *, certified: bool, fetches: int) -> None:
        self.pool = pool
        self._access, self._grants = access, grants
        self.data_port = 0
        self.exporter: Exporter | None = None
        self._unreachable: dict[str, float] = {}  # when RDMA with a peer failed
        self._certified, self._fetches = certified, fetches
        self._sessions: dict[bytes, PeerSession] = {}
        self._leases: dict[str, _Held] = {}
        self._fan_out = FanOut()
        self._threads = ThreadPoolExecutor(_THREADS, "tiermem-peer")
        self._opener = Opener(pool, self._threads)

    def close(self) -> None:
        """Nobody calls any more: its threads end with what they do."""
        self._threads.shutdown(wait=False)

    def guests(self) -> list[Identity]:
        """Who has a session, once for each."""
        return [session.peer for session in tuple(self._sessions.values())]

    def session_of(self, caller: Caller) -> PeerSession | None:
        """The session of a call: its token is good for who got it, and for nobody else."""
        session = self._sessions.get(caller.token or b"")
        return session if session is not None and session.peer == self._identity(caller) else None

    async def peerhello(self, request: p.HelloRequest, caller: Caller) -> AsyncGenerator[p.HelloEvent, None]:
        if request.protocol != m.PROTOCOL:
            raise ProtocolError(
                f"the peer speaks protocol {request.protocol}, this pool {m.PROTOCOL}; upgrade the older one"
            )
        peer = self._identity(caller)
        if sum(session.peer.party == peer.party for session in self._sessions.values()) >= SESSIONS_PER_PEER:
            raise Refused(f"{peer} has {SESSIONS_PER_PEER} sessions with this pool already; end one of them first")
        token = secrets.token_bytes(16)
        session = self._sessions[token] = PeerSession(os.getpid(), os.geteuid(), peer=peer)
        _log.info("peer %s is connected", peer)
        try:
            yield p.HelloEvent("welcome", token, self.pool.id, m.PROTOCOL, self.data_port, self.exporter is not None)
            while True:
                await asyncio.sleep(LEASE_IDLE_S / 10)
                self._end_idle(session)
        finally:
            del self._sessions[token]
            for held in self._held(session):
                self._forget(held.lease)
            self.pool.end_session(session)
            _log.info("peer %s is gone", peer)

    async def peerhave(self, request: p.HaveRequest, session: PeerSession) -> p.HaveReply:
        def have() -> p.HaveReply:
            with self.pool.lock:
                record = self._find(session.peer, request)
                return p.HaveReply(record.id, record.name, record.manifest.nbytes, ready_bits(record))

        reply = await self._opener.blocking(have)
        if request.lease_id is None:
            return reply
        lease = self._lease_of(session, request.lease_id)
        sources = self._fan_out.join(lease.model_id, lease.id, _listener(request.listener, session.peer))
        return replace(reply, sources=tuple(map(str, sources)))

    async def peeropen(self, request: p.OpenRequest, session: PeerSession) -> p.OpenReply:
        def find() -> Found:
            record = self._find(session.peer, request)
            self._check_fetches(session.peer)
            return record, None

        opened, manifest, _ = await self._opener.open(lambda: (self.pool.lease_found(session, find), False))
        lease, record = opened.lease, opened.record
        if session.ended:
            raise Refused(f"{session.peer} left while it opened {record.name}")
        self._leases[lease.id] = _Held(lease, time.monotonic())
        digests = tuple(digest or b"" for digest in record.digests)
        return p.OpenReply(lease.id, record.id, record.name, manifest, digests, ready_bits(record))

    async def peergrant(self, request: p.GrantRequest, session: PeerSession) -> p.GrantReply:
        lease = self._lease_of(session, request.lease_id)
        segments = self.pool.record(lease).manifest.segments
        if not 0 < request.count <= TOKENS_PER_GRANT:
            raise ProtocolError(f"{request.count} tokens are asked for; 1 to {TOKENS_PER_GRANT} are given at once")
        _check_segments(self.pool.record(lease), request.segments)
        lengths = {i: segments[i].length for i in request.segments}
        tokens = (self._grants.issue(lease.id, lengths, session.peer.name, TOKEN_TTL_S) for _ in range(request.count))
        return p.GrantReply(tuple(tokens), TOKEN_TTL_S)

    async def peerexport(self, request: p.ExportRequest, session: PeerSession) -> p.ExportReply:
        lease = self._lease_of(session, request.lease_id)
        return await self._opener.blocking(self._export, session, lease, request)

    async def peerwait(self, request: m.WaitRequest, session: PeerSession) -> p.WaitReply:
        lease = self._lease_of(session, request.lease_id)
        count = len(self.pool.record(lease).manifest.tensors)
        if len(request.tensors or ()) > count:
            raise ProtocolError(f"{len(request.tensors or ())} tensors are waited for, the model has {count}")
        await until_ready(await self._opener.blocking(self.pool.when_ready, lease, request.tensors), request.timeout_s)
        record = self.pool.record(lease)
        wanted = range(count) if request.tensors is None else request.tensors
        return p.WaitReply(ready_bits(record), tuple(record.digests[i] or b"" for i in wanted))

    async def peerrelease(self, request: m.ReleaseRequest, session: PeerSession) -> m.Empty:
        # A lease that ended already is what the caller wants; refusing it would make a repeated call an error.
        with suppress(Refused):
            lease = self.pool.lease(session, request.lease_id)
            await asyncio.wrap_future(self._forget(lease))
            self.pool.release(lease)
        return m.Empty()

    # --- what the data path asks ------------------------------------------------------------------------------------

    def descriptor(self, grant: Grant, segment: int) -> int:
        """A new read-only descriptor of a segment, for the caller to close. Raises Refused where the lease ended."""
        return self.pool.share(self._lease(grant), [segment])[0]

    def available(self, grant: Grant, segment: int, offset: int, length: int) -> bool:
        """Whether every tensor in this part of a segment may be read. Raises Refused where the lease ended."""
        record = self.pool.record(self._lease(grant))
        tensors = record.manifest.tensors
        extents = ((i, tensors[i].extent) for i in record.tensors_of[segment])
        return all(
            record.ready[i]
            for i, extent in extents
            if extent.offset < offset + length and offset < extent.offset + extent.length
        )

    # --- inside -----------------------------------------------------------------------------------------------------

    def _identity(self, caller: Caller) -> Identity:
        name = certified_name(caller.common_names, caller.dns_names) if self._certified else ""
        return Identity(name, caller.host)

    def _find(self, peer: Identity, request: p.HaveRequest | p.OpenRequest) -> ModelRecord:
        """The model that is meant; of one that the peer may not read it learns nothing. Holds the pool's lock."""
        match request:
            case p.OpenRequest(name=None, identity=None, content=str(content)):
                wanted, found = f"model of content {content[:16]!r}", self._of_content(content, request.partial)
            case p.OpenRequest(content=str()):
                raise ProtocolError("a model is asked for by its content alone, or not by it")
            case p.HaveRequest(name=str(name), identity=None) | p.OpenRequest(name=str(name), identity=None):
                self._access.check(peer, name)
                wanted, found = f"model {name!r}", (record for record in self.pool.catalog if record.name == name)
            case p.HaveRequest(name=None, identity=str(identity)) | p.OpenRequest(name=None, identity=str(identity)):
                known = (self.pool.catalog.by_id(identity), self.pool.catalog.by_id(native(identity)))
                wanted, found = f"model of identity {identity!r}", (record for record in known if record is not None)
            case _:
                raise ProtocolError("a model is asked for by its name or by its identity; give one of the two")
        record = next((record for record in found if self._access.allows(peer, record.name)), None)
        if record is None:
            raise ModelNotFound(f"the pool that was asked has no {wanted} for {peer}; load it there, or from disk")
        load = self.pool.loads().get(record.id)
        if load is not None and load.filler is not None:
            raise Refused(f"{record.name} is an image that is still being filled; open it when it is sealed")
        return record

    def _of_content(self, content: str, partial: bool) -> Iterator[ModelRecord]:
        """Those that are there as a whole, so that no two pools wait for each other; `partial`: or on their way."""
        for record in self.pool.catalog:
            if record.content() == content and (record.ready.all() or (partial and not record.missing())):
                yield record

    def _check_fetches(self, peer: Identity) -> None:
        """Raises Refused where the peer fetches enough already. Holds the lock."""
        sessions = (lease.session for lease in self.pool.leases)
        held = sum(isinstance(other, PeerSession) and other.peer.party == peer.party for other in sessions)
        if held >= self._fetches:
            raise Refused(
                f"{peer} fetches {held} models at once already; release one, or raise --peer-fetches of that pool"
            )

    def _export(self, session: PeerSession, lease: Lease, request: p.ExportRequest) -> p.ExportReply:
        if self.exporter is None:
            raise Refused("this pool's memory cannot be read by RDMA; take TCP")
        party = session.peer.party
        if time.monotonic() < self._unreachable.get(party, -RDMA_PAUSE_S) + RDMA_PAUSE_S:
            raise Refused(f"RDMA with {session.peer} failed less than {RDMA_PAUSE_S:g} s ago; take TCP")
        with self.pool.lock:
            record = self.pool.record(lease)
            _check_segments(record, request.segments)
            if not all(record.resident(i) for i in request.segments):
                raise Refused(f"{record.name} is not in memory as a whole yet; take TCP")
            segments = {
                i: (str(record.keys[i]), segment.buffer())
                for i in request.segments
                if (segment := self.pool.memory.segment(record, i)) is not None
            }
        try:
            end, regions = self.exporter.export(lease.id, segments, End(*astuple(request.end)))
        except TransportUnavailable:
            # Looking for an end that is nowhere takes a second in which nothing else runs.
            self._unreachable[party] = time.monotonic()
            raise
        if lease.id not in self._leases:
            self.exporter.withdraw(lease.id)
            raise Refused(f"lease {lease.id} has ended; open the model again")
        found = tuple(p.MemoryRegion(*astuple(regions[i])) for i in request.segments)
        return p.ExportReply(p.QueuePairEnd(*astuple(end)), found)

    def _withdraw(self, lease_id: str) -> None:
        """Nobody reads for the lease by RDMA any more; waits for memory that is being pinned right now."""
        if self.exporter is not None:
            self.exporter.withdraw(lease_id)

    def _lease(self, grant: Grant) -> Lease:
        held = self._leases.get(grant.lease_id)
        if held is None:
            raise Refused(f"lease {grant.lease_id} has ended; open the model again")
        held.used_s = time.monotonic()
        return held.lease

    def _lease_of(self, session: PeerSession, lease_id: str) -> Lease:
        """The lease that a call is about, which is thereby used. Raises Refused."""
        lease = self.pool.lease(session, lease_id)
        if (held := self._leases.get(lease_id)) is not None:
            held.used_s = time.monotonic()
        return lease

    def _held(self, session: PeerSession) -> list[_Held]:
        return [held for held in self._leases.values() if held.lease.session is session]

    def _end_idle(self, session: PeerSession) -> None:
        """End those leases of a session that are not used. A model that is still coming is waited for."""
        now_s = time.monotonic()
        for held in self._held(session):
            if now_s <= held.used_s + LEASE_IDLE_S:
                continue
            with suppress(TiermemError):  # of a load that failed: nothing is coming
                if not self.pool.record(held.lease).ready.all():
                    held.used_s = now_s
                    continue
            _log.warning(
                "peer %s asked nothing of lease %s for %g s; it ends", session.peer, held.lease.id, LEASE_IDLE_S
            )
            self._forget(held.lease)
            self.pool.release(held.lease)

    def _forget(self, lease: Lease) -> Future[None]:
        """Nothing is sent for the lease any more, and nothing read by RDMA once the future ends."""
        self._leases.pop(lease.id, None)
        self._grants.withdraw(lease.id)
        self._fan_out.leave(lease.model_id, lease.id)
        return self._threads.submit(self._withdraw, lease.id)


def _check_segments(record: ModelRecord, asked: Sequence[int]) -> None:
    """Raises ProtocolError unless some segments of the model are asked for, and no others."""
    count = len(record.manifest.segments)
    unknown = [i for i in asked if not 0 <= i < count]
    if unknown or not asked:
        raise ProtocolError(f"the model has segments 0 to {count - 1}, not {unknown[:8]}; ask for some")


def _listener(text: str | None, peer: Identity) -> Address | None:
    """Where others find a peer that listens; None where they cannot. Raises ProtocolError."""
    if text is None:
        return None
    try:
        listener = parse_address(text)
    except ValueError as error:
        raise ProtocolError(f"the peer cannot listen at {text[:80]!r}: {error}") from None
    if listener.host in _ANY:
        return Address(peer.host, listener.port)
    return None if listener.loopback and not Address(peer.host, 0).loopback else listener
