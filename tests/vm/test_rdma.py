"""Another process's segments, read by RDMA on a real kernel: which bytes come, who is refused, what is pinned."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.integration.child import eventually
from tests.vm.rdma_owner import DEADLINE_S, SIZES, Owner, content
from tiermem import _native
from tiermem.errors import (
    AccessDenied,
    Closed,
    DaemonUnreachable,
    DeadlineExceeded,
    ProtocolError,
    Refused,
    TransportUnavailable,
)
from tiermem.peer.address import Address
from tiermem.peer.rdma import Device, End, Region
from tiermem.peer.rdma_pair import READ_BYTES
from tiermem.peer.rdma_reader import RdmaConnection
from tiermem.peer.receiver import WINDOW_BYTES, Want

pytestmark = [pytest.mark.rxe, pytest.mark.numa]

ADDRESS = Address("10.0.0.1", 7070)
MISSED_S = 60.0
"""A peer that is gone is missed after 3.8 s, and an emulated processor takes its time."""

RDMA_WRITE, REFUSED = 0, (9, 10)
"""Of infiniband/verbs.h: an operation, and the statuses of an invalid request and of one that is not allowed."""

Connect = Callable[[End], tuple[End, Mapping[int, Region]]]


class Reader:
    """A pool's side: empty segments of the same sizes, and connections that fill them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.segments = [_native.Segment.create(-1, f"reader's {i}", size) for i, size in enumerate(SIZES)]
        for segment in self.segments:
            segment.prefault()
        self.buffers = {i: segment.buffer() for i, segment in enumerate(self.segments)}

    def connect(self, connect: Connect, timeout_s: float = DEADLINE_S) -> RdmaConnection:
        return RdmaConnection(self.device, ADDRESS, connect, timeout_s, self.buffers)

    def lease(self, owner: Owner, name: str, segments: range = range(len(SIZES))) -> RdmaConnection:
        return self.connect(lambda end: owner.export(name, end, segments))

    def want(self, segment: int, offset: int = 0, length: int | None = None) -> Want:
        length = SIZES[segment] - offset if length is None else length
        return segment, offset, self.buffers[segment][offset : offset + length]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    owner = Owner()
    with owner.child:
        yield owner


@pytest.fixture(autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """The owner that all tests share has no lease before and after each."""
    yield
    if "owner" in request.fixturenames:
        owner: Owner = request.getfixturevalue("owner")
        for lease in ("a", "b"):
            owner.ask("withdraw", lease)
        assert owner.ask("figures")["queue_pairs"] == 0


@pytest.fixture
def reader(device: Device) -> Reader:
    return Reader(device)


def resources() -> dict[str, int]:
    """How many of each kind of object the device has, of all processes."""
    told = subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True, check=True).stdout
    return {kind: int(count) for kind, count in re.findall(r"\b(pd|cq|qp|mr) (\d+)", told)}


def test_the_bytes_are_those_that_were_asked_for_and_no_others(owner: Owner, reader: Reader) -> None:
    wants = [
        reader.want(1, 4097, 1),
        reader.want(0),
        reader.want(2, 1, READ_BYTES + 1),
        reader.want(2, READ_BYTES + 2, 3 * READ_BYTES - 2),
        reader.want(1, 2_000_003, 77),
    ]
    assert wants[1][2].nbytes > WINDOW_BYTES
    with reader.lease(owner, "a") as connection:
        assert list(connection.fetch_many(wants)) == [0, 1, 2, 3, 4]
        assert connection.received_bytes == sum(target.nbytes for _, _, target in wants)
    assert reader.segments[0].buffer() == content(0)
    for segment in (1, 2):
        expected = bytearray(SIZES[segment])
        for number, offset, target in wants:
            if number == segment:
                expected[offset : offset + target.nbytes] = content(number)[offset : offset + target.nbytes]
        assert bytes(reader.buffers[segment]) == bytes(expected)


