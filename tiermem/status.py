"""Status: what a pool holds and does, as plain data for the wire, the command line and metrics. Never changes it."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.fingerprint import fingerprint_of, is_image
from tiermem.heat import HeatColumns
from tiermem.load import Figures, Load
from tiermem.migrator.carried import Carried
from tiermem.observations import Rung
from tiermem.peer.address import is_remote
from tiermem.peer_service import PeerSession
from tiermem.pool import Pool
from tiermem.rpc.messages import MoveEntry
from tiermem.statistics import Client, ModelHeat
from tiermem.tier import Tier, Tiers
from tiermem.tiering import Tiering
from tiermem.types import LOADING, PAGE_BYTES


def status_of(pool: Pool, name: str | None = None) -> dict[str, Any]:
    """The pool's status; `name` limits the models to one. Raises ModelNotFound for an unknown one."""
    with pool.lock:
        records = list(pool.catalog) if name is None else [pool.catalog.named(name)]
        loads = pool.loads()
        return {
            "pool": {
                "id": pool.id,
                "pid": os.getpid(),
                "version": _native.version(),
                "uptime_s": time.time() - pool.started_s,
                "backing": pool.memory.backing.kind,
                "backing_reason": pool.memory.backing.reason,
                "catalog_error": pool.files.error if pool.files else "",
                "quarantined_loads": pool.quarantined,
                "evicted_bytes": pool.tiering.migrator.evicted_bytes,
                "leases": len(pool.leases),
            },
            "migration": _migration(pool.tiering, pool.tiers),
            "sampling": {
                "rung": pool.statistics.rung,
                "reason": pool.statistics.reason,
                "clients": [_client(client) for client in pool.statistics.clients.values()],
                "rungs": {rung.name.lower(): asdict(cost) for rung, cost in sorted(pool.statistics.costs.items())},
            },
            "tiers": [_tier(tier) for tier in pool.tiers],
            "devices": [_carried(carried) for carried in pool.tiering.migrator.replicas.carriers()],
            "spare": {
                "target_bytes": pool.spare.target_bytes,
                "ready_bytes": pool.spare.nbytes,
                "prefault_s": pool.spare.fill_s,
            },
            "staging_bytes": pool.loader.staging_bytes,
            "remote": _remote(pool),
            "models": [_model(pool, record, loads.get(record.id)) for record in records],
        }


def heat_of(pool: Pool, name: str) -> ModelHeat:
    """Heat of each page of a model. Raises ModelNotFound."""
    with pool.lock:
        record = pool.catalog.named(name)
        columns = pool.statistics.heat(record).columns(time.monotonic())
        tier = record.residency.copy()
    layers = tuple((segment.layer, segment.pages) for segment in record.manifest.segments)
    return ModelHeat(layers, columns, tuple(tier.name for tier in pool.tiers), tier)


def moves_of(pool: Pool, model: str | None, page: int | None, limit: int) -> tuple[MoveEntry, ...]:
    """The latest moves, newest first: all, of a model, or of one page of it. Raises ModelNotFound."""
    if model is not None:
        with pool.lock:
            pool.catalog.named(model)
    names = [tier.name for tier in pool.tiers]
    return tuple(
        MoveEntry(
            entry.unix_s, entry.model, entry.first, entry.pages, names[entry.source], names[entry.target],
            entry.reason, entry.outcome,
        )
        for entry in pool.tiering.migrator.log.entries(model, page, max(0, min(limit, 10_000)))
    )  # fmt: skip


def paths_of(pool: Pool, name: str) -> tuple[str, ...]:
    """Path of each segment's file, for processes of this user on this host. Raises ModelNotFound, Refused."""
    with pool.lock:
        return pool.memory.paths(pool.catalog.named(name))


def residency_of(pool: Pool, record: ModelRecord) -> dict[str, str]:
    """Layer -> name of the tier that holds it, `loading`, or where several do `dram+cxl`, the one with most pages
    first."""
    with pool.lock:
        residency = record.residency.tolist()
    names = {tier.id: tier.name for tier in pool.tiers} | {LOADING: "loading"}
    found = {}
    for number, segment in enumerate(record.manifest.segments):
        codes = Counter(residency[record.pages(number)])
        found[segment.layer] = "+".join(names[code] for code, _ in codes.most_common())
    return found


def _model(pool: Pool, record: ModelRecord, load: Load | None) -> dict[str, Any]:
    manifest = record.manifest
    figures = load.figures if load else pool.figures.get(record.id)
    sessions = [lease.session for lease in pool.leases if lease.model_id == record.id]
    return {
        "name": record.name,
        "path": manifest.path,
        "origin": _origin(record),
        "identity": record.id,
        "tensors": len(manifest.tensors),
        "segments": len(manifest.segments),
        "bytes": manifest.nbytes,
        "page_bytes": manifest.page_bytes,
        "resident_bytes": sum(s.page_bytes for i, s in enumerate(manifest.segments) if record.resident(i)),
        "ready_bytes": sum(t.nbytes for t, ready in zip(manifest.tensors, record.ready, strict=True) if ready),
        "fingerprint": fingerprint_of(manifest),
        "state": _state(record, load),
        "leases": pool.leases.holders(record.id),
        "readers": sorted({session.pid for session in sessions if not isinstance(session, PeerSession)}),
        "peers": sorted({str(session.peer) for session in sessions if isinstance(session, PeerSession)}),
        "pins": record.pins,
        "opens": record.opens,
        "residency": residency_of(pool, record),
        "replicas": _replicas(pool, record),
        "heat": _heat(pool.statistics.heat(record).columns(time.monotonic())),
        "last_load": _figures(figures) if figures else None,
    }


