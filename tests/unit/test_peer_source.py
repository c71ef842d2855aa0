"""Whom a load asks for its bytes, in which order, whose digests it takes, and what it does when a peer fails it; and
which pools an owner sends it to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from tests.unit.load_bench import manifest_of, record_of
from tiermem.errors import (
    AccessDenied,
    DaemonUnreachable,
    DigestMismatch,
    ModelNotFound,
    ProtocolError,
    ReadError,
    Refused,
    TransportUnavailable,
)
from tiermem.peer.address import Address
from tiermem.peer.fanout import DEPTH, FanOut
from tiermem.peer.remote import RemoteModel
from tiermem.peer.transport import Transport
from tiermem.source import peer as source_module
from tiermem.source.fill import Fill
from tiermem.source.peer import PeerSource

ORIGIN, SECOND, NEAR, FAR = (Address(host, 7070) for host in ("origin", "second", "near", "far"))
SIZE = 1000


def at(number: int) -> Address:
    return Address(f"pool-{number}", 7070)


# --- fan-out --------------------------------------------------------------------------------------------------------


def test_pools_that_come_one_after_the_other_form_a_chain() -> None:
    tree = FanOut()
    assert tree.join("m", "l0", at(0)) == ()
    assert tree.join("m", "l1", at(1)) == (at(0),)
    assert tree.join("m", "l2", at(2)) == (at(1), at(0))
    assert tree.join("other", "l3", at(3)) == ()
    assert tree.join("m", "l1", at(1)) == (at(0),), "who asks again is told the same"
    tree.check()


def test_no_chain_is_longer_than_it_may_be_and_nobody_sends_to_many() -> None:
    tree = FanOut()
    told = [tree.join("m", f"l{i}", at(i)) for i in range(5 * DEPTH)]
    tree.check()
    assert max(map(len, told)) == DEPTH - 1
    senders = Counter(sources[0] if sources else None for sources in told)
    assert max(senders.values()) <= 2, "the owner and all others"
    assert told[: DEPTH + 1] == [tuple(at(j) for j in reversed(range(i))) for i in range(DEPTH)] + [()]


def test_nobody_is_sent_to_who_does_not_listen_or_has_left() -> None:
    tree = FanOut()
    assert [tree.join("m", f"l{i}", None) for i in range(3)] == [()] * 3
    assert tree.join("m", "l3", at(3)) == ()
    assert tree.join("m", "l4", None) == (at(3),)
    tree.leave("m", "l3")
    assert tree.join("m", "l5", None) == ()
    for i in range(6):
        tree.leave("m", f"l{i}")
        tree.leave("m", f"l{i}")
    tree.check()
    assert tree.join("m", "l6", at(6)) == ()


def test_who_comes_again_is_not_sent_to_those_behind_it() -> None:
    tree = FanOut()
    for i in range(4):
        tree.join("m", f"l{i}", at(i))
    tree.leave("m", "l1")
    assert tree.join("m", "again", at(1)) == (at(0),), "2 and 3 get theirs from it"
    tree.check()


@pytest.mark.parametrize("seed", range(20))
def test_no_pool_is_ever_fed_by_itself(seed: int) -> None:
    choose, tree, leases = random.Random(seed), FanOut(), list[str]()
    for step in range(200):
        if leases and choose.random() < 0.4:
            tree.leave("m", leases.pop(choose.randrange(len(leases))))
        else:
            leases.append(f"l{step}")
            tree.join("m", leases[-1], at(choose.randrange(8)) if choose.random() < 0.9 else None)
        tree.check()


# --- the source -----------------------------------------------------------------------------------------------------


class World:
    """Peers as a source sees them. By address: `errors` are raised when they are opened, `fail_after` so many parts,
    `digests` are what they promise, `ready` whether they have it; `asked` is who sent which tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
        manifest = manifest_of([[(size, "a") for size in sizes]])
        self.record = record_of(replace(manifest, path=f"tiermem://{ORIGIN}/model"))
        self.tensors = self.record.manifest.tensors
        self.bytes = [bytes([i + 1]) * tensor.nbytes for i, tensor in enumerate(self.tensors)]
        self.memory = bytearray(self.record.manifest.segments[0].page_bytes)
        self.known = [blake3(data).digest() for data in self.bytes]
        self.named: list[Address] = [ORIGIN, SECOND]
        self.sources: tuple[Address, ...] = ()
        self.errors: dict[Address, Exception] = {}
        self.fail_after: dict[Address, int] = {}
        self.later: set[Address] = set()
        self.digests: dict[Address, list[bytes | None]] = {}
        self.ready: dict[Address, bool] = {}
        self.asked: list[tuple[Address, int]] = []
        self.opened, self.released = Counter[Address](), Counter[Address]()
        self.waited: list[tuple[Address, tuple[int, ...]]] = []
        self.rounds: list[float] = []
        self.counted = Counter[Address]()
        self.tls = None
        self.connections: list[Connection] = []
        self.transports = self
        self.rdma: set[Address] = set()
        self.exports: dict[Address, Exception] = {}
        self.rdma_breaks_after, self.by_rdma = -1, 0
        monkeypatch.setattr(source_module, "DataConnection", lambda *args: Connection(self, *args))
        monkeypatch.setattr(source_module, "RdmaConnection", RdmaConnection)
        monkeypatch.setattr("tiermem.source.peer.threading.Thread", AtOnce)

    def source(self) -> PeerSource:
        return PeerSource(self, self.record, {0: self})  # type: ignore[arg-type, dict-item]

    def fills(self) -> list[Fill]:
        return [Fill(t.file_offset, t.nbytes, 0, i, 0, t.extent.offset) for i, t in enumerate(self.tensors)]

    @property
    def whole(self) -> bool:
        extents = (tensor.extent for tensor in self.tensors)
        return [bytes(self.memory[e.offset : e.offset + e.length]) for e in extents] == self.bytes

    def senders(self) -> list[Address]:
        return list(dict.fromkeys(address for address, _ in self.asked))

    # what a segment has
    def buffer(self) -> memoryview:
        return memoryview(self.memory)

    # what Peers has
    def having(self, manifest: object) -> list[Address]:
        return self.named

    def join(self, address: Address, model: RemoteModel) -> tuple[Address, ...]:
        return self.sources

    def open(self, address: Address) -> RemoteModel:
        if address in self.errors:
            raise self.errors[address]
        self.opened[address] += 1
        ready = np.full(len(self.tensors), self.ready.get(address, True))
        digests = self.digests.get(address, list(self.known))
        return RemoteModel(str(address), "m", self.record.manifest, tuple(digests), ready)

    def call(self, address: Address, ask: Callable[[Any], Any]) -> Any:
        return ask(Session(self, address))

    # what Transports has
    def transport(self, address: Address) -> Transport:
        return Transport("rdma" if address in self.rdma else "tcp", "")

    def device(self) -> World:
        return self

    def fail(self, address: Address, error: Exception) -> None:
        self.rdma.remove(address)

    def data_address(self, address: Address) -> Address:
        return address

    def received(self, address: Address, nbytes: int) -> None:
        self.counted[address] += nbytes

    def rest(self, pause_s: float) -> None:
        self.rounds.append(pause_s)


