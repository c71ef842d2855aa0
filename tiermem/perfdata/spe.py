"""SPE: the samples in the AUX area of a recording by Arm's Statistical Profiling Extension. Parses no packets itself.

Ticks become perf's time as in the kernel's userpage (perf_event_mmap_page, time_shift and its neighbours).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tiermem._native import decode_spe
from tiermem.perfdata.data import Fork
from tiermem.perfdata.events import EventInfo
from tiermem.perfdata.fields import Bytes
from tiermem.perfdata.sideband import Who
from tiermem.samples import ADDR, CPU, DATA_SRC, IP, PERIOD, PHYS_ADDR, TID, TIME, WEIGHT_STRUCT, Samples

ARM_SPE = 4
"""PERF_AUXTRACE_ARM_SPE, the type of a PERF_RECORD_AUXTRACE_INFO."""
_NOBODY = 0xFFFFFFFF
"""tid or cpu of an AUXTRACE record that is of no single thread or cpu."""
_RECORD_LIMIT = 4096
"""Bytes without an end of a record that are none: hardware aligns records to at most 2 KiB."""
_TIME_CONV = struct.Struct("<QQQ")
_SHORT_CLOCK = struct.Struct("<QQBB")


class Clock:
    """A PERF_RECORD_TIME_CONV: how ticks become nanoseconds. Raises struct.error where it is too short."""

    def __init__(self, body: Bytes) -> None:
        self._shift, self._factor, self._zero = _TIME_CONV.unpack_from(body)
        self._shift &= 63
        self._cycles, self._mask = 0, (1 << 64) - 1
        if len(body) >= _TIME_CONV.size + _SHORT_CLOCK.size:
            cycles, mask, _, short = _SHORT_CLOCK.unpack_from(body, _TIME_CONV.size)
            if short:
                self._cycles, self._mask = cycles, mask

    def __bool__(self) -> bool:
        return bool(self._factor)

    def nanoseconds(self, ticks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """In 64 bits that wrap, as the kernel computes."""
        cycles, mask, factor, shift = (np.uint64(n) for n in (self._cycles, self._mask, self._factor, self._shift))
        ticks = cycles + ((ticks - cycles) & mask)
        rest = ticks & ((np.uint64(1) << shift) - np.uint64(1))
        return np.uint64(self._zero) + (ticks >> shift) * factor + ((rest * factor) >> shift)


class AuxArea:
    """The AUX buffers of a file, in its order: each the bytes behind one AUXTRACE record."""

    def __init__(self, pmu: int) -> None:
        self.pmu = pmu
        """The event type of the device that filled them."""
        self.bad = 0
        """Bytes that are no packets."""
        self._chunks: list[Samples] = []
        self._rest = b""
        self._tid = self._cpu = _NOBODY

    def begin(self, tid: int, cpu: int) -> None:
        """A new buffer, of thread `tid` or of `cpu`; what the last one left incomplete is bad."""
        self.bad += len(self._rest)
        self._rest, self._tid, self._cpu = b"", tid, cpu

    def take(self, data: memoryview) -> None:
        """The next bytes of the buffer."""
        packets = self._rest + bytes(data)
        decoded = decode_spe(packets)
        self._rest = packets[decoded.used :]
        self.bad += decoded.bad
        if len(self._rest) > _RECORD_LIMIT:
            self.bad += len(self._rest)
            self._rest = b""
        rows = decoded.samples.copy()  # without the room that the decoder had to allow for
        rows["cpu"] = self._cpu
        if self._tid != _NOBODY:
            rows["tid"][rows["tid"] == 0] = self._tid
        self._chunks.append(rows)

    def event(self, events: Sequence[EventInfo]) -> EventInfo:
        """The event that the samples are of: one for `period` operations that the device's own event counts."""
        own = next((event for event in events if event.type == self.pmu), None)
        return EventInfo(
            name="arm_spe",
            type=self.pmu,
            config=own.config if own else 0,
            period=own.period if own and own.period else 1,
            sample_type=IP | TID | TIME | ADDR | CPU | PERIOD | WEIGHT_STRUCT | DATA_SRC | PHYS_ADDR,
        )

    def samples(self, number: int, period: int, clock: Clock | None, threads: Threads) -> list[Samples]:
        """The chunks, complete: event, period, time by `clock`, and whose they are."""
        self.begin(_NOBODY, _NOBODY)
        for rows in self._chunks:
            rows["event"], rows["period"] = number, period
            if clock:
                rows["time"] = clock.nanoseconds(rows["time"])
            threads.assign(rows)
            rows["cpu"][rows["cpu"] == _NOBODY] = 0
        return self._chunks


class Threads:
    """Who ran where and when, as the side-band tells."""

    def __init__(self, running: Mapping[int, list[Who]], processes: Mapping[int, int]) -> None:
        self._running = {}
        for cpu, came in running.items():
            ordered = sorted(came)
            self._running[cpu] = (
                np.array([who.time for who in ordered], np.uint64),
                np.array([(who.pid, who.tid) for who in ordered], np.uint32),
            )
        known = sorted(processes.items())
        self._tids = np.array([tid for tid, _ in known], np.uint32)
        self._pids = np.array([pid for _, pid in known], np.uint32)

    def assign(self, rows: Samples) -> None:
        """pid and tid of rows of one cpu that name no thread, pid of those that name one."""
        nobody = np.flatnonzero(rows["tid"] == 0)
        if len(nobody) and (ran := self._running.get(int(rows["cpu"][0]))):
            at = np.searchsorted(ran[0], rows["time"][nobody], "right") - 1
            seen = at >= 0
            rows["pid"][nobody[seen]], rows["tid"][nobody[seen]] = ran[1][at[seen]].T
        if len(self._tids):
            at = np.minimum(np.searchsorted(self._tids, rows["tid"]), len(self._tids) - 1)
            known = self._tids[at] == rows["tid"]
            rows["pid"][known] = self._pids[at[known]]


def processes_of(threads: Sequence[tuple[int, int]], forks: Sequence[Fork]) -> dict[int, int]:
    """tid -> pid, by the records that told of the thread."""
    return {tid: pid for pid, tid in threads} | {fork.tid: fork.pid for fork in forks}
