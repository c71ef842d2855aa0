"""Tier watch: what kernel and hardware say of the tiers: which are online, how fast, and where pages really are.

Writes it into the tiers and the catalog; never moves a page. Speeds are measured on memory of its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator

from tiermem import _native, host
from tiermem.catalog import Catalog, ModelRecord
from tiermem.errors import Closed, NativeError
from tiermem.memory import Memory
from tiermem.tier import Tier
from tiermem.types import PAGE_BYTES

_PROBE_BYTES = 32 << 20
"""More than most processors cache near a core, and little enough to be touched for the first time in 50 ms."""

_ENOUGH_S = 0.05
"""Time that one figure may take; emulated memory is a thousand times slower than real."""

_GLANCE_LOADS = 64
_GLANCE_EVERY_S = 1.0
_AUDIT_OS_PAGES = 4096
"""OS pages whose place is asked for at a time: about a millisecond."""

_log = logging.getLogger(__name__)


class TierWatch:
    """Of one pool, whose `lock` it takes."""

    def __init__(self, memory: Memory, catalog: Catalog, lock: threading.RLock) -> None:
        self._memory, self._catalog, self._lock = memory, catalog, lock
        self._probes: dict[int, _native.Probe] = {}
        self._glanced_s = -math.inf
        self._with_memory = ""
        self._next: Iterator[tuple[ModelRecord, int, int]] = iter(())

    def measure(self) -> None:
        """Measure idle latency and bandwidth of each memory tier."""
        tiers = self._memory.tiers
        for tier in tiers.memory:
            try:
                probe = _native.Probe(_PROBE_BYTES, tier.node_mask)
                if tier.nodes and probe.nodes & ~tier.node_mask:
                    _log.warning("tier %s is not measured: its nodes had no %d bytes to spare", tier.name, _PROBE_BYTES)
                    continue
                _measure(probe, tier)
            except NativeError as error:
                _log.warning("tier %s is not measured: %s", tier.name, error)
                continue
            if tiers.several:
                self._probes[tier.id] = probe
            else:
                probe.close()

    def look(self) -> None:
        """To be called often: latencies now, nodes that came or went, and the place of some pages."""
        if not self._memory.tiers.several:
            return
        now_s = time.monotonic()
        if now_s - self._glanced_s >= _GLANCE_EVERY_S:
            self._glanced_s = now_s
            for tier_id, probe in self._probes.items():
                self._memory.tiers[tier_id].speed.latency_s = probe.latency(_GLANCE_LOADS)
        self._look_at_nodes()
        self._audit(_AUDIT_OS_PAGES)

    def settle(self, record: ModelRecord, number: int) -> None:
        """Ask the kernel where the pages of a segment are, and count them there."""
        self._settle(record, number, 0, record.manifest.segments[number].pages)

    def close(self) -> None:
        for probe in self._probes.values():
            probe.close()

    def _look_at_nodes(self) -> None:
        with_memory = host.nodes_with_memory()
        if with_memory == self._with_memory:
            return
        first, self._with_memory = not self._with_memory, with_memory
        present = {node.number for node in host.numa_nodes() if node.total_bytes}
        with self._lock:
            for tier in self._memory.tiers.memory:
                online = not tier.nodes or bool(present.intersection(tier.nodes))
                if online != tier.online:
                    tier.online = online
                    _log.warning("tier %s is %s", tier.name, "back" if online else "offline: its NUMA node is gone")
        if not first:
            self._next = self._parts()
            self._audit(1 << 40)

    def _audit(self, os_pages: int) -> None:
        """The kernel moves pages too: when a node goes offline, or by its own tiering."""
        left = os_pages
        while left > 0:
            part = next(self._next, None)
            if part is None:
                self._next = self._parts()
                return
            record, number, first = part
            count = min(self._step, record.manifest.segments[number].pages - first)
            self._settle(record, number, first, count)
            left -= count * self._os_pages

    def _parts(self) -> Iterator[tuple[ModelRecord, int, int]]:
        """All that is resident now, in parts: model, segment, first page."""
        with self._lock:
            return iter([
                (record, number, first)
                for record in self._catalog
                for number, segment in enumerate(record.manifest.segments)
                if record.resident(number)
                for first in range(0, segment.pages, self._step)
            ])  # fmt: skip

    @property
    def _os_pages(self) -> int:
        """OS pages of a page that have to be asked for."""
        return 1 if self._memory.backing.kind in ("tmpfs", "hugetlb") else PAGE_BYTES // 4096

    @property
    def _step(self) -> int:
        return max(1, _AUDIT_OS_PAGES // self._os_pages // 4)

    def _settle(self, record: ModelRecord, number: int, first: int, count: int) -> None:
        with self._lock:
            segment = self._memory.segment(record, number)
            key = record.keys[number]
            generation = self._memory.moves
        if segment is None:
            return
        try:
            nodes = self._memory.numa.where(segment, first, count)
        except Closed:  # it left memory just now
            return
        with self._lock:
            # What moved while the kernel was asked is settled by who moved it.
            if record.keys[number] == key and self._memory.moves == generation:
                changed = self._memory.settle(record, number, first, nodes)
                if changed and record.resident(number):
                    _log.info("%s: the kernel had moved %d pages of segment %d", record.name, changed, number)


def _measure(probe: _native.Probe, tier: Tier) -> None:
    loads = 64
    while True:
        latency_s = probe.latency(loads)
        if latency_s * loads * 4 > _ENOUGH_S:
            break
        loads *= 4
    tier.speed.idle_latency_s = tier.speed.latency_s = latency_s
    threads = min(len(os.sched_getaffinity(0)), 8)
    best, end_s = 0.0, time.monotonic() + _ENOUGH_S
    while not best or time.monotonic() < end_s:
        best = max(best, probe.bandwidth(threads))
    tier.speed.bandwidth_bytes_s = best
