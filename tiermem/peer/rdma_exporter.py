"""Exporter: which memory of this host other pools may read by RDMA, and for how long it stays pinned for that.

Owns the domains, registrations and queue pairs of leases. Never decides who gets a lease or for which segments.

One domain for each set of segments that leases read: a key is good for the queue pairs of leases on the very same
segments, and the device refuses it all others, guessed or not. Each segment is registered once in a domain, however
many leases and connections read it, and stays pinned for a while after the last of them, as the next often follows.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain

from tiermem.errors import Closed, Refused
from tiermem.peer.rdma import Device, Domain, End, Region, Registration
from tiermem.peer.rdma_pair import QueuePair

PAIRS_PER_LEASE = 16


@dataclass(frozen=True, slots=True)
class Figures:
    """`segments` are pinned, `pinned_bytes` in all (as RLIMIT_MEMLOCK counts: a segment of two sets twice); it took
    `registrations` so far."""

    segments: int = 0
    pinned_bytes: int = 0
    queue_pairs: int = 0
    registrations: int = 0


@dataclass(slots=True, eq=False)
class _Export:
    """One set of segments. `pairs`: of each lease that reads it; `idle_since`: when the last of them ended."""

    domain: Domain
    registrations: dict[str, Registration]
    pairs: dict[str, list[QueuePair]] = field(default_factory=dict)
    idle_since: float = 0.0


class Exporter:
    """`pinned(key, True)` is called before a segment's pages are pinned, `pinned(key, False)` once they are not, always
    with the exporter's lock held: it must not wait for who calls the exporter. All threads may use it."""

    def __init__(self, device: Device, idle_s: float, pinned: Callable[[str, bool], None]) -> None:
        self._device, self._idle_s, self._pinned = device, idle_s, pinned
        self._lock = threading.Lock()
        self._exports: dict[frozenset[str], _Export] = {}
        self._pins: Counter[str] = Counter()
        self._registered = 0
        self._closed = False

    def export(
        self, lease_id: str, segments: Mapping[int, tuple[str, memoryview]], end: End
    ) -> tuple[End, dict[int, Region]]:
        """A queue pair connected to `end`, and where by it the segments can be read: (key, all its bytes) by number.

        A lease may have several. Pinning takes time, and the kernel's answer on how to reach `end` up to a second.
        Raises TransportUnavailable; what was pinned before it failed stays until it is idle.
        """
        with self._lock:
            if self._closed:
                raise Closed("nothing is exported any more")
            held = sum(len(export.pairs.get(lease_id, ())) for export in self._exports.values())
            if held >= PAIRS_PER_LEASE:
                raise Refused(f"lease {lease_id} has {held} queue pairs already; close some, or take TCP")
            keys = frozenset(key for key, _ in segments.values())
            export = self._exports.get(keys)
            if export is None:
                export = self._exports[keys] = _Export(self._device.domain(), {}, idle_since=time.monotonic())
            for key, buffer in segments.values():
                self._pin(export, key, buffer)
            pair = QueuePair(export.domain, 0)
            with ExitStack() as failed:
                failed.callback(pair.close)
                pair.connect(end)
                failed.pop_all()
            export.pairs.setdefault(lease_id, []).append(pair)
            return pair.end, {number: export.registrations[key].region for number, (key, _) in segments.items()}

    def withdraw(self, lease_id: str) -> None:
        """When it returns nothing is read for the lease any more. Idempotent."""
        with self._lock:
            for export in self._exports.values():
                pairs = export.pairs.pop(lease_id, None)
                for pair in pairs or ():
                    pair.close()
                if pairs and not export.pairs:
                    export.idle_since = time.monotonic()

    def sweep(self, idle_s: float | None = None) -> None:
        """Unpin what nobody has read for so long, or else for as long as was said at first."""
        with self._lock:
            before = time.monotonic() - (self._idle_s if idle_s is None else idle_s)
            self._drop([keys for keys, each in self._exports.items() if not each.pairs and each.idle_since <= before])

    def revoke(self, key: str) -> None:
        """Unpin a segment at once, also where leases read it: they need a new export, without it."""
        with self._lock:
            self._drop([keys for keys, export in self._exports.items() if key in export.registrations])

    def figures(self) -> Figures:
        """A snapshot."""
        with self._lock:
            exports = self._exports.values()
            nbytes = sum(each.nbytes for export in exports for each in export.registrations.values())
            pairs = sum(len(pairs) for export in exports for pairs in export.pairs.values())
            return Figures(len(self._pins), nbytes, pairs, self._registered)

    def close(self) -> None:
        """End all queue pairs and unpin everything. Idempotent."""
        with self._lock:
            self._closed = True
            self._drop(list(self._exports))

    def _pin(self, export: _Export, key: str, buffer: memoryview) -> None:
        if key in export.registrations:
            return
        if not self._pins[key]:
            self._pinned(key, True)
        self._pins[key] += 1
        try:
            export.registrations[key] = export.domain.register(buffer, remote_read=True)
        except BaseException:
            self._unpinned(key)
            raise
        self._registered += 1

    def _unpinned(self, key: str) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._pinned(key, False)

    def _drop(self, sets: list[frozenset[str]]) -> None:
        for keys in sets:
            export = self._exports.pop(keys)
            for pair in chain.from_iterable(export.pairs.values()):
                pair.close()
            export.domain.close()
            for key in export.registrations:
                self._unpinned(key)
