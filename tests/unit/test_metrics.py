"""Metrics: what a scraper gets is what the pool counts, over HTTP, where it was asked for and nowhere else."""

from __future__ import annotations

import socket
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import CheckpointWriter
from tiermem.config import load_config
from tiermem.embedded import EmbeddedPool
from tiermem.errors import ConfigError
from tiermem.metrics import MetricsServer
from tiermem.observations import Rung
from tiermem.peer.address import Address
from tiermem.peer.identity import Identity
from tiermem.peer.rdma_exporter import Figures as ExportFigures
from tiermem.peer.sender import Figures

Scraped = dict[str, dict[str, float]]


@pytest.fixture
def served(pool: EmbeddedPool) -> Iterator[MetricsServer]:
    server = MetricsServer(pool._pool, "127.0.0.1:0")
    yield server
    server.close()


def scrape(port: int, host: str = "127.0.0.1") -> Scraped:
    """Sample name -> its only label's value, or empty -> value."""
    found: Scraped = {}
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as reply:
        for family in text_string_to_metric_families(reply.read().decode()):
            assert family.documentation.endswith("."), family.name
            for sample in family.samples:
                found.setdefault(sample.name, {})["".join(sample.labels.values())] = sample.value
    return found


def test_a_pool_that_did_nothing(served: MetricsServer, pool: EmbeddedPool) -> None:
    found = scrape(served.port)
    assert {name: found[f"tiermem_{name}"] for name in ("models", "leases", "clients", "loads")} == {
        "models": {"": 0}, "leases": {"": 0}, "clients": {"": 0}, "loads": {"": 0},
    }  # fmt: skip
    assert found["tiermem_tier_used_bytes"]["dram"] == 0
    assert found["tiermem_tier_capacity_bytes"]["dram"] == 256 << 20
    assert found["tiermem_evicted_bytes_total"] == found["tiermem_quarantined_loads_total"] == {"": 0}
    assert not any(name.startswith("tiermem_sampling") for name in found)
    assert all(name.startswith("tiermem_") for name in found), "this process is not the pool's"


def test_what_crossed_between_pools(served: MetricsServer, pool: EmbeddedPool) -> None:
    found = scrape(served.port)
    assert found["tiermem_peer_connections"] == found["tiermem_peer_sessions"] == {"": 0}
    crossed = [name for name in found if name.startswith("tiermem_peer") and "bytes" in name]
    assert crossed == ["tiermem_peer_pinned_bytes"]
    peers = pool._pool.peers
    sent = Counter({"name pool-c": 7, "host 10.0.0.3": 17})
    peers.sent = lambda: Figures(sent=sent, connections=1, accepted=3, refused=4, cut=5)
    peers.guests = lambda: [Identity("", "10.0.0.3")] * 2
    peers.exports = lambda: ExportFigures(segments=1, pinned_bytes=19)
    peers.received(Address("pool-b", 7070), 11)
    peers.received(Address("::1", 7070), 13)
    found = scrape(served.port)
    assert found["tiermem_peer_received_bytes_total"] == {"pool-b:7070": 11, "[::1]:7070": 13}
    assert found["tiermem_peer_sent_bytes_total"] == {"pool-c": 7, "10.0.0.3": 17}
    counts = {name: found[f"tiermem_peer_{name}_total"][""] for name in ("accepted", "refused", "cut")}
    assert found["tiermem_peer_pinned_bytes"] == {"": 19}
    assert counts == {"accepted": 3, "refused": 4, "cut": 5}
    assert (found["tiermem_peer_connections"], found["tiermem_peer_sessions"]) == ({"": 1}, {"": 2})


def test_numbers_follow_the_pool(served: MetricsServer, pool: EmbeddedPool, checkpoint: CheckpointWriter) -> None:
    with pool.open(checkpoint("model", layers=3).path) as model:
        model.wait()
        found = scrape(served.port)
        assert found["tiermem_models"] == found["tiermem_leases"] == found["tiermem_clients"] == {"": 1}
        assert found["tiermem_tier_used_bytes"]["dram"] == 3 * (2 << 20)
        assert found["tiermem_sampling_pages_total"]["declared"] == 3
    pool.evict("model")
    found = scrape(served.port)
    assert found["tiermem_models"] == {"": 1}
    assert found["tiermem_leases"] == found["tiermem_clients"] == {"": 0}
    assert found["tiermem_evicted_bytes_total"] == {"": 0}, "that was a request; nothing was evicted by policy"
    assert found["tiermem_moved_pages_total"] == {"dramdisk": 3}
    pool._pool.tiering.migrator.log.refused["busy"] += 2
    pool._pool.tiering.steering.failures = 4
    found = scrape(served.port)
    assert found["tiermem_refused_pages_total"] == {"busy": 2}
    assert found["tiermem_policy_failures_total"] == {"": 4}
    assert found["tiermem_policy_cpu_seconds_total"] == found["tiermem_control_cpu_seconds_total"] == {"": 0}


def test_each_field_of_a_cost_is_a_counter_by_rung(served: MetricsServer, pool: EmbeddedPool) -> None:
    costs = pool._pool.statistics.costs
    fields = list(costs[Rung.PERF].__dataclass_fields__)
    for number, field in enumerate(fields, 1):
        setattr(costs[Rung.PERF], field, number)
        setattr(costs[Rung.ACCESSED], field, number + 0.5)
    found = scrape(served.port)
    for number, field in enumerate(fields, 1):
        name = f"tiermem_sampling_{field[:-2] + '_seconds' if field.endswith('_s') else field}_total"
        assert found[name] == {"perf": number, "accessed": number + 0.5}, name
    assert len([name for name in found if name.startswith("tiermem_sampling")]) == len(fields)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listener = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"{listener}: .*in use.*--metrics-port"):
            MetricsServer(None, listener)  # type: ignore[arg-type]  # it gets no further
    with pytest.raises(ConfigError, match="--metrics-port"):
        MetricsServer(None, "192.0.2.1:0")  # type: ignore[arg-type]


def test_a_closed_server_answers_no_more(pool: EmbeddedPool) -> None:
    server = MetricsServer(pool._pool, "127.0.0.1:0")
    scrape(server.port)
    server.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), 1)
    MetricsServer(pool._pool, f"127.0.0.1:{server.port}").close()


def test_an_address_of_ipv6(pool: EmbeddedPool) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("the host has no IPv6 loopback")
    server = MetricsServer(pool._pool, "[::1]:0")
    assert "tiermem_models" in scrape(server.port, "[::1]")
    server.close()


@pytest.mark.parametrize(
    ("text", "listener"),
    [("9464", "127.0.0.1:9464"), ("0", "127.0.0.1:0"), ("0.0.0.0:9464", "0.0.0.0:9464"), ("", ""),
     (9464, "127.0.0.1:9464")],
)  # fmt: skip
def test_without_a_host_it_is_the_loopback(text: object, listener: str) -> None:
    assert load_config({"metrics_port": text}, environ={}, files=()).metrics_port == listener


@pytest.mark.parametrize("text", ["65536", "-1", "http", "host:", "a:b"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="port"):
        load_config({"metrics_port": text}, environ={}, files=())
