"""Metrics: a pool's state and what observing costs, for Prometheus. Computed when it is asked for; never kept.

Owns names and help texts of the metrics, and the HTTP server that a scraper asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from tiermem.errors import ConfigError
from tiermem.observations import Rung
from tiermem.pool import Pool

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_SAMPLING = {
    "windows": "Windows of page tables that clients reported.",
    "pages": "Pages that these windows sampled, or that a request named.",
    "touched": "Pages of them that were touched.",
    "samples": "Hardware samples of addresses in models.",
    "foreign": "Hardware samples of other addresses.",
    "lost": "Samples that found no room in a ring.",
    "lost_samples": "Samples that the PMU could not take.",
    "throttled": "Times that the kernel throttled an event.",
    "sampler_seconds": "CPU time of samplers.",
    "fault_seconds": "CPU time of faults that sampling caused in clients, as measured there.",
    "client_seconds": "CPU time of the clients that were sampled.",
}
"""Field of a Cost, with `_seconds` for `_s`, -> help. All are counters by rung."""

_DATA = {
    "accepted": "Data connections that peers opened.",
    "refused": "Data connections and reads that were refused to peers.",
    "cut": "Data connections of peers that took nothing for too long.",
}
"""Field of a data port's Figures -> help. All are counters."""


class PoolCollector:
    """What a scrape gets."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        pool = self._pool
        with pool.lock:
            costs = {rung.name.lower(): asdict(cost) for rung, cost in pool.statistics.costs.items()}
            tiers = [(tier.name, tier.used_bytes, tier.capacity_bytes) for tier in pool.tiers]
            gauges = {
                "models": ("Models that the pool knows.", len(pool.catalog)),
                "leases": ("Leases that are held.", len(pool.leases)),
                "clients": ("Processes that hold leases.", len(pool.statistics.clients)),
                "loads": ("Loads in progress.", len(pool.loads())),
            }
            evicted, quarantined = pool.tiering.migrator.evicted_bytes, pool.quarantined
            steering, migrator, control = pool.tiering.steering, pool.tiering.migrator, pool.tiering.control
            moved = {(pool.tiers[s].name, pool.tiers[t].name): n for (s, t), n in migrator.log.moved_pages.items()}
            refused = dict(migrator.log.refused)
            policy_cpu_s, control_cpu_s, failures = steering.cpu_s, control.cpu_s, steering.failures
        yield from _peers(pool)
        used = GaugeMetricFamily("tiermem_tier_used_bytes", "Bytes in use.", labels=["tier"])
        capacity = GaugeMetricFamily("tiermem_tier_capacity_bytes", "Bytes that a tier may hold.", labels=["tier"])
        for name, used_bytes, capacity_bytes in tiers:
            used.add_metric([name], used_bytes)
            if capacity_bytes is not None:
                capacity.add_metric([name], capacity_bytes)
        yield from (used, capacity)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"tiermem_{name}", text, value=value)
        yield CounterMetricFamily("tiermem_evicted_bytes", "Bytes that left memory by policy.", value=evicted)
        yield CounterMetricFamily("tiermem_quarantined_loads", "Adopted models with damaged bytes.", value=quarantined)
        pages = CounterMetricFamily("tiermem_moved_pages", "Pages that moved.", labels=["source", "target"])
        for way, count in moved.items():
            pages.add_metric(way, count)
        causes = CounterMetricFamily("tiermem_refused_pages", "Pages that a plan named and stayed.", labels=["cause"])
        for cause, count in refused.items():
            causes.add_metric([cause], count)
        yield from (pages, causes)
        yield CounterMetricFamily("tiermem_policy_failures", "Times that a policy was taken out.", value=failures)
        yield CounterMetricFamily("tiermem_policy_cpu_seconds", "CPU time of policies.", value=policy_cpu_s)
        yield CounterMetricFamily("tiermem_control_cpu_seconds", "CPU time of the control loop.", value=control_cpu_s)
        for name, text in _SAMPLING.items():
            counter = CounterMetricFamily(f"tiermem_sampling_{name}", text, labels=["rung"])
            for rung in Rung:
                if cost := costs.get(rung.name.lower()):
                    counter.add_metric([rung.name.lower()], cost[name.replace("_seconds", "_s")])
            yield counter


def _peers(pool: Pool) -> Iterator[Metric]:
    """What crossed between this pool and others."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    received = CounterMetricFamily("tiermem_peer_received_bytes", "Bytes of weights that a peer sent.", labels=["peer"])
    for address, figures in pool.peers.figures().items():
        received.add_metric([str(address)], figures.received_bytes)
    yield received
    data = pool.peers.sent()
    sent = CounterMetricFamily("tiermem_peer_sent_bytes", "Bytes of weights that a peer was sent.", labels=["peer"])
    for party, nbytes in data.sent.items():
        sent.add_metric([party.partition(" ")[2]], nbytes)
    yield sent
    pinned = pool.peers.exports().pinned_bytes
    yield GaugeMetricFamily("tiermem_peer_pinned_bytes", "Memory pinned for peers to read by RDMA.", value=pinned)
    guests = len(pool.peers.guests())
    yield GaugeMetricFamily("tiermem_peer_sessions", "Sessions that peers have with this pool.", value=guests)
    yield GaugeMetricFamily("tiermem_peer_connections", "Data connections of peers.", value=data.connections)
    for name, text in _DATA.items():
        yield CounterMetricFamily(f"tiermem_peer_{name}", text, value=getattr(data, name))


class MetricsServer:
    """An HTTP server of its own thread at `listener` (HOST:PORT). Raises ConfigError where it cannot listen there."""

    def __init__(self, pool: Pool, listener: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(PoolCollector(pool))
        host, _, port = listener.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics at {listener}: {error.strerror or error}; "
                              "choose another --metrics-port") from error  # fmt: skip

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