def test_many_small_targets_and_a_connection_that_is_used_again(owner: Owner, reader: Reader) -> None:
    with reader.lease(owner, "a") as connection:
        for step in (4096, 65_537):
            wants = [reader.want(1, at, min(step, SIZES[1] - at)) for at in range(0, SIZES[1], step)]
            reader.buffers[1][:] = bytes(SIZES[1])
            assert list(connection.fetch_many(wants)) == list(range(len(wants)))
            assert reader.buffers[1] == content(1)
            reader.buffers[2][:] = bytes(SIZES[2])
            assert list(connection.fetch_many([reader.want(2)])) == [0]
            assert reader.buffers[2] == content(2)
    reader.segments[2].seal()
    assert reader.segments[2].buffer() == content(2)


def test_connections_read_at_once(owner: Owner, reader: Reader) -> None:
    def fetch(connection: RdmaConnection, segment: int) -> list[int]:
        return [number for _ in range(3) for number in connection.fetch_many([reader.want(segment)])]

    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        connections = [stack.enter_context(reader.lease(owner, lease)) for lease in ("a", "a", "b")]
        assert list(threads.map(fetch, connections, range(3))) == [[0] * 3] * 3
    assert [bytes(reader.buffers[i]) for i in range(3)] == [content(i) for i in range(3)]


def test_a_segment_is_registered_once_for_all_leases_and_connections(owner: Owner, reader: Reader) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(reader.lease(owner, "a"))
        before, figures = resources(), owner.ask("figures")
        assert list(first.fetch_many([reader.want(1), reader.want(2)])) == [0, 1]
        for lease in ("a", "b", "b"):
            other = stack.enter_context(reader.lease(owner, lease))
            assert list(other.fetch_many([reader.want(1)])) == [0]
        assert owner.ask("figures") == {**figures, "queue_pairs": 4}
        assert figures["segments"] == len(SIZES)
        assert figures["pinned_bytes"] == owner.pinned_bytes() == sum(SIZES)
        assert resources()["mr"] == before["mr"] + 2  # the reader's two; the owner's were there
        first.close()
        assert resources()["mr"] == before["mr"] + 1  # of segment 1, which the others still use
    assert resources()["mr"] == before["mr"]


def test_leaving_early_closes_the_connection(owner: Owner, reader: Reader) -> None:
    connection = reader.lease(owner, "a")
    fetching = connection.fetch_many([reader.want(1), reader.want(0)])
    assert next(fetching) == 0
    fetching.close()
    assert connection.closed
    with pytest.raises(Closed):
        list(connection.fetch_many([reader.want(1)]))
    connection.cut()
    connection.close()
    reader.buffers[0][:] = bytes(SIZES[0])  # nothing writes there any more
    time.sleep(0.2)
    assert reader.buffers[0] == bytes(SIZES[0])


