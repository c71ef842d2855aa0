"""Peer source: a model's bytes from other hosts' pools, straight into the segments that are being filled.

Owns leases at peers and a few data connections, for the time of one load. Believes no byte: a tensor is shown once it
has the digest that was promised before it came, and only a peer that this pool's user named may promise one. What
breaks is asked for again, from the next peer if need be.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.errors import (
    CheckpointError,
    ConfigError,
    DigestMismatch,
    ModelNotFound,
    ProtocolError,
    ReadError,
    Refused,
    TiermemError,
    TransportUnavailable,
    own,
)
from tiermem.peer.address import Address, is_remote
from tiermem.peer.rdma import End, Region
from tiermem.peer.rdma_reader import RdmaConnection
from tiermem.peer.receiver import DataConnection
from tiermem.peer.remote import RemoteModel, RemotePool
from tiermem.peer.transport import RDMA
from tiermem.peers import Peers
from tiermem.source.fill import Fill

BLOCK_BYTES = 4 << 20
"""Bytes of one read: enough that the link stays busy, and little enough that those who get it from here begin early."""

CONNECTIONS, _DIGESTING = 3, 2
TIMEOUT_S = 10.0
"""How long 64 KiB may take to come."""

PAUSES_S = (0.0, 0.5, 2.0, 4.0)
PATIENCE_S = 10.0
"""Before each round in which every peer is tried for one read: a daemon that is started again needs some seconds. No
round begins later than so long after the first failure: a host that is gone takes long to be missed each time."""

_WAIT_S, _SLOWEST_BYTES_S = 20.0, 8 << 20
"""How long a peer may take to receive a tensor itself before another is asked: so long, and as long as it takes at so
many bytes a second."""

_RELEASE_S = 1.0
_RENEW_S = 60.0
"""How often a lease is shown to be used: it ends where that is not seen for minutes."""

_FINAL = (ModelNotFound, CheckpointError, DigestMismatch, ConfigError)
"""What no further try at the same peer can mend."""

_log = logging.getLogger(__name__)


class _Owner:
    """A peer that has the model, with the lease there and connections that nobody uses right now."""

    def __init__(self, address: Address, model: RemoteModel) -> None:
        self.address, self.model = address, model
        self.digests = list(model.digests)
        self.asked_s = time.monotonic()
        self.idle: list[DataConnection | RdmaConnection] = []


class PeerSource:
    """Of one load of `record` into `segments`. Several threads may read at once."""

    def __init__(self, peers: Peers, record: ModelRecord, segments: Mapping[int, _native.Segment]) -> None:
        self._peers, self._record, self._segments = peers, record, segments
        self._remote = is_remote(record.manifest.path)
        self._named = tuple(peers.having(record.manifest) if self._remote else peers.answering())
        self._lock = threading.Lock()
        self._joining = threading.Lock()
        self._turns = threading.BoundedSemaphore(CONNECTIONS)
        self._route: tuple[Address, ...] = ()
        self._failures: Counter[Address] = Counter()
        self._given_up: set[Address] = set()
        self._owners: dict[Address, _Owner] = {}
        self._senders: dict[int, set[Address]] = {}  # who sent parts of a tensor
        self._failure: Exception | None = None
        self._closed = False

    @property
    def reads_at_once(self) -> int:
        """What is beyond would be in no order, and those that get it from here wait for the first tensors first. A slow
        peer must not have all of the threads."""
        return CONNECTIONS + _DIGESTING

    @property
    def whole_segments(self) -> bool:
        """A device pins the segments that it fills."""
        return self._peers.transports.own().name == RDMA

    def read(self, file: int, fills: Sequence[Fill], staging: _native.Staging) -> None:
        """Fetch the parts. Raises ReadError where no peer can send them, DigestMismatch where one has others; after
        that, every other read of the load does too."""
        left = list(fills)
        troubles: list[TiermemError] = []
        failed_s = math.inf
        with self._turns:
            for pause_s in PAUSES_S if self._remote else PAUSES_S[:1]:
                addresses = self._addresses(troubles)
                if not addresses or time.monotonic() > failed_s + PATIENCE_S:
                    break
                self._peers.rest(pause_s)
                for address in addresses:
                    if self._failure is not None:
                        raise own(self._failure)
                    try:
                        self._fetch(address, left)
                    except TiermemError as error:
                        failed_s = min(failed_s, time.monotonic())
                        troubles.append(error)
                        self._fail(address, error)
                    if not left:
                        return
        self._failure = self._failure or self._undelivered(troubles)
        raise own(self._failure)

    def disbelieve(self, tensor: int) -> bool:
        """Whoever sent it is asked no more; whether there is another."""
        with self._lock:
            senders = self._senders.pop(tensor, set())
        name = self._record.manifest.tensors[tensor].name
        for address in senders:
            self._fail(address, DigestMismatch(f"{address} sends other bytes of {name!r} than it promised"))
        return bool(senders and self._addresses([]))

    def check(self) -> None:
        """Nothing can change unseen: each tensor must have its digest."""

    def close(self) -> None:
        """Give back what is held at peers."""
        with self._lock:
            self._closed = True
            owners, self._owners = list(self._owners.values()), {}
        for owner in owners:
            self._release(owner)

    def _undelivered(self, troubles: Sequence[TiermemError]) -> TiermemError:
        for trouble in troubles:
            if isinstance(trouble, DigestMismatch):
                return trouble
        told = "; ".join(dict.fromkeys(map(str, troubles)))
        return ReadError(
            f"{self._record.name}: no peer sends the rest of it: {told}; check the peers, or load from disk"
        )

    # --- whom to ask --------------------------------------------------------------------------------------------------

    def _addresses(self, troubles: list[TiermemError]) -> list[Address]:
        """Peers that may have the model, those that failed least before the others, and then the nearest."""
        with self._joining:
            if not self._route:
                self._route = self._join(troubles)
        with self._lock:
            able = [address for address in self._route if address not in self._given_up]
            return sorted(able, key=lambda address: self._failures[address])

    def _join(self, troubles: list[TiermemError]) -> tuple[Address, ...]:
        """Have the first peer that answers say who fetches the model too; these, and then the peers that we know."""
        for address in self._named:
            try:
                sources = self._peers.join(address, self._owner(address).model)
            except TiermemError as error:
                troubles.append(error)
                self._fail(address, error)
                continue
            if sources:
                _log.info("%s comes by way of %s", self._record.name, ", ".join(map(str, sources)))
            return tuple(dict.fromkeys((*sources, *self._named)))
        return self._named

    def _owner(self, address: Address) -> _Owner:
        with self._lock:
            owner = self._owners.get(address)
        if owner is not None:
            return owner
        made = _Owner(address, self._peers.call(address, lambda pool: self._open(pool, address)))
        with self._lock:
            kept = made if self._closed else self._owners.setdefault(address, made)
        if kept is not made:
            self._release(made)
        return kept

    def _open(self, pool: RemotePool, address: Address) -> RemoteModel:
        if self._remote:
            return pool.open(identity=self._record.id)
        return pool.open(content=self._record.content(), partial=address not in self._named)

    def _fail(self, address: Address, error: TiermemError) -> None:
        """A peer failed: others are asked before it, and it is opened anew if it is asked again."""
        with self._lock:
            self._failures[address] += 1
            if isinstance(error, _FINAL):
                self._given_up.add(address)
            owner = self._owners.pop(address, None)
        lacks = not self._remote and isinstance(error, ModelNotFound)  # it was worth asking
        level = logging.DEBUG if lacks else logging.WARNING
        _log.log(level, "%s: %s failed, others are asked: %s", self._record.name, address, error)
        if owner is not None:
            self._release(owner)

    def _release(self, owner: _Owner) -> None:
        """End the lease at a peer, which may be dead and is then not waited for."""
        for connection in owner.idle:
            connection.close()

        def release() -> None:
            with suppress(TiermemError):
                self._peers.call(owner.address, lambda pool: pool.release(owner.model.lease_id))

        releasing = threading.Thread(target=release, name="tiermem-peer-release", daemon=True)
        releasing.start()
        releasing.join(_RELEASE_S)

    # --- what it sends ------------------------------------------------------------------------------------------------

    def _fetch(self, address: Address, left: list[Fill]) -> None:
        """Fetch from one peer; what came is taken out of `left`, also where it fails."""
        owner = self._owner(address)
        self._promise(owner, sorted({fill.tensor for fill in left}))
        if not self._receive(owner, left):
            self._receive(owner, left)
        if left:
            raise Refused(f"{address} has not received {len(left)} parts itself")

    def _receive(self, owner: _Owner, left: list[Fill]) -> bool:
        """What the owner has of `left`; False where RDMA failed, which is not tried again."""
        if time.monotonic() > owner.asked_s + _RENEW_S:  # what is read by RDMA does not show at the other end
            owner.asked_s = time.monotonic()
            self._peers.join(owner.address, owner.model)
        buffers = {fill.segment: self._segments[fill.segment].buffer() for fill in left}
        wants = [(f.segment, f.offset, buffers[f.segment][f.offset : f.offset + f.length]) for f in left]
        done: set[int] = set()
        failed = False
        try:
            with self._connected(owner) as connection:
                try:
                    done.update(connection.fetch_many(wants))
                except TiermemError as error:
                    failed = isinstance(connection, RdmaConnection)
                    if not failed:
                        raise
                    self._rdma_failed(owner, error)
        finally:
            self._peers.received(owner.address, sum(left[number].length for number in done))
            with self._lock:
                for number in done:
                    self._senders.setdefault(left[number].tensor, set()).add(owner.address)
            left[:] = [fill for number, fill in enumerate(left) if number not in done]
        return not failed

    def _promise(self, owner: _Owner, tensors: Sequence[int]) -> None:
        """Know the digests of what is about to come, and wait until the peer has it itself."""
        if owner.address not in self._named:
            unknown = [i for i in tensors if self._record.digests[i] is None]
            if unknown:
                named = [address for address in self._addresses([]) if address in self._named]
                if not named:
                    raise Refused(f"{self._record.name}: nobody promises the digests of what {owner.address} has")
                self._promise(self._owner(named[0]), unknown)
        late = [i for i in tensors if owner.digests[i] is None or not owner.model.ready[i]]
        if late:
            nbytes = sum(self._record.manifest.tensors[i].nbytes for i in late)
            wait_s = _WAIT_S + nbytes / _SLOWEST_BYTES_S
            ready, digests = self._peers.call(owner.address, lambda pool: pool.wait(owner.model, late, wait_s))
            owner.model.ready[:] |= ready
            for i, digest in zip(late, digests, strict=True):
                owner.digests[i] = digest
        self._record.promise({i: owner.digests[i] for i in tensors})

    @contextmanager
    def _connected(self, owner: _Owner) -> Iterator[DataConnection | RdmaConnection]:
        with self._lock:
            connection = owner.idle.pop() if owner.idle else None
        if connection is None:
            connection = self._rdma(owner) or self._tcp(owner)
        try:
            yield connection
        finally:
            with self._lock:
                keep = not (self._closed or connection.closed) and self._owners.get(owner.address) is owner
                if keep:
                    owner.idle.append(connection)
            if not keep:
                connection.close()

    def _rdma_failed(self, owner: _Owner, error: TiermemError) -> None:
        """No connection by RDMA is used again."""
        self._peers.transports.fail(owner.address, error)
        with self._lock:
            broken = [connection for connection in owner.idle if isinstance(connection, RdmaConnection)]
            owner.idle = [connection for connection in owner.idle if connection not in broken]
        for connection in broken:
            connection.close()

    def _tcp(self, owner: _Owner) -> DataConnection:
        segments = tuple(self._segments)
        (token,) = self._peers.call(owner.address, lambda pool: pool.grant(owner.model.lease_id, segments))
        return DataConnection(self._peers.data_address(owner.address), token, self._peers.tls, TIMEOUT_S)

    def _rdma(self, owner: _Owner) -> RdmaConnection | None:
        """None where one of the two ends cannot, or its memory cannot be read by it yet."""
        way = self._peers.transport(owner.address)
        if way is None or way.name != RDMA:
            return None

        def connect(end: End) -> tuple[End, Mapping[int, Region]]:
            lease_id, segments = owner.model.lease_id, tuple(self._segments)
            return self._peers.call(owner.address, lambda pool: pool.export(lease_id, segments, end))

        buffers = {number: segment.buffer() for number, segment in self._segments.items()}
        try:
            return RdmaConnection(self._peers.transports.device(), owner.address, connect, TIMEOUT_S, buffers)
        except Refused as error:
            _log.info("%s: %s", self._record.name, error)
        except (TransportUnavailable, ProtocolError) as error:
            self._peers.transports.fail(owner.address, error)
        return None
