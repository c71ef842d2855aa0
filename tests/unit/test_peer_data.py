"""A data port and its receivers: exactly the bytes that were asked for, within the grant, the limits and the lease."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.certificates import Authority, Certificate
from tests.conftest import open_files, until
from tiermem.errors import AccessDenied, Closed, DaemonUnreachable, ProtocolError, Refused
from tiermem.peer.address import Address
from tiermem.peer.grants import Grant, Grants
from tiermem.peer.receiver import DataConnection, Want
from tiermem.peer.sender import DataServer, Limits
from tiermem.peer.wire import MAX_EXTENT_BYTES

HOST = "127.0.0.1"
LENGTHS = {0: 3_000_000, 1: 100}
MISSING = 2


def context_of(certificate: Certificate, side: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.load_cert_chain(certificate.cert, certificate.key)
    context.load_verify_locations(certificate.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class Pool:
    """A data port, and what stands behind it: two segments in files, and one that cannot be had any more."""

    def __init__(self, directory: Path, tls: ssl.SSLContext | None = None, **limits: float) -> None:
        self.bytes = [np.random.default_rng(i).bytes(size) for i, size in LENGTHS.items()]
        self._paths = [directory / f"segment{i}" for i in LENGTHS]
        for path, data in zip(self._paths, self.bytes, strict=True):
            path.write_bytes(data)
        self.there = 1 << 62
        """Bytes of segment 0 that were received so far."""
        self.asked = 0
        self.answering = threading.Event()
        self.answering.set()
        self.grants = Grants()
        context, most = tls and (lambda: tls), Limits(**limits)  # type: ignore[arg-type]
        self.server = DataServer(self.grants, self._descriptor, self._available, context, most)
        self.address = Address("localhost" if tls else HOST, self.server.start(HOST, 0))

    def token(self, peer: str = "", lease: str = "lease") -> bytes:
        return self.grants.issue(lease, LENGTHS | {MISSING: 10}, peer, 60.0)

    def connect(self, tls: ssl.SSLContext | None = None, peer: str = "", lease: str = "lease") -> DataConnection:
        return DataConnection(self.address, self.token(peer, lease), tls, 10.0)

    def _descriptor(self, grant: Grant, segment: int) -> int:
        if segment == MISSING:
            raise Refused("/secret/path is not in memory")
        return os.open(self._paths[segment], os.O_RDONLY)

    def _available(self, grant: Grant, segment: int, offset: int, length: int) -> bool:
        self.asked += 1
        self.answering.wait(10)
        return segment != 0 or offset + length <= self.there


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    before = open_files()
    pool = Pool(tmp_path)
    yield pool
    pool.server.stop()
    pool.grants.check()
    assert open_files() == before
    assert pool.server.figures().connections == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tiermem-peer")]


def memory(length: int) -> memoryview:
    return memoryview(bytearray(length))


@pytest.mark.parametrize(
    ("segment", "offset", "length"), [(0, 0, 3_000_000), (0, 1, 4097), (1, 99, 1), (0, 2_999_999, 1)]
)
def test_fetch_brings_the_extent(pool: Pool, segment: int, offset: int, length: int) -> None:
    target = memory(length + 2)
    with pool.connect() as connection:
        connection.fetch(segment, offset, target[1:-1])
        assert connection.received_bytes == length
    assert bytes(target) == b"\0" + pool.bytes[segment][offset : offset + length] + b"\0"
    until(lambda: pool.server.figures().sent_bytes == length)


def test_many_small_and_large_ones_come_in_order(pool: Pool) -> None:
    target = memory(LENGTHS[0])
    inner = np.random.default_rng(1).choice(np.arange(1, LENGTHS[0]), 1999, replace=False).tolist()
    wants = [(0, a, target[a:b]) for a, b in pairwise([0, *sorted(inner), LENGTHS[0]])]
    with pool.connect() as connection:
        assert list(connection.fetch_many(wants)) == list(range(2000))
        assert list(connection.fetch_many([])) == []
    assert bytes(target) == pool.bytes[0]


def test_next_request_is_on_its_way_before_the_answer_is_read(pool: Pool) -> None:
    taken: list[int] = []

    def wants() -> Iterator[Want]:
        for offset in range(10):
            taken.append(offset)
            yield 0, offset, memory(1)

    with pool.connect() as connection:
        fetched = connection.fetch_many(wants())
        next(fetched)
        assert len(taken) == 10
        list(fetched)


def test_what_is_not_there_yet_is_passed_over(pool: Pool) -> None:
    pool.there = 1000
    targets = [memory(500) for _ in range(4)]
    wants = [(0, 500 * i, target) for i, target in enumerate(targets)]
    with pool.connect() as connection:
        assert list(connection.fetch_many(wants)) == [0, 1]
        with pytest.raises(Refused, match="500 bytes at 1000 of segment 0"):
            connection.fetch(0, 1000, targets[2])
        pool.there = 2000
        assert list(connection.fetch_many(wants[2:])) == [0, 1]
    assert b"".join(targets) == pool.bytes[0][:2000]


@pytest.mark.parametrize(
    ("segment", "offset", "length"),
    [(0, 1, 3_000_000), (0, 3_000_000, 1), (1, 0, 101), (7, 0, 1), (0, (1 << 64) - 1, 1), (MISSING, 0, 10)],
)
def test_what_is_not_granted_or_gone_is_refused(pool: Pool, segment: int, offset: int, length: int) -> None:
    target = memory(length)
    connection = pool.connect()
    with pytest.raises(Refused, match=f"{length} bytes at {offset} of segment {segment}") as refused:
        connection.fetch(segment, offset, target)
    assert "secret" not in str(refused.value)
    assert not any(target)
    assert connection.closed
    assert pool.server.figures().refused == 1
    with pytest.raises(Closed, match="connect again"):
        connection.fetch(0, 0, target)


def test_bytes_before_a_refusal_are_given(pool: Pool) -> None:
    targets = [memory(10), memory(10), memory(10)]
    with pool.connect() as connection:
        fetched = connection.fetch_many([(0, 0, targets[0]), (0, 3_000_000, targets[1]), (0, 0, targets[2])])
        assert next(fetched) == 0
        assert bytes(targets[0]) == pool.bytes[0][:10]
        with pytest.raises(Refused, match="10 bytes at 3000000"):
            next(fetched)


def test_leaving_before_the_end_closes_the_connection(pool: Pool) -> None:
    connection = pool.connect()
    fetched = connection.fetch_many([(0, i, memory(1)) for i in range(10)])
    next(fetched)
    fetched.close()
    assert connection.closed


def test_extent_of_more_than_64_mib_is_never_asked_for(pool: Pool) -> None:
    connection = pool.connect()
    with pytest.raises(ProtocolError, match=str(MAX_EXTENT_BYTES)):
        connection.fetch(0, 0, memory(MAX_EXTENT_BYTES + 1))
    assert connection.closed


def test_file_that_is_shorter_than_its_grant_ends_the_connection(pool: Pool) -> None:
    os.truncate(pool._paths[0], 1000)
    with pool.connect() as connection, pytest.raises(DaemonUnreachable, match="1000 of 3000000 bytes came"):
        connection.fetch(0, 0, memory(LENGTHS[0]))
    with pool.connect() as connection:
        connection.fetch(1, 0, memory(100))


def test_withdrawn_lease_ends_its_connections_and_no_others(pool: Pool) -> None:
    with pool.connect() as mine, pool.connect(lease="other") as others:
        mine.fetch(1, 0, memory(100))
        token = pool.token()
        pool.grants.withdraw("lease")
        with pytest.raises(DaemonUnreachable):
            mine.fetch(1, 0, memory(100))
        with pytest.raises(AccessDenied):
            DataConnection(pool.address, token, None, 10.0)
        others.fetch(1, 0, memory(100))


def test_connections_of_a_peer_are_limited(tmp_path: Path) -> None:
    pool = Pool(tmp_path, per_peer=2)
    with pool.connect() as first, pool.connect():
        with pytest.raises(Refused, match="2 of a peer"):
            pool.connect()
        first.close()
        until(lambda: pool.server.figures().connections == 1)
        with pool.connect() as third:
            third.fetch(1, 0, memory(100))
    pool.server.stop()


def test_connections_are_limited_over_all_leases(tmp_path: Path) -> None:
    pool = Pool(tmp_path, connections=1, per_peer=2)
    with pool.connect(), pytest.raises(Refused, match="1 of all"):
        pool.connect(lease="other")
    pool.server.stop()


def test_stop_ends_every_connection_and_may_be_repeated(pool: Pool) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(pool.connect())
        stack.enter_context(socket.create_connection((HOST, pool.address.port)))
        until(lambda: pool.server.figures().connections == 5)
        pool.server.stop()
        pool.server.stop()
        assert pool.server.figures().connections == 0
    with pytest.raises(DaemonUnreachable, match="is a pool there"):
        pool.connect()


def test_cut_wakes_the_thread_that_waits(pool: Pool) -> None:
    pool.answering.clear()
    with pool.connect() as connection, ThreadPoolExecutor(1) as thread:
        fetch = thread.submit(connection.fetch, 1, 0, memory(100))
        until(lambda: pool.asked > 0)
        connection.cut()
        with pytest.raises(DaemonUnreachable, match="the answer to 100 bytes at 0 of segment 1: 0 of 24 bytes came"):
            fetch.result(10)
        pool.answering.set()


def test_address_that_is_taken_is_refused(pool: Pool) -> None:
    other = DataServer(Grants(), lambda *_: 0, lambda *_: True)
    with pytest.raises(Refused, match=str(pool.address.port)):
        other.start(HOST, pool.address.port)
    other.stop()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_tls_brings_the_same_bytes_to_the_peer_of_that_name_only(tmp_path: Path, authority: Authority) -> None:
    pool = Pool(tmp_path, context_of(authority.issue("pool-a"), ssl.PROTOCOL_TLS_SERVER))
    try:
        mine, other = (context_of(authority.issue(n), ssl.PROTOCOL_TLS_CLIENT) for n in ("pool-b", "pool-c"))
        target = memory(LENGTHS[0])
        with pool.connect(mine, "pool-b") as connection:
            connection.fetch(0, 0, target)
            with pytest.raises(AccessDenied, match="another peer's"):
                pool.connect(other, "pool-b")
            pool.grants.withdraw("lease")
            with pytest.raises(DaemonUnreachable):
                connection.fetch(1, 0, memory(100))
        assert bytes(target) == pool.bytes[0]
    finally:
        pool.server.stop()