class Session:
    """What a call of a peer gets."""

    def __init__(self, world: World, address: Address) -> None:
        self.world, self.address = world, address

    def open(self, *, identity: str) -> RemoteModel:
        return self.world.open(self.address)

    def grant(self, lease_id: str, segments: Sequence[int]) -> tuple[bytes, ...]:
        return (b"token",)

    def wait(self, model: RemoteModel, tensors: Sequence[int], timeout_s: float) -> tuple[Any, tuple[bytes, ...]]:
        self.world.waited.append((self.address, tuple(tensors)))
        ready = np.zeros(len(self.world.tensors), np.bool_)
        ready[list(tensors)] = True
        return ready, tuple(self.world.known[i] for i in tensors)

    def release(self, lease_id: str) -> None:
        self.world.released[self.address] += 1


class Connection:
    """A data connection to a peer, which breaks where the world says so."""

    def __init__(self, world: World, address: Address, *_: object) -> None:
        self.world, self.address, self.closed = world, address, False
        world.connections.append(self)

    def fetch_many(self, wants: Sequence[tuple[int, int, memoryview]]) -> Iterator[int]:
        of = {tensor.extent.offset: i for i, tensor in enumerate(self.world.tensors)}
        for number, (_, offset, target) in enumerate(wants):
            if self.world.fail_after.get(self.address) == number:
                self.closed = True
                raise DaemonUnreachable(f"{self.address} broke")
            if self.address not in self.world.later:
                self.world.asked.append((self.address, of[offset]))
                target[:] = self.world.bytes[of[offset]]
                yield number

    def close(self) -> None:
        self.closed = True


