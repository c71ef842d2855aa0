"""Status: what a pool holds and does, as plain data for the wire, the command line and metrics. Never changes it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.heat import HeatColumns
from tiermem.load import Figures, Load
from tiermem.observations import Rung
from tiermem.pool import Pool
from tiermem.statistics import Client, ModelHeat
from tiermem.types import LOADING


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
                "backing": pool.dram.backing.kind,
                "backing_reason": pool.dram.backing.reason,
                "policy": pool.config.policy,
                "policy_failure": pool.eviction.migrator.failure,
                "catalog_error": pool.files.error if pool.files else "",
                "quarantined_loads": pool.quarantined,
                "evicted_bytes": pool.eviction.migrator.evicted_bytes,
                "leases": len(pool.leases),
            },
            "sampling": {
                "rung": pool.statistics.rung,
                "reason": pool.statistics.reason,
                "clients": [_client(client) for client in pool.statistics.clients.values()],
                "rungs": {rung.name.lower(): asdict(cost) for rung, cost in sorted(pool.statistics.costs.items())},
            },
            "tiers": [
                {"name": tier.name, "capacity_bytes": tier.capacity_bytes, "used_bytes": tier.used_bytes}
                for tier in pool.tiers
            ],
            "spare": {
                "target_bytes": pool.spare.target_bytes,
                "ready_bytes": pool.spare.nbytes,
                "prefault_s": pool.spare.fill_s,
            },
            "staging_bytes": pool.loader.staging_bytes,
            "models": [_model(pool, record, loads.get(record.id)) for record in records],
        }


def heat_of(pool: Pool, name: str) -> ModelHeat:
    """Heat of each page of a model. Raises ModelNotFound."""
    with pool.lock:
        record = pool.catalog.named(name)
        columns = pool.statistics.heat(record).columns(time.monotonic())
    return ModelHeat(tuple((segment.layer, segment.pages) for segment in record.manifest.segments), columns)


def residency_of(pool: Pool, record: ModelRecord) -> dict[str, str]:
    """Layer -> name of the tier that holds it, or `loading`."""
    with pool.lock:
        codes = [int(record.residency[pages.start]) for pages in map(record.pages, range(len(record.keys)))]
    names = {tier.id: tier.name for tier in pool.tiers} | {LOADING: "loading"}
    return {segment.layer: names[code] for segment, code in zip(record.manifest.segments, codes, strict=True)}


def _model(pool: Pool, record: ModelRecord, load: Load | None) -> dict[str, Any]:
    manifest = record.manifest
    figures = load.figures if load else pool.figures.get(record.id)
    return {
        "name": record.name,
        "path": manifest.path,
        "identity": record.id,
        "tensors": len(manifest.tensors),
        "segments": len(manifest.segments),
        "bytes": manifest.nbytes,
        "page_bytes": manifest.page_bytes,
        "resident_bytes": sum(s.page_bytes for i, s in enumerate(manifest.segments) if record.resident(i)),
        "ready_bytes": sum(t.nbytes for t, ready in zip(manifest.tensors, record.ready, strict=True) if ready),
        "state": "loading" if load else ("disk" if record.missing() else "resident"),
        "leases": pool.leases.holders(record.id),
        "readers": pool.leases.pids(record.id),
        "pins": record.pins,
        "opens": record.opens,
        "residency": residency_of(pool, record),
        "heat": _heat(pool.statistics.heat(record).columns(time.monotonic())),
        "last_load": _figures(figures) if figures else None,
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
