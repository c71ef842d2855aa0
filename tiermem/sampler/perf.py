"""PerfSampler: samples of data addresses, of particular processes or of clients anywhere on the host.

Owns the rings and whose samples are wanted. Never maps an address to a page: a sample says what a thread touched when.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from tiermem._native import Ring
from tiermem.errors import Closed, ConfigError, NativeError
from tiermem.host import ROOT
from tiermem.sampler import clock, sources
from tiermem.sampler.events import NamedEvent
from tiermem.sampler.records import Fork, Sideband, Tally
from tiermem.sampler.sources import MAX_RINGS, Opener, Source
from tiermem.sampler.sysfs import online_cpus
from tiermem.samples import SAMPLE, Samples

_CLOSED = "this sampler is closed; make another"
_TOO_MANY = (errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What too many rings end in; EPERM is that of locked memory."""
_UPKEEP_S = 60.0
_CPU_MODE, _USER_MODES = 7, (2, 5)  # of misc: PERF_RECORD_MISC_USER and _GUEST_USER
_USER_BITS = 56  # an address is canonical if the bits from here on are equal, with five levels of page tables too


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll took out. `samples`: dtype SAMPLE, by time, which is CLOCK_MONOTONIC in ns; `event` is the number
    of the event in the sampler's order. The counts are of what happened since the last poll.

    lost            records that found no room in a ring
    lost_samples    samples that collided in the hardware
    throttled       times that the kernel paused an event for its rate; unthrottled: resumed
    aux_truncated   gaps in an AUX area
    addressless     samples without a usable address, left out
    unfollowed      threads, now, for which no ring could be had: what they touch is not seen
    cost_s          CPU seconds of this poll
    """

    samples: Samples
    sideband: list[Sideband]
    lost: int
    lost_samples: int
    throttled: int
    unthrottled: int
    aux_truncated: int
    addressless: int
    unfollowed: int
    cost_s: float


class PerfSampler:
    """Samples events until it is closed. One thread polls; `watch` and `unwatch` may be called by any."""

    def __init__(
        self,
        events: NamedEvent | Sequence[NamedEvent],
        pids: Sequence[int] | None = None,
        *,
        ring_bytes: int = 128 << 10,
        threads: bool = True,
        sideband: bool = False,
        opener: Opener = Ring,
        root: Path = ROOT,
    ) -> None:
        """With `pids` sample these processes; `threads`: also the threads and processes that they start later, if a
        ring for each thread and CPU is affordable, else new threads from the poll that finds them. Without `pids`
        sample all CPUs, and keep what is of the processes given to `watch`; while none is, nothing is sampled.

        `ring_bytes`: of each ring, a power of two. `sideband`: also tell of mappings, programs and threads. Raises
        NativeError if the kernel refuses (EACCES, EPERM: no right; ESRCH: no such process), ConfigError for an event
        that cannot follow processes.
        """
        named = [events] if isinstance(events, NamedEvent) else list(events)
        if not named:
            raise ConfigError("no event to sample; pass at least one")
        if pids is not None and (stray := [event.name for event in named if event.whole_host_only]):
            raise ConfigError(f"{', '.join(stray)} cannot follow processes on this kernel; sample the whole host")
        # One event of each CPU tells the rest; hybrid cores have one part each.
        talker = named[0].name if sideband else None
        self._events = [replace(e, event=replace(e.event, sideband=e.name == talker)) for e in named]
        self._ring_bytes, self._threads, self._opener, self._root = ring_bytes, threads, opener, root
        self._buffer = bytearray(max(ring_bytes, *(event.aux_bytes for event in named)))
        self._lock = threading.Lock()  # over all below; held while rings are drained
        self._watched: frozenset[int] = frozenset()
        self._sources: list[Source] = []
        self._sought: set[int] = set()  # processes whose new threads are looked for
        self._process_of: dict[int, int] = {}
        self._whole_host = pids is None
        self._shift_ns, self._upkeep_s = 0, 0.0
        self._epoll = select.epoll()
        try:
            if pids is None:
                self._add(sources.of_host(self._events, online_cpus(root), opener, ring_bytes))
                if not self._sources:
                    raise NativeError(f"no CPU that is online samples {named[0].name}", errno.ENODEV)
            for pid in pids or ():
                self.watch(pid)
            self._upkeep(time.monotonic())
        except BaseException:
            self.close()
            raise

    @property
    def watched(self) -> frozenset[int]:
        """Processes whose samples are kept; those that were given by `pids` leave it when they have ended."""
        return self._watched

    def watch(self, pid: int) -> None:
        """Keep the samples of a process from now on; without effect if they are kept already. Raises NativeError."""
        with self._lock:
            self._check_open()
            if pid in self._watched:
                return
            if not self._whole_host:
                self._follow(pid)
            elif not self._watched:
                for source in self._sources:
                    source.enable()
            self._watched |= {pid}

    def unwatch(self, pid: int) -> None:
        """Drop the samples of a process from now on, those in the rings included."""
        with self._lock:
            if pid not in self._watched:
                return
            self._watched -= {pid}
            if not self._whole_host:
                self._remove([source for source in self._sources if source.pid == pid])
                self._sought.discard(pid)
            elif not self._watched:
                for source in self._sources:
                    source.disable()

    def poll(self, timeout_s: float) -> Batch:
        """Wait until a ring is a quarter full or the time has passed; then take out all that every ring holds."""
        try:
            ready = self._epoll.poll(timeout_s)
        except ValueError:
            raise Closed(_CLOSED) from None
        begin_s = time.thread_time()
        with self._lock:
            self._check_open()
            now_s = time.monotonic()
            if now_s >= self._upkeep_s:
                self._upkeep(now_s)
            unfollowed = sum(self._seek(pid) for pid in sorted(self._sought))
            self._name_threads()
            tally, addressless, parts = Tally(), 0, [np.empty(0, SAMPLE)]
            for source in self._sources:
                shift_ns = 0 if source.event.monotonic else self._shift_ns
                for rows in source.drain(self._buffer, shift_ns, tally):
                    wanted = self._wanted(rows, source)
                    signed = wanted["addr"].astype(np.int64) >> _USER_BITS
                    usable = wanted[(wanted["addr"] != 0) & ((signed == 0) | (signed == -1))]
                    addressless += len(wanted) - len(usable)
                    parts.append(usable)
            # A hang-up was told before this drain, so the drain took the last there was.
            ended = {descriptor for descriptor, what in ready if what & (select.EPOLLHUP | select.EPOLLERR)}
            self._remove([source for source in self._sources if source.ring.fd in ended])
            if not self._whole_host:
                self._watched = frozenset(source.pid for source in self._sources)
                self._sought &= self._watched
        found = np.concatenate(parts)
        told = [record for record in tally.sideband if self._concerns(record)]
        return Batch(
            found[np.argsort(found["time"], kind="stable")], sorted(told, key=lambda record: record.time), tally.lost,
            tally.lost_samples, tally.throttled, tally.unthrottled, tally.aux_truncated, addressless, unfollowed,
            time.thread_time() - begin_s,
        )  # fmt: skip

    def close(self) -> None:
        """Stop sampling; what the rings hold is lost. Idempotent."""
        with self._lock:
            self._remove(self._sources)
            self._watched = frozenset()
            self._epoll.close()

    def __enter__(self) -> PerfSampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _follow(self, pid: int) -> None:
        cpus = online_cpus(self._root)

        def opened(inherit: bool) -> list[Source]:
            return sources.of_process(self._events, pid, cpus, self._opener, self._ring_bytes, inherit=inherit)

        if self._threads and len(sources.threads(pid)) * len(cpus) * len(self._events) <= MAX_RINGS:
            try:
                return self._add(opened(True))
            except NativeError as error:
                if error.errno not in _TOO_MANY:
                    raise
        self._add(opened(False))
        if self._threads:
            self._sought.add(pid)

    def _seek(self, pid: int) -> int:
        """Open rings for the threads that a process has started since; how many had to be left."""
        known = {source.tid for source in self._sources if source.pid == pid}
        new = sorted(set(sources.threads(pid)) - known)
        for number, tid in enumerate(new):
            first = len(self._sources)
            try:
                self._add(sources.open_thread(self._events, pid, tid, self._opener, self._ring_bytes, first))
            except NativeError as error:
                if error.errno not in _TOO_MANY:
                    raise
                return len(new) - number
        return 0

    def _upkeep(self, now_s: float) -> None:
        """Measure the clock anew, and see which CPUs went and came: one that comes back has none of its events."""
        self._upkeep_s = now_s + _UPKEEP_S
        if not all(event.event.monotonic for event in self._events):
            self._shift_ns = clock.offset_ns()
        if self._whole_host:
            online = set(online_cpus(self._root))
            self._remove([source for source in self._sources if source.cpu not in online])
            new = sorted(online - {source.cpu for source in self._sources})
            self._add(found := sources.of_host(self._events, new, self._opener, self._ring_bytes))
            for source in found if self._watched else ():
                source.enable()

    def _wanted(self, rows: Samples, source: Source) -> Samples:
        if source.named.user_only:
            rows = rows[np.isin(rows["misc"] & _CPU_MODE, _USER_MODES)]
        if not self._whole_host:
            return rows
        if source.named.aux_bytes:
            rows["pid"] = [self._process_of.get(tid, 0) for tid in rows["tid"].tolist()]
        return rows[np.isin(rows["pid"], list(self._watched))]

    def _name_threads(self) -> None:
        """Hardware that writes its own records knows threads, and not whose they are."""
        if self._whole_host and any(event.aux_bytes for event in self._events):
            self._process_of = {tid: pid for pid in self._watched for tid in sources.threads(pid)}

    def _check_open(self) -> None:
        if self._epoll.closed:
            raise Closed(_CLOSED)

    def _concerns(self, record: Sideband) -> bool:
        parent = record.parent_pid if isinstance(record, Fork) else record.pid
        return not self._whole_host or record.pid in self._watched or parent in self._watched

    def _add(self, opened: Sequence[Source]) -> None:
        for source in opened:
            self._epoll.register(source.ring.fd, select.EPOLLIN)
            self._sources.append(source)

    def _remove(self, ended: Sequence[Source]) -> None:
        for source in list(ended):
            self._epoll.unregister(source.ring.fd)
            source.close()
            self._sources.remove(source)