class RdmaConnection(Connection):
    """The same by RDMA."""

    def __init__(self, world: World, address: Address, *_: object) -> None:
        super().__init__(world, address)
        if (error := world.exports.get(address)) is not None:
            raise error

    def fetch_many(self, wants: Sequence[tuple[int, int, memoryview]]) -> Iterator[int]:
        for number in super().fetch_many(wants):
            if self.world.rdma_breaks_after == number:
                self.closed = True
                raise DaemonUnreachable(f"{self.address} answers no READ")
            self.world.by_rdma += 1
            yield number


class AtOnce:
    """A thread that has run when it was started."""

    def __init__(self, target: Callable[[], None], **_: object) -> None:
        self.start = target

    def join(self, timeout_s: float) -> None:
        pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch, *[SIZE] * 5)


def read(world: World) -> PeerSource:
    source = world.source()
    source.read(0, world.fills(), None)  # type: ignore[arg-type]
    return source


def test_all_comes_from_where_the_model_is_and_is_given_back(world: World) -> None:
    source = read(world)
    assert world.whole
    assert world.senders() == [ORIGIN]
    assert world.counted == {ORIGIN: 5 * SIZE}
    assert world.record.digests == world.known
    read_again = world.fills()[:1]
    source.read(0, read_again, None)  # type: ignore[arg-type]
    assert len(world.connections) == 1
    source.close()
    assert world.opened == world.released == {ORIGIN: 1}
    assert world.connections[0].closed


def test_the_nearest_of_those_who_fetch_it_too_is_asked_first(world: World) -> None:
    world.sources = (NEAR, FAR)
    source = read(world)
    assert world.whole
    assert world.senders() == [NEAR]
    source.close()
    assert world.opened == world.released == {ORIGIN: 1, NEAR: 1}


def test_who_loses_its_parent_asks_the_next_one_up_and_then_the_owner_for_what_is_missing(world: World) -> None:
    world.sources, world.fail_after = (NEAR, FAR), {NEAR: 2, FAR: 1}
    source = read(world)
    assert world.whole
    assert world.asked == [(NEAR, 0), (NEAR, 1), (FAR, 2), (ORIGIN, 3), (ORIGIN, 4)], "nothing comes twice"
    assert world.counted == {NEAR: 2 * SIZE, FAR: SIZE, ORIGIN: 2 * SIZE}
    assert world.released == {NEAR: 1, FAR: 1}
    world.asked.clear()
    source.read(0, world.fills(), None)  # type: ignore[arg-type]
    assert world.senders() == [ORIGIN], "who failed is asked last"


def test_a_peer_that_is_down_does_not_stand_in_the_way_of_another(world: World) -> None:
    world.errors[ORIGIN] = DaemonUnreachable("down")
    read(world)
    assert world.whole
    assert world.senders() == [SECOND]
    assert world.rounds == [0.0]


def test_without_anybody_it_is_a_read_error_that_tells_what_each_said(world: World) -> None:
    world.errors = {ORIGIN: DaemonUnreachable("it is down"), SECOND: AccessDenied("not for you")}
    with pytest.raises(ReadError, match="it is down; not for you; check the peers"):
        read(world)
    assert len(world.rounds) == len(source_module.PAUSES_S)


def test_after_a_read_that_failed_the_others_of_the_load_fail_as_it_did(world: World) -> None:
    world.errors = {ORIGIN: DaemonUnreachable("it is down"), SECOND: DaemonUnreachable("this too")}
    source = world.source()
    for _ in range(2):
        with pytest.raises(ReadError, match="it is down; this too"):
            source.read(0, world.fills(), None)  # type: ignore[arg-type]
    assert len(world.rounds) <= len(source_module.PAUSES_S) + 1, "nobody is given time again"