def _replicas(pool: Pool, record: ModelRecord) -> dict[str, dict[str, int]]:
    """Tier of a device -> layer -> bytes of pages that have a copy there; what has none is left out."""
    found: dict[str, dict[str, int]] = {}
    for tier in pool.tiers.devices:
        copied = record.replicas >> tier.id & 1
        for number, segment in enumerate(record.manifest.segments):
            if pages := int(copied[record.pages(number)].sum()):
                found.setdefault(tier.name, {})[segment.layer] = pages * PAGE_BYTES
    return found


def _state(record: ModelRecord, load: Load | None) -> str:
    if load is not None:
        return "draft" if load.filler is not None else "loading"
    return "disk" if record.missing() else "resident"


def _origin(record: ModelRecord) -> str:
    """What its bytes come from: `checkpoint`, `peer`, or `image` (from nowhere but memory)."""
    if is_image(record.manifest):
        return "image"
    return "peer" if is_remote(record.manifest.path) else "checkpoint"


def _remote(pool: Pool) -> dict[str, Any]:
    """What other hosts' pools have to do with this one: `peers` are those that it calls, `served` those that call it.
    Holds the lock."""
    peers, data = pool.peers, pool.peers.sent()
    return {
        "listen": "" if peers.listener is None else str(peers.listener),
        "data_port": data.port,
        "tls": peers.tls is not None,
        "tls_name": peers.name,
        "transport": asdict(peers.transports.own()),
        "peers": [
            {
                "address": str(address),
                "configured": address in peers.configured,
                "connected": peers.connected(address),
                "error": figures.error,
                "used_ago_s": max(0.0, time.time() - figures.used_s) if figures.used_s else None,
                "received_bytes": figures.received_bytes,
                "transport": asdict(way) if (way := peers.transport(address)) else None,
            }
            for address, figures in peers.figures().items()
        ],
        "served": _served(pool, data.sent),
        "sent_bytes": data.sent_bytes,
        "exports": asdict(peers.exports()),
        "connections": data.connections,
        "accepted": data.accepted,
        "refused": data.refused,
        "cut": data.cut,
    }


def _served(pool: Pool, sent: Mapping[str, int]) -> list[dict[str, Any]]:
    """Peers by certificate or, without TLS, by host: those that are there, and those that something was sent to."""
    guests = pool.peers.guests()
    readers = [lease.session.peer for lease in pool.leases if isinstance(lease.session, PeerSession)]
    hosts: dict[str, set[str]] = {party: set() for party in sent}
    for peer in (*guests, *readers):
        hosts.setdefault(peer.party, set()).add(peer.host)
    sessions, leases = (Counter(peer.party for peer in peers) for peers in (guests, readers))
    return [
        {
            "peer": party.partition(" ")[2],
            "hosts": sorted(hosts[party]),
            "sessions": sessions[party],
            "leases": leases[party],
            "sent_bytes": sent.get(party, 0),
        }
        for party in sorted(hosts)
    ]


def _tier(tier: Tier) -> dict[str, Any]:
    speed = {name: None if math.isnan(value) else value for name, value in asdict(tier.speed).items()}
    return {
        "name": tier.name,
        "kind": tier.kind,
        "nodes": list(tier.nodes),
        "device": tier.device,
        "online": tier.online,
        "capacity_bytes": tier.capacity_bytes,
        "used_bytes": tier.used_bytes,
        **speed,
    }


def _carried(carried: Carried) -> dict[str, Any]:
    """What one process has of one model on one device. `tier`: the pool's of that device, or None."""
    return {
        "device": carried.device,
        "pid": carried.lease.session.pid,
        "model": carried.record.name,
        "tier": None if carried.tier is None else carried.tier.name,
        "budget_bytes": carried.budget_bytes,
        "capacity_bytes": carried.capacity_bytes,
        "held_bytes": carried.held_bytes,
        "registered": carried.registered,
        "orders": len(carried.orders),
    }


def _migration(tiering: Tiering, tiers: Tiers) -> dict[str, Any]:
    steering, migrator = tiering.steering, tiering.migrator
    return {
        "policy": steering.name,
        "policy_failure": steering.failure,
        "policy_warnings": list(steering.warnings),
        "period_s": steering.period_s,
        "plans": steering.plans,
        "failures": steering.failures,
        "policy_cpu_s": steering.cpu_s,
        "control_cpu_s": tiering.control.cpu_s,
        "ticks": tiering.control.ticks,
        "quota_bytes_s": migrator.quota.bytes_s,
        "moves_shared": migrator.moves_shared,
        "moved_bytes": migrator.moved_bytes,
        "moved_pages": {
            f"{tiers[source].name}->{tiers[target].name}": pages
            for (source, target), pages in sorted(migrator.log.moved_pages.items())
        },
        "refused": dict(migrator.log.refused),
    }


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "check_only": figures.check_only,
        "elapsed_s": figures.elapsed_s or time.monotonic() - figures.started_s,
        "read_bytes": figures.read_bytes,
        "prefault_thread_s": figures.prefault_thread_s,
        "read_thread_s": figures.read_thread_s,
        "digest_thread_s": figures.digest_thread_s,
    }


def _heat(columns: HeatColumns) -> dict[str, Any]:
    rate = columns.rate[columns.known]
    return {
        "pages": len(columns),
        "known_pages": int(columns.known.sum()),
        "touched_pages": int((rate > 0).sum()),
        "touches_per_s": float(rate.sum()),
        "rungs": sorted(Rung(code).name.lower() for code in set(columns.rung.tolist()) if code),
    }


def _client(client: Client) -> dict[str, Any]:
    return {
        "pid": client.pid,
        "leases": client.leases,
        "refused": client.refused,
        "untrackable_pages": sum(client.untrackable.values()),
    }
