"""Replicas: what clients tell is what there is, orders go to who has the device, and whoever leaves takes all along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.conftest import until
from tests.unit.test_catalog import CXL, DISK, DRAM
from tests.unit.tiers_bench import Bench, tiers_of
from tiermem.errors import ProtocolError
from tiermem.lease import Lease, Session
from tiermem.memory import Memory
from tiermem.migrator import log, replicas
from tiermem.migrator.log import MoveLog
from tiermem.migrator.replicas import Replicas
from tiermem.rpc.replica_messages import CarryOrder, OrderResult, ReplicasRequest
from tiermem.tier import Tier, Tiers
from tiermem.types import PAGE_BYTES
from tiermem.view import Piece

HBM = 2
"""Tier of the copies, in front of the disk."""

GIB = 1 << 30


class Client:
    """A process with a lease and one carrier, which does at once what it is told, and tells it."""

    def __init__(self, bench: Copying, lease: str, pid: int, device: str = "npu:0", carrier: int = 0) -> None:
        self.lease = Lease(lease, bench.record.id, Session(pid, 0, give=self.obey))
        self.bench, self.device, self.carrier = bench, device, carrier
        self.pages = np.zeros(5, np.bool_)
        self.orders: list[CarryOrder] = []
        self.error = ""
        self.in_use = False
        self.answer: Callable[[CarryOrder], object] = self.do

    def obey(self, order: CarryOrder) -> None:
        self.orders.append(order)
        self.answer(order)

    def do(self, order: CarryOrder) -> None:
        base = self.bench.record.first_page[order.segment] + order.first
        if not self.error and not (order.kind == "drop" and self.in_use):
            self.pages[base : base + order.pages] = order.kind == "copy"
        self.report(results=(OrderResult(order.order, self.error),))

    def report(self, **fields: Any) -> list[int]:
        """Pages that the pool took as copied."""
        bits = np.packbits(self.pages, bitorder="little").tobytes()
        given: dict[str, Any] = {
            "pages": bits,
            "budget_bytes": GIB,
            "capacity_bytes": 8 * GIB + 1,
            "carrier": self.carrier,
        }
        request = ReplicasRequest(**{"lease_id": self.lease.id, "device": self.device} | given | fields)
        with self.bench.lock:
            return list(self.bench.replicas.report(self.lease, self.bench.record, request).tolist())

    def leave(self) -> None:
        with self.bench.lock:
            self.bench.replicas.released(self.lease)


class Copying(Bench):
    """Tiers dram, cxl, hbm of 4 pages, disk; a model of 2 and 3 pages."""

    def __init__(self, hbm_pages: int = 4) -> None:
        super().__init__()
        memory = tiers_of(8, 8).memory
        hbm = Tier(HBM, "hbm", hbm_pages * PAGE_BYTES, device="npu:0")
        self.tiers = Tiers([*memory, hbm, Tier(DISK + 1, "disk", None)])
        self.memory = Memory(self.memory.backing, self.tiers)
        self.log = MoveLog(self.journal)
        self.replicas = Replicas(self.log, self.tiers, self.lock)
        self.record = self.known("a", 0, [2, 3])
        self.record.disk = DISK + 1
        self.record.placed[:] = self.record.residency[:] = DISK + 1
        self.load(self.record, [[DRAM] * 2, [DRAM, DRAM, CXL]])

    def client(self, lease: str = "a", pid: int = 7, **options: Any) -> Client:
        """One that has told of its carrier."""
        made = Client(self, lease, pid, **options)
        made.report()
        return made

    def copy(self, segment: int, pages: range, source: int = DRAM, target: int = HBM) -> None:
        piece = Piece(self.record, segment, pages)
        self.replicas.copy(piece, self.tiers[source], self.tiers[target], "a test")
        self.check()

    def drop(self, segment: int, pages: range, source: int = HBM) -> None:
        self.replicas.drop(Piece(self.record, segment, pages), self.tiers[source], self.tiers[DRAM], "a test")
        self.check()

    def check(self) -> None:
        super().check()
        self.replicas.check(self.catalog)

    def copied(self) -> list[int]:
        """Pages with a copy, as the catalog has them."""
        return np.flatnonzero(self.record.replicas >> HBM & 1).tolist()

    def held(self) -> int:
        """Pages that the tier counts."""
        return self.tiers[HBM].used_bytes // PAGE_BYTES

    def outcomes(self) -> list[tuple[str, int, int]]:
        return [(entry.outcome, entry.first, entry.pages) for entry in reversed(self.log.entries())]


@pytest.fixture
def bench() -> Iterator[Copying]:
    made = Copying()
    yield made
    made.check()
    made.close()


def test_copies_are_made_and_given_up_by_who_has_the_device(bench: Copying) -> None:
    client = bench.client()
    bench.copy(1, range(0, 2))
    bench.copy(1, range(2, 3), source=CXL)
    assert (bench.copied(), bench.held()) == ([2, 3, 4], 3)
    assert bench.record.residency.tolist() == [DRAM, DRAM, DRAM, DRAM, CXL], "the pages stay where they are"
    bench.drop(1, range(1, 3))
    assert (bench.copied(), bench.held()) == ([2], 1)
    told = [(order.kind, order.carrier, order.segment, order.first, order.pages) for order in client.orders]
    assert told == [("copy", 0, 1, 0, 2), ("copy", 0, 1, 2, 1), ("drop", 0, 1, 1, 2)]
    assert bench.outcomes() == [("copied", 2, 2), ("copied", 4, 1), ("dropped", 3, 2)]
    assert not bench.log.refused


def test_what_a_client_tells_is_what_there_is(bench: Copying) -> None:
    client = bench.client()
    client.pages[[0, 3]] = True
    assert client.report(copied=np.array([0, 3], "<i4").tobytes()) == [0, 3]
    assert (bench.copied(), bench.held(), bench.log.entries()) == ([0, 3], 2, [])
    client.pages[0] = False
    assert client.report() == []
    assert (bench.copied(), bench.held()) == ([3], 1)
    (shown,) = bench.replicas.carriers()
    assert (shown.held_bytes, shown.budget_bytes, shown.device) == (PAGE_BYTES, GIB, "npu:0")
    client.report(gone=True, pages=b"\0")
    assert (bench.copied(), bench.held(), bench.replicas.carriers()) == ([], 0, [])


def test_two_processes_on_one_device_have_each_their_own_copy(bench: Copying) -> None:
    second, first = bench.client("b", 8), bench.client("a", 7)
    bench.copy(0, range(0, 2))
    assert (len(first.orders), len(second.orders)) == (1, 0), "the lowest lease comes first"
    second.pages[1:3] = True
    second.report()
    assert (bench.copied(), bench.held()) == ([0, 1, 2], 4)
    bench.drop(0, range(0, 2))
    assert (bench.copied(), bench.held()) == ([2], 1)
    assert [order.kind for order in second.orders] == ["drop"], "each is told to give up what it has"
    first.leave()
    second.leave()
    assert (bench.copied(), bench.held()) == ([], 0)


def test_two_carriers_of_one_lease_are_apart(bench: Copying) -> None:
    one, two = bench.client("a", 7), bench.client("a", 7, carrier=1)
    two.lease = one.lease
    bench.replicas._carried["a", 1].lease = one.lease
    one.pages[0] = two.pages[1] = True
    one.report()
    two.report()
    assert (bench.copied(), bench.held()) == ([0, 1], 2)
    two.pages[:] = False
    two.report(gone=True)
    assert (bench.copied(), bench.held()) == ([0], 1)
    one.leave()
    assert bench.replicas.carriers() == []


def test_a_device_without_a_tier_is_shown_and_nothing_else(bench: Copying) -> None:
    client = bench.client(device="npu:1")
    client.pages[:] = True
    client.report()
    (shown,) = bench.replicas.carriers()
    assert (shown.tier, shown.held_bytes) == (None, 5 * PAGE_BYTES)
    assert (bench.copied(), bench.held()) == ([], 0)
    bench.copy(0, range(0, 1))
    assert bench.log.refused == {log.NO_DEVICE: 1}


def test_the_first_client_of_a_device_says_what_it_holds() -> None:
    bench = Copying(hbm_pages=0)
    bench.client()
    assert bench.tiers[HBM].capacity_bytes == 8 * GIB
    bench.client("b").report(capacity_bytes=GIB)
    assert bench.tiers[HBM].capacity_bytes == 8 * GIB, "the first one's word stands"
    bench.copy(0, range(0, 2))
    assert bench.copied() == [0, 1]
    bench.close()


@pytest.mark.parametrize("cause", [log.NO_DEVICE, log.PINNED, log.LOADING, log.ELSEWHERE, log.NO_SPACE, log.BUSY])
def test_what_is_refused(bench: Copying, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, target, pages = bench.client(), HBM, range(0, 2)
    if cause == log.NO_DEVICE:
        target = CXL
    elif cause == log.PINNED:
        bench.record.pins = 1
    elif cause == log.LOADING:
        bench.memory.drop(bench.record, 1)
        bench.memory.create(bench.record, {1: np.array([DRAM] * 3, np.int8)})
    elif cause == log.ELSEWHERE:
        pages = range(1, 3)
    elif cause == log.NO_SPACE:
        bench.copy(0, range(0, 2))
        bench.copy(1, range(2, 3), source=CXL)
    elif cause == log.BUSY:
        client.pages[0] = True
        client.report()
        client.answer = lambda order: None
        monkeypatch.setattr(replicas, "_MOST_ORDERS", 1)
        monkeypatch.setattr(replicas, "PATIENCE_S", 0.01)
        bench.drop(0, range(0, 1))
    before = bench.copied()
    bench.copy(1, pages, target=target)
    assert bench.log.refused == {cause: 2}
    assert bench.copied() == before


def test_an_agent_that_does_not_listen_gets_no_order(bench: Copying) -> None:
    client = bench.client()
    bench.copy(0, range(0, 1))
    client.lease.session.give = None
    bench.copy(0, range(1, 2))
    bench.drop(0, range(0, 1))
    assert bench.log.refused == {log.NO_DEVICE: 1, log.BUSY: 1}
    assert bench.copied() == [0], "it is there for as long as its client says so"


def test_a_page_has_one_copy_and_is_dropped_once(bench: Copying) -> None:
    bench.client()
    bench.copy(0, range(0, 1))
    bench.copy(0, range(0, 2))
    assert bench.log.refused == {log.ELSEWHERE: 2}
    bench.drop(0, range(0, 2))
    assert bench.log.refused == {log.ELSEWHERE: 2, log.GONE: 2}
    bench.drop(0, range(0, 1))
    bench.drop(0, range(0, 1))
    bench.drop(0, range(0, 1), source=CXL)
    assert bench.log.refused == {log.ELSEWHERE: 2, log.GONE: 3, log.NO_DEVICE: 1}


def test_a_copy_that_fails_leaves_nothing_and_says_why(bench: Copying) -> None:
    client = bench.client()
    client.error = "npu:0 is full"
    bench.copy(0, range(0, 2))
    assert (bench.log.refused, bench.copied(), bench.held()) == ({log.NOT_COPIED: 2}, [], 0)
    assert bench.log.entries()[0].reason == "a test; npu:0 is full"
    client.error = ""
    bench.copy(0, range(0, 2))
    assert bench.outcomes()[-1] == ("copied", 0, 2)


def test_a_drop_that_is_under_way_is_not_ordered_again(bench: Copying) -> None:
    client = bench.client()
    bench.copy(0, range(0, 2))
    client.answer = lambda order: None
    for pages in (range(0, 2), range(0, 2), range(1, 2)):
        bench.drop(0, pages)
    assert len(client.orders) == 2
    client.do(client.orders[1])
    assert bench.outcomes() == [("copied", 0, 2), ("dropped", 0, 2)]
    assert not bench.log.refused


def test_what_is_in_use_is_not_dropped(bench: Copying) -> None:
    client = bench.client()
    bench.copy(0, range(0, 2))
    client.in_use = True
    bench.drop(0, range(0, 2))
    assert (bench.log.refused, bench.copied()) == ({log.IN_USE: 2}, [0, 1])


def test_a_copy_waits_for_drops_that_make_room(bench: Copying) -> None:
    client, given = bench.client(), threading.Event()
    client.pages[:4] = True
    client.report()

    def later(order: CarryOrder) -> None:
        client.answer = client.do
        threading.Thread(target=lambda: given.wait(10) and client.do(order)).start()

    client.answer = later
    bench.drop(1, range(0, 2))
    assert bench.held() == 4, "it has not answered yet"
    copying = threading.Thread(target=bench.copy, args=(1, range(2, 3), CXL))
    copying.start()
    given.set()
    copying.join(10)
    assert bench.copied() == [0, 1, 4]
    assert not bench.log.refused


@pytest.mark.parametrize("how", ["the lease ends", "the carrier is gone", "the model is removed", "the pool closes"])
def test_who_leaves_while_it_copies_leaves_nothing(bench: Copying, how: str) -> None:
    client = bench.client()
    client.pages[4] = True
    client.report()
    client.answer = lambda order: None
    copying = threading.Thread(target=bench.replicas.copy, args=(
        Piece(bench.record, 0, range(0, 2)), bench.tiers[DRAM], bench.tiers[HBM], "a test"))  # fmt: skip
    copying.start()
    until(lambda: bool(client.orders))
    assert bench.held() == 3, "room is kept for what is on its way"
    bench.check()
    with bench.lock:
        if how == "the lease ends":
            bench.replicas.released(client.lease)
        elif how == "the carrier is gone":
            client.pages[:] = False
            client.report(gone=True)
        elif how == "the model is removed":
            bench.replicas.forget(bench.record)
        else:
            bench.replicas.close()
    copying.join(10)
    assert not copying.is_alive()
    closed = how == "the pool closes"
    assert (bench.copied(), bench.held(), bench.log.refused) == (
        [4] if closed else [],
        int(closed),
        {log.NOT_COPIED: 2},
    )
    assert bench.log.entries()[0].reason.startswith("a test; ")


def test_a_client_that_does_not_answer_gets_no_more_until_it_does(
    bench: Copying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "PATIENCE_S", 0.01)
    client = bench.client()
    client.answer = lambda order: None
    bench.copy(0, range(0, 2))
    assert bench.log.refused == {log.NOT_COPIED: 2}
    assert "process 7 did not answer within" in bench.log.entries()[0].reason
    assert bench.held() == 2, "it may still do it"
    bench.copy(1, range(0, 1))
    assert (bench.log.refused, len(client.orders)) == ({log.NOT_COPIED: 2, log.BUSY: 1}, 1)
    client.answer = client.do
    client.do(client.orders[0])
    assert bench.outcomes()[-1] == ("copied", 0, 2)
    bench.copy(1, range(0, 1))
    assert (bench.copied(), bench.held()) == ([0, 1, 2], 3)


def test_a_result_that_arrives_twice_counts_once(bench: Copying) -> None:
    client = bench.client()
    bench.copy(0, range(0, 1))
    client.report(results=(OrderResult(client.orders[0].order, "no"),))
    assert (bench.outcomes(), bench.copied()) == ([("copied", 0, 1)], [0])


BAD: dict[str, dict[str, Any]] = {
    "too few bits": {"pages": b""},
    "too many bits": {"pages": b"\0\0"},
    "a page beyond": {"pages": b"\x20"},
    "pages of what is gone": {"pages": b"\1", "gone": True},
    "a negative budget": {"budget_bytes": -1},
    "a capacity beyond all memory": {"capacity_bytes": 1 << 60},
    "a negative carrier": {"carrier": -1},
    "no device": {"device": ""},
    "a device of many words": {"device": "npu:0 and npu:1"},
    "a device by another name": {"device": "npu"},
    "another device": {"device": "npu:1"},
    "half a number": {"copied": b"\0\0\0"},
    "a copied page twice": {"copied": np.array([1, 1], "<i4").tobytes()},
    "a copied page beyond": {"copied": np.array([5], "<i4").tobytes()},
    "a negative copied page": {"copied": np.array([-1], "<i4").tobytes()},
    "an order never given": {"results": (OrderResult(99),)},
    "order 0": {"results": (OrderResult(0),)},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_what_no_carrier_tells_changes_nothing(bench: Copying, fields: dict[str, Any]) -> None:
    client = bench.client()
    bench.copy(0, range(0, 1))
    client.pages[:] = False
    with pytest.raises(ProtocolError):
        client.report(**fields)
    assert (bench.copied(), bench.held(), len(bench.replicas.carriers())) == ([0], 1, 1)
    bench.check()


def test_an_order_of_another_client_is_not_for_this_one_to_answer(bench: Copying) -> None:
    first, other = bench.client("a", 7), bench.client("b", 8)
    first.pages[0] = True
    first.report()
    first.answer = lambda order: None
    bench.drop(0, range(0, 1))
    with pytest.raises(ProtocolError, match="was given to another carrier"):
        other.report(results=(OrderResult(first.orders[0].order),))
    first.do(first.orders[0])
    assert bench.outcomes() == [("dropped", 0, 1)]


def test_carriers_of_a_lease_are_limited(bench: Copying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_MOST_CARRIERS", 2)
    client = bench.client()
    client.report(carrier=1)
    with pytest.raises(ProtocolError, match="has 2 carriers already"):
        client.report(carrier=2)