def test_who_sends_other_bytes_than_it_promised_is_asked_no_more(world: World) -> None:
    source = world.source()
    source.read(0, world.fills(), None)  # type: ignore[arg-type]
    assert world.senders() == [ORIGIN]
    assert source.disbelieve(0)
    source.read(0, world.fills()[:1], None)  # type: ignore[arg-type]
    assert world.senders() == [ORIGIN, SECOND]
    assert not source.disbelieve(0), "nobody is left"
    assert not source.disbelieve(0), "nobody sent it"


def test_what_can_be_had_by_rdma_is(world: World) -> None:
    world.rdma = {ORIGIN}
    read(world)
    assert world.by_rdma == 5
    assert world.counted[ORIGIN] == 5 * SIZE


def test_where_rdma_breaks_the_rest_comes_by_tcp_from_the_same_peer(world: World) -> None:
    world.rdma, world.rdma_breaks_after = {ORIGIN}, 2
    read(world)
    assert world.by_rdma == 2
    assert world.senders() == [ORIGIN]
    assert not world.rdma, "it is not tried again"
    assert world.counted[ORIGIN] == 5 * SIZE


def test_where_rdma_breaks_no_connection_by_it_is_used_again(world: World) -> None:
    world.rdma = {ORIGIN}
    source = world.source()
    source.read(0, world.fills()[:1], None)  # type: ignore[arg-type]
    idle = source._owners[ORIGIN].idle
    idle += [RdmaConnection(world, ORIGIN) for _ in range(3)]  # type: ignore[misc]
    world.rdma_breaks_after = 0
    source.read(0, world.fills(), None)  # type: ignore[arg-type]
    assert all(isinstance(each, RdmaConnection) == each.closed for each in world.connections)
    assert world.senders() == [ORIGIN]


@pytest.mark.parametrize(
    ("error", "kept"), [(Refused("not yet"), True), (TransportUnavailable("no"), False), (ProtocolError("odd"), False)]
)
def test_who_cannot_export_sends_by_tcp(world: World, error: Exception, kept: bool) -> None:
    world.rdma, world.exports = {ORIGIN}, {ORIGIN: error}
    read(world)
    assert world.by_rdma == 0
    assert world.senders() == [ORIGIN]
    assert bool(world.rdma) == kept


def test_who_cannot_have_it_is_asked_once(world: World) -> None:
    world.errors = {ORIGIN: ModelNotFound("no such model"), SECOND: ModelNotFound("nor here")}
    source = world.source()
    for _ in range(2):
        with pytest.raises(ReadError, match="no such model; nor here"):
            source.read(0, world.fills(), None)  # type: ignore[arg-type]
    assert world.rounds == [], "there was nobody left to try"


def test_who_has_not_received_it_itself_is_passed_over(world: World) -> None:
    world.sources, world.later = (NEAR,), {NEAR}
    read(world)
    assert world.whole
    assert world.senders() == [ORIGIN]


def test_tensors_that_a_peer_still_waits_for_are_waited_for_there(world: World) -> None:
    world.digests[ORIGIN], world.ready[ORIGIN] = [None] * 5, False
    source = read(world)
    assert world.waited == [(ORIGIN, (0, 1, 2, 3, 4))]
    assert world.record.digests == world.known
    source.read(0, world.fills(), None)  # type: ignore[arg-type]
    assert len(world.waited) == 1


def test_digests_are_the_owners_whoever_sends_the_bytes(world: World) -> None:
    """A pool that passes bytes on could alter them and their digests alike."""
    world.sources = (NEAR,)
    world.digests = {ORIGIN: [None] * 5, NEAR: [bytes(32)] * 5}
    world.ready[ORIGIN] = False
    read(world)
    assert world.record.digests == world.known
    assert world.waited == [(ORIGIN, (0, 1, 2, 3, 4))]
    assert world.senders() == [ORIGIN], "the other one promised what the owner did not"


def test_weights_that_changed_at_the_peer_are_not_fetched(world: World) -> None:
    world.record.digests = [b"x" * 32] * 5
    with pytest.raises(DigestMismatch, match="its weights changed at the peer"):
        read(world)
    assert world.asked == []
    assert world.rounds == [0.0], "asking again would not help"


def test_a_second_peer_may_have_what_the_first_has_no_more(world: World) -> None:
    world.record.digests = list(world.known)
    world.digests[ORIGIN] = [b"x" * 32] * 5
    read(world)
    assert world.whole
    assert world.senders() == [SECOND]
