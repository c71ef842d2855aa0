"""Side-band: the records beside the samples, which tell of threads, mappings and losses. Decodes no samples."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiermem.errors import RecordingError
from tiermem.perfdata.data import Exit, Fork, Image
from tiermem.perfdata.events import EventInfo
from tiermem.perfdata.fields import text_of
from tiermem.samples import CPU, ID, IDENTIFIER, STREAM_ID, TID, TIME

MMAP, LOST, COMM, EXIT, THROTTLE, UNTHROTTLE, FORK = range(1, 8)
MMAP2, AUX, ITRACE_START, LOST_SAMPLES, SWITCH, SWITCH_CPU_WIDE = range(10, 16)
_PASSED_OVER = {8, AUX, ITRACE_START, SWITCH, SWITCH_CPU_WIDE, *range(16, 23)}
"""Also READ, NAMESPACES, KSYMBOL, BPF_EVENT, CGROUP, TEXT_POKE, AUX_OUTPUT_HW_ID, CALLCHAIN_DEFERRED."""

_MISC_MMAP_DATA = _MISC_SWITCH_OUT = 1 << 13
_MISC_MMAP_BUILD_ID = 1 << 14
_MISC_LOST_BY_FILTER = 1 << 15
_PROT_EXEC = 4

_U64 = struct.Struct("<Q")
_PAIR = struct.Struct("<II")
_MMAP = struct.Struct("<iIQQQ")
_MMAP2 = struct.Struct("<iIQQQ24xII")
_TASK = struct.Struct("<IIIIQ")


class Who(NamedTuple):
    """When, by whom and where a record was made: its sample_id trailer; 0 where the event has no such field."""

    time: int = 0
    pid: int = 0
    tid: int = 0
    cpu: int = 0


class Trailer:
    """Where the fields of Who are, counted from the end of a record of an event."""

    def __init__(self, event: EventInfo) -> None:
        fields = [bit for bit in (TID, TIME, ID, STREAM_ID, CPU, IDENTIFIER) if event.trailer & bit]
        self.nbytes = 8 * len(fields)
        from_end = {bit: 8 * (len(fields) - place) for place, bit in enumerate(fields)}
        self._time, self._tid, self._cpu = (from_end.get(bit, 0) for bit in (TIME, TID, CPU))

    def read(self, body: memoryview) -> Who:
        """pre: `body` has the trailer's bytes."""
        end = len(body)
        time = _U64.unpack_from(body, end - self._time)[0] if self._time else 0
        pid, tid = _PAIR.unpack_from(body, end - self._tid) if self._tid else (0, 0)
        cpu = _PAIR.unpack_from(body, end - self._cpu)[0] if self._cpu else 0
        return Who(time, pid, tid, cpu)


