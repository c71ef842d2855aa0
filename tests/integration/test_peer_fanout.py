"""Pools that fetch one model at once pass it on to each other, over a network of real interfaces of a limited rate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.namespaces import Network, NetworkHost
from tests.integration.weights import Weights, digest_of, write_weights

POOLS = 8
HEADERS = 1.03
"""Ethernet, IP and TCP, and what control says."""


class Fleet:
    """An owner of a model, and pools that lack it; each on a host of its own, whose cable has `rate`."""

    def __init__(self, directory: Path, pools: int, rate: str, layers: int, layer_bytes: int) -> None:
        self.nbytes = layers * layer_bytes
        self.weights: Weights = write_weights(directory / "model", layers, layer_bytes=layer_bytes)
        authority = Authority(directory)
        with ExitStack() as made:
            network = made.enter_context(Network())
            self.hosts = [network.host(rate) for _ in range(pools + 1)]
            daemons = [made.enter_context(_daemon(host, authority)) for host in self.hosts]
            with ThreadPoolExecutor(len(daemons)) as starting:
                list(starting.map(Daemon.start, daemons))
            self.owner, *self.pools = daemons
            assert self.owner.serves(self.weights)
            self._ending = made.pop_all()

    def fetch(self, pool: Daemon) -> float:
        """Seconds that the model takes to come there."""
        begin = time.monotonic()
        with pool.client() as client:
            client.load(f"tiermem://{self.hosts[0].address}:7070/model")
        return time.monotonic() - begin

    def fetch_all(self, pools: Sequence[Daemon]) -> list[float]:
        with ThreadPoolExecutor(len(pools)) as fetching:
            return list(fetching.map(self.fetch, pools))

    def assert_right(self) -> None:
        for pool in self.pools:
            with pool.client() as client, client.open("model") as model:
                assert digest_of(model) == self.weights.digest

    def close(self) -> None:
        self._ending.close()


def _daemon(host: NetworkHost, authority: Authority) -> Daemon:
    """One that is not started; its certificate names its address, where the others are told that it is."""
    flags = authority.issue(host.name, alternatives=f"IP:{host.address}").flags
    return Daemon("--listen", "0.0.0.0:7070", *flags, tier="dram=512MiB", prefix=host.prefix, start=False)


def arrived(pool: Daemon, nbytes: int) -> None:
    """Wait until so much of the model is there."""
    with pool.client() as client:
        eventually(
            lambda: any(model["ready_bytes"] >= nbytes for model in client.status()["models"]),
            "a part of the model came", 30,
        )  # fmt: skip


@pytest.mark.root
def test_the_owner_sends_a_model_to_eight_pools_for_the_price_of_two(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, POOLS, "200mbit", layers=40, layer_bytes=15 << 18)
    try:
        alone_s = fleet.fetch(fleet.pools[0])
        with fleet.pools[0].client() as client:
            client.remove("model")
        before = fleet.hosts[0].sent_bytes
        took_s = fleet.fetch_all(fleet.pools)
        sent = fleet.hosts[0].sent_bytes - before
        print(f"alone {alone_s:.2f} s, {POOLS} at once {max(took_s):.2f} s, the owner sent {sent / fleet.nbytes:.2f}")
        assert sent < 2 * HEADERS * fleet.nbytes
        assert max(took_s) < 3 * alone_s
        fleet.assert_right()
        for daemon in (fleet.owner, *fleet.pools):
            assert "failed, others are asked" not in daemon.log
        eventually(lambda: fleet.owner.leases() == 0, "all was given back")
    finally:
        fleet.close()


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Fleet]:
    """The second of its pools gets its bytes from the first."""
    fleet = Fleet(tmp_path, 2, "160mbit", layers=75, layer_bytes=2 << 20)
    yield fleet
    fleet.close()


def fetch_behind(trio: Fleet, starting: ThreadPoolExecutor) -> list[Future[float]]:
    """Begin both fetches, and wait until the one behind has a part."""
    first, behind = trio.pools
    begun = [starting.submit(trio.fetch, first)]
    arrived(first, 1)
    begun.append(starting.submit(trio.fetch, behind))
    arrived(behind, trio.nbytes // 10)
    assert f"comes by way of {trio.hosts[1].address}:7070" in behind.log
    return begun


@pytest.mark.root
def test_who_loses_the_pool_ahead_goes_on_with_the_owner(trio: Fleet) -> None:
    before, came = trio.hosts[0].sent_bytes, trio.hosts[2].received_bytes
    with ThreadPoolExecutor(2) as starting:
        _, behind = fetch_behind(trio, starting)
        trio.pools[0].kill9()
        behind.result(60)
    assert trio.hosts[0].sent_bytes - before < 2 * HEADERS * trio.nbytes
    assert trio.hosts[2].received_bytes - came < HEADERS * (trio.nbytes + (16 << 20)), "what it had did not come again"
    trio.pools.pop(0)
    trio.assert_right()
    (pool,) = trio.pools
    eventually(lambda: trio.owner.leases() == 0, "all was given back")
    for _ in range(2):
        with pool.client() as client:
            client.remove("model")
        trio.fetch(pool)
    assert pool.log.count("comes by way of") == 1, "nobody else fetches it now"


@pytest.mark.root
def test_a_pool_ahead_that_falls_silent_is_left_behind(trio: Fleet) -> None:
    with ThreadPoolExecutor(2) as starting:
        first, behind = fetch_behind(trio, starting)
        trio.hosts[1].cut()
        behind.result(60)
        trio.hosts[1].mend()
        first.exception(90)
    trio.fetch(trio.pools[0])
    trio.assert_right()


@pytest.mark.root
def test_a_pool_ahead_whose_load_fails_or_is_given_up_is_left_behind(trio: Fleet) -> None:
    with ThreadPoolExecutor(2) as starting:
        first, behind = fetch_behind(trio, starting)
        trio.pools[0].terminate()
        behind.result(60)
        assert first.exception(60) is not None
    trio.pools.pop(0)
    trio.assert_right()