@pytest.mark.parametrize(
    ("forged", "what"),
    [
        (lambda region: replace(region, key=region.key ^ 1), "a wrong key"),
        (lambda region: replace(region, key=region.key + 256), "a key of another index"),
        (lambda region: replace(region, address=region.address + 4096), "a range that ends beyond the region"),
        (lambda region: replace(region, address=region.address - 4096), "a range that begins before the region"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_device_refuses(owner: Owner, reader: Reader, forged: Callable[[Region], Region], what: str) -> None:
    def connect(end: End) -> tuple[End, Mapping[int, Region]]:
        other, regions = owner.export("a", end, range(1, 2))
        return other, {1: forged(regions[1])}

    with reader.lease(owner, "b", range(1, 2)) as fair, reader.connect(connect) as connection:
        with pytest.raises(AccessDenied, match="of 2097152 bytes came, then the peer refused to be read"):
            list(connection.fetch_many([reader.want(1)]))
        assert connection.closed
        assert bytes(reader.buffers[1][-4096:]) == bytes(4096)
        assert list(fair.fetch_many([reader.want(1)])) == [0]  # nobody else suffers


def test_a_lease_has_no_use_of_the_keys_of_another(owner: Owner, reader: Reader) -> None:
    stolen: dict[int, Region] = {}

    def connect(end: End) -> tuple[End, Mapping[int, Region]]:
        other, regions = owner.export("b", end, range(2, 3))
        return other, {**regions, **stolen}

    def denied() -> None:
        with reader.connect(connect) as thief:
            assert list(thief.fetch_many([reader.want(2)])) == [0]
            with pytest.raises(AccessDenied):
                list(thief.fetch_many([reader.want(1)]))

    def spied(end: End) -> tuple[End, Mapping[int, Region]]:
        other, regions = owner.export("a", end, range(2))
        stolen.update(regions)
        return other, regions

    with reader.connect(spied) as honest:
        denied()
        assert list(honest.fetch_many([reader.want(1)])) == [0]
    owner.ask("withdraw", "a")
    denied()
    owner.ask("revoke", 1)
    denied()


def test_memory_is_read_and_never_written(owner: Owner, reader: Reader) -> None:
    from pyverbs.wr import SGE, SendWR

    regions: dict[int, Region] = {}

    def connect(end: End) -> tuple[End, Mapping[int, Region]]:
        other, found = owner.export("a", end)
        regions.update(found)
        return other, found

    with reader.connect(connect) as connection:
        assert list(connection.fetch_many([reader.want(1)])) == [0]
        local = connection._registrations[1]
        with (
            SGE(local.address, 4096, local.local_key) as piece,
            SendWR(0, RDMA_WRITE, 1, sg=[piece]) as request,
        ):
            request.set_wr_rdma(regions[1].key, regions[1].address + 4096)
            connection._pair._pair.post_send(request)
        (completion,) = connection._pair.completed(DEADLINE_S)
        assert completion.status in REFUSED
    assert owner.ask("same", 1)


def test_nothing_is_read_once_the_lease_is_withdrawn(owner: Owner, reader: Reader) -> None:
    with reader.lease(owner, "a") as connection, reader.lease(owner, "b") as other:
        assert list(connection.fetch_many([reader.want(1)])) == [0]
        owner.ask("withdraw", "a")
        owner.ask("withdraw", "a")
        reader.buffers[1][:] = bytes(SIZES[1])
        begin = time.monotonic()
        with pytest.raises(DaemonUnreachable, match="0 of 2097152 bytes came, then nobody answered"):
            list(connection.fetch_many([reader.want(1)]))
        assert time.monotonic() - begin < MISSED_S
        assert bytes(reader.buffers[1]) == bytes(SIZES[1])
        assert list(other.fetch_many([reader.want(1)])) == [0]


def test_a_read_that_takes_too_long(owner: Owner, reader: Reader) -> None:
    with reader.connect(lambda end: owner.export("a", end), timeout_s=0.5) as connection:
        owner.ask("withdraw", "a")
        with pytest.raises(DeadlineExceeded, match=r"0 of 2097152 bytes came, and no more within 0\.5 s"):
            list(connection.fetch_many([reader.want(1)]))
        assert connection.closed


def test_a_killed_owner_is_missed_in_the_middle(reader: Reader) -> None:
    owner = Owner()
    with owner.child, reader.lease(owner, "a") as connection:
        wants = [reader.want(0) for _ in range(50)]
        fetching = connection.fetch_many(wants)
        assert next(fetching) == 0
        owner.child.kill9()
        begin, done = time.monotonic(), list[int]()
        with pytest.raises(DaemonUnreachable, match="nobody answered"):
            done.extend(fetching)
        assert time.monotonic() - begin < MISSED_S
        assert connection.closed
    assert reader.buffers[0] == content(0)


def test_who_waits_is_told_when_another_thread_cuts(owner: Owner, reader: Reader) -> None:
    with reader.lease(owner, "a") as connection:
        owner.ask("withdraw", "a")
        cutting = threading.Timer(0.5, connection.cut)
        cutting.start()
        with pytest.raises(DaemonUnreachable, match="this end was cut"):
            list(connection.fetch_many([reader.want(0)]))
        cutting.join()


def test_what_cannot_be_asked_for(owner: Owner, reader: Reader) -> None:
    def wrong(want: Want, error: type[Exception]) -> None:
        with reader.lease(owner, "a", range(1, 2)) as connection, pytest.raises(error):
            list(connection.fetch_many([want]))

    wrong(reader.want(2), Refused)  # not exported
    wrong((1, SIZES[1] - 1, reader.buffers[1][:2]), Refused)  # beyond its end
    wrong((1, 0, memoryview(bytearray(4))), Refused)  # memory that is not registered
    wrong((1, 0, reader.buffers[1][:0]), ProtocolError)


def test_pages_stay_where_they_are_while_they_are_read(reader: Reader) -> None:
    owner = Owner(idle_s=8.0)
    with owner.child:
        assert owner.ask("move", 1, 1) == [1]
        assert owner.ask("move", 1, 0) == [0]
        with reader.lease(owner, "a", range(1, 2)) as connection:
            assert owner.ask("pins") == [["segment 1", True]]
            assert owner.pinned_bytes() == SIZES[1]
            assert owner.ask("move", 1, 1) == [0]
            assert list(connection.fetch_many([reader.want(1)])) == [0]
        owner.ask("withdraw", "a")
        owner.ask("sweep", 0.0)
        assert owner.ask("pins") == [["segment 1", False]]
        assert owner.pinned_bytes() == 0
        assert owner.ask("move", 1, 1) == [1]
        assert owner.ask("same", 1)

        with reader.lease(owner, "a", range(1, 3)) as connection:
            assert list(connection.fetch_many([reader.want(1)])) == [0]
            assert owner.ask("move", 1, 0) == [1]
        owner.ask("withdraw", "a")
        owner.ask("sweep")
        assert owner.pinned_bytes() == SIZES[1] + SIZES[2]  # another lease may soon follow
        eventually(lambda: owner.ask("sweep") or owner.pinned_bytes() == 0, "unpinned when idle", DEADLINE_S)
        assert owner.ask("figures") == {"segments": 0, "pinned_bytes": 0, "queue_pairs": 0, "registrations": 3}
        assert owner.ask("pins") == [
            ["segment 1", True],
            ["segment 2", True],
            ["segment 1", False],
            ["segment 2", False],
        ]
        assert owner.ask("move", 1, 0) == [0]


def test_memory_that_is_needed_is_unpinned_at_once(owner: Owner, reader: Reader) -> None:
    with reader.lease(owner, "a", range(1, 3)) as read, reader.lease(owner, "b", range(1)) as other:
        owner.ask("sweep", 0.0)
        assert list(read.fetch_many([reader.want(1), reader.want(2)])) == [0, 1]  # what is read stays
        owner.ask("revoke", 2)
        assert owner.ask("figures")["queue_pairs"] == 1
        assert owner.pinned_bytes() == SIZES[0]
        assert owner.ask("move", 2, 1) == [1]
        with pytest.raises(DaemonUnreachable, match="nobody answered"):
            list(read.fetch_many([reader.want(1)]))
        assert list(other.fetch_many([reader.want(0)])) == [0]
        with reader.lease(owner, "a", range(1, 2)) as again:
            assert list(again.fetch_many([reader.want(1)])) == [0]
    owner.ask("withdraw", "a")
    owner.ask("sweep", 0.0)
    assert owner.pinned_bytes() == SIZES[0]  # of the lease that goes on


def test_nothing_is_left_of_a_hundred_connections(owner: Owner, reader: Reader) -> None:
    with reader.lease(owner, "a") as connection:
        assert list(connection.fetch_many([reader.want(1)])) == [0]
    owner.ask("withdraw", "a")
    before, files = resources(), len(os.listdir("/proc/self/fd"))
    closed = []  # so that nothing is tidied up by being collected
    for _ in range(100):
        with reader.lease(owner, "a") as connection:
            assert list(connection.fetch_many([reader.want(1, 0, 4096)])) == [0]
        owner.ask("withdraw", "a")
        closed.append(connection)
    assert resources() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_connection_that_cannot_be_made_leaves_nothing(owner: Owner, reader: Reader) -> None:
    before = resources()

    def refuse(end: End) -> tuple[End, Mapping[int, Region]]:
        raise Refused("no")

    def elsewhere(end: End) -> tuple[End, Mapping[int, Region]]:
        return replace(end, gid=bytes.fromhex("20010db8") + bytes(12)), {}

    with pytest.raises(Refused):
        reader.connect(refuse)
    with pytest.raises(TransportUnavailable, match=r"rxe0 finds no way to the queue pair \d+ at 2001:0db8:"):
        reader.connect(elsewhere)
    assert resources() == before