class Sideband:
    """Gathers what the side-band records of one file tell, in the order of the file."""

    def __init__(self) -> None:
        self.images: list[Image] = []
        self.forks: list[Fork] = []
        self.exits: list[Exit] = []
        self.build_ids: dict[str, str] = {}
        self.running: dict[int, list[Who]] = defaultdict(list)
        """cpu -> threads that came to run there, as far as `watch_cpus` was asked for."""
        self.lost = self.lost_samples = self.throttled = self.unthrottled = 0
        self.unknown: dict[int, int] = defaultdict(int)
        """Record type -> how many records of it were passed over."""
        self._comms: list[tuple[int, int, int, str]] = []
        self._trailers: list[Trailer] = []
        self._by_id: dict[int, Trailer] | None = None
        self._readings: dict[int, Callable[[int, memoryview, Who], None]] = {
            MMAP: self._mmap, MMAP2: self._mmap2, COMM: self._comm, FORK: self._fork, EXIT: self._exit,
            LOST: self._lost, LOST_SAMPLES: self._lost_samples, THROTTLE: self._throttle, UNTHROTTLE: self._unthrottle,
        }  # fmt: skip

    def of_events(self, events: Sequence[EventInfo], ids: dict[int, int]) -> None:
        """The events that the records to come are of. An id is looked at only where the events' trailers differ."""
        self._trailers = [Trailer(event) for event in events]
        differ = len({event.trailer for event in events}) > 1
        identified = all(event.trailer & IDENTIFIER for event in events)
        self._by_id = {i: self._trailers[of] for i, of in ids.items()} if differ and identified else None

    def watch_cpus(self) -> None:
        """From now on tell `running` too: only traces need it, and threads come to run very often."""
        self._readings |= {ITRACE_START: self._start, SWITCH: self._switch, SWITCH_CPU_WIDE: self._switch}

    def take(self, kind: int, misc: int, record: memoryview) -> None:
        """One whole record, header included. Raises RecordingError where it is shorter than its kind."""
        read = self._readings.get(kind)
        if read is None:
            if kind not in _PASSED_OVER:
                self.unknown[kind] += 1
            return
        body = record[8:]
        trailer = self._trailer(body)
        if len(body) < trailer.nbytes:
            raise RecordingError(f"a record of type {kind} has {len(body)} bytes, its trailer {trailer.nbytes}")
        try:
            read(misc, body[: len(body) - trailer.nbytes], trailer.read(body))
        except struct.error:
            raise RecordingError(f"a record of type {kind} ends after {len(record)} bytes, before its fields") from None

    def _trailer(self, body: memoryview) -> Trailer:
        if not self._trailers:
            raise RecordingError("a record comes before the first event's attributes")
        if self._by_id is None or len(body) < 8:
            return self._trailers[0]
        return self._by_id.get(_U64.unpack_from(body, len(body) - 8)[0], self._trailers[0])

    def _mmap(self, misc: int, body: memoryview, who: Who) -> None:
        pid, _, address, nbytes, offset = _MMAP.unpack_from(body)
        path = text_of(body[_MMAP.size :])
        self.images.append(Image(pid, who.time, address, nbytes, offset, path, not misc & _MISC_MMAP_DATA))

    def _mmap2(self, misc: int, body: memoryview, who: Who) -> None:
        pid, _, address, nbytes, offset, protection, _ = _MMAP2.unpack_from(body)
        path = text_of(body[_MMAP2.size :])
        self.images.append(Image(pid, who.time, address, nbytes, offset, path, bool(protection & _PROT_EXEC)))
        if misc & _MISC_MMAP_BUILD_ID:
            digest = body[36 : 36 + min(body[32], 20)]
            self.build_ids[path] = bytes(digest).hex()

    def _comm(self, misc: int, body: memoryview, who: Who) -> None:
        pid, tid = _PAIR.unpack_from(body)
        self._comms.append((who.time, pid, tid, text_of(body[8:])))

    def _fork(self, misc: int, body: memoryview, who: Who) -> None:
        pid, parent, tid, parent_tid, time = _TASK.unpack_from(body)
        self.forks.append(Fork(pid, tid, parent, parent_tid, time))

    def _exit(self, misc: int, body: memoryview, who: Who) -> None:
        pid, _, tid, _, time = _TASK.unpack_from(body)
        self.exits.append(Exit(pid, tid, time))

    def _lost(self, misc: int, body: memoryview, who: Who) -> None:
        self.lost += _U64.unpack_from(body, 8)[0]

    def _lost_samples(self, misc: int, body: memoryview, who: Who) -> None:
        if not misc & _MISC_LOST_BY_FILTER:
            self.lost_samples += _U64.unpack_from(body)[0]

    def _throttle(self, misc: int, body: memoryview, who: Who) -> None:
        self.throttled += 1

    def _unthrottle(self, misc: int, body: memoryview, who: Who) -> None:
        self.unthrottled += 1

    def _start(self, misc: int, body: memoryview, who: Who) -> None:
        pid, tid = _PAIR.unpack_from(body)
        self.running[who.cpu].append(Who(who.time, pid, tid, who.cpu))

    def _switch(self, misc: int, body: memoryview, who: Who) -> None:
        if not misc & _MISC_SWITCH_OUT:
            self.running[who.cpu].append(who)

    def names(self) -> dict[tuple[int, int], tuple[tuple[int, str], ...]]:
        """What each thread was called from when on; a forked one is called like its parent until it says otherwise."""
        told: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
        facts: list[tuple[int, Fork | tuple[int, int, str]]] = [(fork.time, fork) for fork in self.forks]
        facts += [(time, (pid, tid, name)) for time, pid, tid, name in self._comms]
        for time, fact in sorted(facts, key=lambda entry: entry[0]):
            if not isinstance(fact, Fork):
                told[fact[:2]].append((time, fact[2]))
            elif inherited := told.get((fact.parent_pid, fact.parent_tid)):
                told[fact.pid, fact.tid].append((time, inherited[-1][1]))
        return {thread: tuple(history) for thread, history in told.items()}
