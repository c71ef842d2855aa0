"""Sources: rings that are open, each for one event on one CPU or of one thread, and the records taken out of them.

Owns which rings a host or a process needs. Never waits, and never decides whose samples are wanted.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tiermem._native import Decoder, Event, Layout, Ring, decode_spe
from tiermem.errors import NativeError
from tiermem.sampler.events import NamedEvent
from tiermem.sampler.records import Tally, take
from tiermem.samples import SAMPLE, Samples

Opener = Callable[..., Ring]
"""Opens rings as the class Ring does."""

MAX_RINGS = 512
"""Of one process: beyond it threads that start later are not inherited but looked for."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_GONE = (errno.ESRCH, errno.ENODEV)
"""The thread ended, the CPU went offline: between being listed and being opened."""


@dataclass(slots=True)
class Source:
    """One ring. `number` is that of its event; `pid` and `tid` are -1 and `cpu` is set for a whole CPU."""

    named: NamedEvent
    number: int
    pid: int
    tid: int
    cpu: int
    event: Event
    ring: Ring
    leader: Ring | None
    decoder: Decoder
    _lost: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def enable(self) -> None:
        if self.leader is not None:
            self.leader.enable()
        self.ring.enable()

    def disable(self) -> None:
        self.ring.disable()
        if self.leader is not None:
            self.leader.disable()

    def close(self) -> None:
        self.ring.close()
        if self.leader is not None:
            self.leader.close()

    def drain(self, buffer: bytearray, shift_ns: int, tally: Tally) -> Iterator[Samples]:
        """Take out all that the ring holds, the hardware's own buffer included, through `buffer`, which is as large as
        the ring and the AUX area at least. `shift_ns` is added to times."""
        lost = self.ring.count().lost  # makes the hardware hand over its buffer, so it comes first
        tally.lost += lost - self._lost
        self._lost = lost
        for _ in range(2):  # a ring that fills as fast as it drains must not hold its reader
            if not (read := self.ring.read(buffer)):
                break
            data = memoryview(buffer)[:read]
            decoded = self.decoder.decode(data)
            take(data, decoded.records, self.event.sample_type, shift_ns, tally)
            if len(decoded.samples):
                decoded.samples["time"] += np.uint64(shift_ns % (1 << 64))
                yield self._own(decoded.samples)
        if self.named.aux_bytes and len(rows := self._drain_aux(buffer)):
            yield self._own(rows)

    def _own(self, rows: Samples) -> Samples:
        rows["event"] = self.number
        return rows

    def _drain_aux(self, buffer: bytearray) -> Samples:
        """Rows of the AUX area. Where the hardware names no thread they are the source's, if it is of one."""
        data = self._rest + bytes(memoryview(buffer)[: self.ring.read_aux(buffer)])
        if not data:
            return np.empty(0, SAMPLE)
        spe = decode_spe(data)
        self._rest = data[spe.used :]
        rows = spe.samples
        rows["time"], rows["period"] = time.monotonic_ns(), self.event.period
        if self.pid >= 0:
            rows["pid"], rows["tid"] = self.pid, np.where(rows["tid"], rows["tid"], self.tid)
        else:
            rows["cpu"] = self.cpu
        return rows


def of_host(events: Sequence[NamedEvent], cpus: Sequence[int], opener: Opener, ring_bytes: int) -> list[Source]:
    """One source for each event and CPU that has it, disabled. Raises NativeError if any but an offline CPU refuses."""
    places = [(-1, cpu) for cpu in cpus]
    return _open_all(events, -1, places, opener, ring_bytes, disabled=True)


def of_process(
    events: Sequence[NamedEvent], pid: int, cpus: Sequence[int], opener: Opener, ring_bytes: int, *, inherit: bool
) -> list[Source]:
    """Sources for the threads that the process has; with `inherit` also for those, and processes, that they start.

    An inherited event's ring must be of one CPU (perf_mmap in the kernel), so it takes one for each thread and CPU.
    Raises NativeError (ESRCH if there is no such process).
    """
    tids = threads(pid)
    places = [(tid, cpu) for tid in tids for cpu in (cpus if inherit else (-1,))]
    opened = _open_all(events, pid, places, opener, ring_bytes, inherit=inherit)
    if not opened:
        raise NativeError(f"process {pid} does not exist or has ended; nothing of it can be sampled", errno.ESRCH)
    return opened


def threads(pid: int) -> list[int]:
    """Threads of a process, its first one first, by whose number an error should name it; none if it does not exist."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    except (FileNotFoundError, ProcessLookupError):
        return []


def open_thread(
    events: Sequence[NamedEvent], pid: int, tid: int, opener: Opener, ring_bytes: int, first: int
) -> list[Source]:
    """Sources of a thread found later; none if it has ended. `first`: number of its first ring."""
    return _open_all(events, pid, [(tid, -1)], opener, ring_bytes, first=first)


def _open_all(
    events: Sequence[NamedEvent],
    pid: int,
    places: Sequence[tuple[int, int]],
    opener: Opener,
    ring_bytes: int,
    *,
    inherit: bool = False,
    disabled: bool = False,
    first: int = 0,
) -> list[Source]:
    """All or none: what was opened is closed if one is refused."""
    opened: list[Source] = []
    try:
        for tid, cpu in places:
            for number, named in enumerate(events):
                if cpu >= 0 and named.cpus is not None and cpu not in named.cpus:
                    continue
                event = replace(named.nth(first + len(opened)), inherit=inherit, disabled=disabled)
                try:
                    opened.append(_open(named, number, event, (pid, tid, cpu), opener, ring_bytes))
                except NativeError as error:
                    if error.errno not in _GONE:
                        raise
    except BaseException:
        for source in opened:
            source.close()
        raise
    return opened


def _open(
    named: NamedEvent, number: int, event: Event, place: tuple[int, int, int], opener: Opener, ring_bytes: int
) -> Source:
    pid, tid, cpu = place
    leader = None
    if named.leader is not None:
        counting = replace(named.leader, inherit=event.inherit, disabled=event.disabled)
        leader = opener(counting, tid, cpu, nbytes=_PAGE)
    try:
        ring = opener(event, tid, cpu, leader=leader, nbytes=ring_bytes, aux_nbytes=named.aux_bytes)
    except BaseException:
        if leader is not None:
            leader.close()
        raise
    return Source(named, number, pid, tid, cpu, event, ring, leader, Decoder([Layout(event.sample_type)]))
