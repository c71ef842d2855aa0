"""Carrying: the pool hears the last state of every carrier, and of every order what became of it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import until
from tiermem import carrying
from tiermem.agent import Agent
from tiermem.carrying import Carrying
from tiermem.errors import DaemonUnreachable, DeviceFull, DeviceLost, ProtocolError
from tiermem.rpc.replica_messages import CarryOrder, ReplicasRequest

PAGES = 10


class Carrier:
    """Of a model of one segment."""

    device, budget_bytes, capacity_bytes = "npu:0", 8 << 20, 64 << 20

    def __init__(self) -> None:
        self.pages = np.zeros(PAGES, np.bool_)
        self.copied: list[int] = []
        self.threads: set[str] = set()
        self.error: Exception | None = None
        self.registered = False

    def copy(self, segment: int, pages: range) -> None:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        self.pages[list(pages)] = True
        self.copied += pages

    def drop(self, segment: int, pages: range) -> None:
        self.pages[list(pages)] = False

    def replicas(self) -> npt.NDArray[np.bool_]:
        if isinstance(self.error, DeviceLost):
            raise self.error
        return self.pages.copy()

    def take_copied(self) -> npt.NDArray[np.int32]:
        taken, self.copied = self.copied, []
        return np.array(taken, np.int32)


class Told:
    """What a pool heard. `error` is what it answers next."""

    def __init__(self) -> None:
        self.requests: list[ReplicasRequest] = []
        self.times_s: list[float] = []
        self.error: Exception | None = None
        self.carrying = Carrying(self._take, lambda order: self.agent.submit(order))
        self.agent = Agent("tiermem-test-agent", self.carrying)

    def _take(self, request: ReplicasRequest) -> None:
        self.requests.append(request)
        self.times_s.append(time.monotonic())
        error, self.error = self.error, None
        if error is not None:
            raise error

    def pages(self) -> list[int]:
        """As last told."""
        bits = np.frombuffer(self.requests[-1].pages, np.uint8) if self.requests else np.empty(0, np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()

    def order(self, kind: str, *pages: int, number: int = 1, carrier: int = 0) -> None:
        order = CarryOrder(number, kind, carrier, 0, pages[0], len(pages))
        self.agent.submit(lambda: self.carrying.obey(order))


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.agent.close()


def linked(told: Told, carrier: Carrier, lease: str = "a") -> Any:
    link = told.carrying.add(lease, carrier)
    until(lambda: any(request.lease_id == lease for request in told.requests))
    return link


def test_a_new_carrier_is_announced_as_it_is(told: Told) -> None:
    carrier = Carrier()
    carrier.copy(0, range(3, 5))
    link = linked(told, carrier)
    (request,) = told.requests
    assert (request.lease_id, request.carrier, request.device, request.gone) == ("a", 0, "npu:0", False)
    assert (request.budget_bytes, request.capacity_bytes) == (8 << 20, 64 << 20)
    assert np.frombuffer(request.copied, "<i4").tolist() == [3, 4]
    assert told.pages() == [3, 4]
    link.changed()
    until(lambda: len(told.requests) == 2)
    assert told.requests[1].copied == b"", "a copy is told once"


def test_many_changes_are_few_reports_and_the_last_state_arrives(told: Told) -> None:
    carrier = Carrier()
    link = linked(told, carrier)
    for last in ([True] * PAGES, [False] * PAGES):
        before, begin_s = len(told.requests), time.monotonic()
        while time.monotonic() < begin_s + 5 * carrying._PAUSE_S:
            carrier.pages[0] ^= True
            link.changed()
        carrier.pages[:] = last
        link.changed()
        took_s = time.monotonic() - begin_s
        until(lambda last=last: told.pages() == np.flatnonzero(last).tolist())  # type: ignore[misc]
        assert 2 <= len(told.requests) - before <= 3 + took_s / carrying._PAUSE_S


def test_what_an_answer_tells_is_not_told_again(told: Told) -> None:
    carrier = Carrier()
    link = linked(told, carrier)
    copy = carrier.copy

    def copy_and_tell(segment: int, pages: range) -> None:
        copy(segment, pages)
        link.changed()

    carrier.copy = copy_and_tell  # type: ignore[method-assign]
    told.order("copy", 1)
    until(lambda: len(told.requests) == 2)
    time.sleep(3 * carrying._PAUSE_S)
    assert len(told.requests) == 2


def test_orders_are_carried_out_by_the_agent_and_answered_at_once(told: Told) -> None:
    carrier = Carrier()
    link = linked(told, carrier)
    told.order("copy", 1, 2, number=7)
    until(lambda: len(told.requests) == 2)
    assert [(result.order, result.error) for result in told.requests[1].results] == [(7, "")]
    assert (told.pages(), np.frombuffer(told.requests[1].copied, "<i4").tolist()) == ([1, 2], [1, 2])
    carrier.error = DeviceFull("npu:0 is full", 4)
    told.order("copy", 5, number=8)
    told.order("drop", 1, number=9)
    until(lambda: len(told.requests) == 4)
    assert [request.results[0].error for request in told.requests[2:]] == ["npu:0 is full", ""]
    assert (told.pages(), carrier.threads) == ([2], {"tiermem-test-agent"})
    del link


@pytest.mark.parametrize("error", [RuntimeError("the runtime broke"), AssertionError(), KeyError("x")])
def test_whatever_a_carrier_raises_is_an_answer(told: Told, error: Exception) -> None:
    carrier = Carrier()
    link = linked(told, carrier)
    carrier.error = error
    told.order("copy", 1)
    told.order("fly", 1, number=2)
    until(lambda: len(told.requests) == 3)
    assert all(request.results[0].error for request in told.requests[1:])
    del link


def test_a_lost_device_has_no_copies_and_answers_its_last_order(told: Told) -> None:
    carrier = Carrier()
    carrier.pages[3] = True
    link = linked(told, carrier)
    carrier.error = DeviceLost("npu:0 answers no more")
    told.order("copy", 1)
    until(lambda: len(told.requests) == 2)
    assert (told.requests[1].gone, told.pages()) == (True, [])
    assert told.requests[1].results[0].error == "npu:0 answers no more"
    link.changed()
    told.order("copy", 1)
    told.agent.settle()
    assert len(told.requests) == 2


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_a_carrier_that_goes_says_so_once(told: Told, how: str) -> None:
    carrier = Carrier()
    carrier.pages[3] = True
    link = linked(told, carrier)
    if how == "closed":
        link.close()
        link.close()
    else:
        del carrier, link
        gc.collect()
    until(lambda: len(told.requests) == 2)
    assert (told.requests[1].gone, told.pages(), told.requests[1].budget_bytes) == (True, [], 0)
    told.order("copy", 1)
    told.agent.settle()
    assert len(told.requests) == 2


def test_what_did_not_arrive_is_told_again(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "_RETRY_S", 0.01)
    carrier = Carrier()
    link = linked(told, carrier)
    told.error = DaemonUnreachable("no daemon")
    told.order("copy", 1, number=7)
    until(lambda: len(told.requests) == 3)
    for request in told.requests[1:]:
        assert [result.order for result in request.results] == [7]
        assert np.frombuffer(request.copied, "<i4").tolist() == [1]
    told.error = DaemonUnreachable("no daemon")
    link.close()
    until(lambda: len(told.requests) == 5)
    assert all(request.gone for request in told.requests[3:])


def test_a_pool_that_knows_no_carriers_is_left_alone_until_the_next_one(told: Told) -> None:
    carrier, link = Carrier(), None
    told.error = ProtocolError("does not know this method")
    link = linked(told, carrier)
    carrier.pages[1] = True
    for _ in range(3):
        link.changed()
        told.agent.settle()
        time.sleep(2 * carrying._PAUSE_S)
    assert len(told.requests) == 1
    told.agent.submit(told.carrying.announce)
    until(lambda: told.pages() == [1])


def test_the_next_pool_hears_of_every_carrier_and_of_no_order_that_it_never_gave(told: Told) -> None:
    one, two = Carrier(), Carrier()
    links = linked(told, one), linked(told, two, "b")
    told.error = DaemonUnreachable("it dies")
    told.order("copy", 1, number=7)
    told.agent.submit(told.carrying.announce)
    told.agent.settle()
    until(lambda: len(told.requests) == 5)
    assert sorted(request.lease_id for request in told.requests[3:]) == ["a", "b"]
    assert not any(request.results for request in told.requests[3:])
    del links


def test_the_end_of_a_lease_ends_its_carriers_in_silence(told: Told) -> None:
    one, two = Carrier(), Carrier()
    links = linked(told, one), linked(told, two, "b")
    told.agent.submit(lambda: told.carrying.remove("a"))
    for link in links:
        link.changed()
    until(lambda: len(told.requests) == 3)
    links[0].close()
    told.agent.settle()
    assert [request.lease_id for request in told.requests[2:]] == ["b"]
