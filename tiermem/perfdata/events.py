"""Events of a perf.data file: what a perf_event_attr says, and a name where the file gives none. Decodes no records."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from tiermem.errors import RecordingError
from tiermem.perfdata.fields import Bytes
from tiermem.samples import CPU, ID, IDENTIFIER, STREAM_ID, TID, TIME

_ATTR = struct.Struct("<IIQQQQQIIQQQQIiQIHHIIQQ")
_ATTR_FIRST = 64
"""Bytes of the first published perf_event_attr; the kernel has only ever appended to it."""

EVENTS_LIMIT = 1 << 16
"""Samples say by 16 bits of which event they are."""

_FREQUENCY, _PRECISE, _SAMPLE_ID_ALL, _USE_CLOCKID = 1 << 10, 15, 1 << 18, 1 << 25
TRAILER = TID | TIME | ID | STREAM_ID | CPU | IDENTIFIER
"""What of a sample's fields the other records end with, where the event has sample_id_all."""

_HARDWARE = ("cycles", "instructions", "cache-references", "cache-misses", "branches", "branch-misses", "bus-cycles",
             "stalled-cycles-frontend", "stalled-cycles-backend", "ref-cycles")  # fmt: skip
_SOFTWARE = ("cpu-clock", "task-clock", "page-faults", "context-switches", "cpu-migrations", "minor-faults",
             "major-faults", "alignment-faults", "emulation-faults", "dummy", "bpf-output",
             "cgroup-switches")  # fmt: skip
_TYPES = ("hardware", "software", "tracepoint", "hw-cache", "raw", "breakpoint")


@dataclass(frozen=True, slots=True)
class EventInfo:
    """One event of a file, as its perf_event_attr describes it.

    A sample stands for `period` occurrences, or the kernel aimed at `frequency` samples a second; the other one is 0.
    `clock` is the clockid of its times, None for perf's own clock.
    """

    name: str
    type: int
    config: int
    config1: int = 0
    config2: int = 0
    period: int = 0
    frequency: int = 0
    sample_type: int = 0
    read_format: int = 0
    branch_sample_type: int = 0
    sample_regs_user: int = 0
    sample_regs_intr: int = 0
    precise: int = 0
    sample_id_all: bool = False
    clock: int | None = None
    ids: tuple[int, ...] = ()

    @property
    def trailer(self) -> int:
        """The fields of sample_type that end every record of this event that is no sample."""
        return self.sample_type & TRAILER if self.sample_id_all else 0


def parse_attr(data: Bytes, ids: tuple[int, ...] = ()) -> EventInfo:
    """The event of a perf_event_attr of any age: what an old one lacks is 0, what a newer one appends is not read.

    Raises RecordingError where it is shorter than it says.
    """
    if len(data) < _ATTR_FIRST:
        raise RecordingError(f"a perf_event_attr has {len(data)} bytes, fewer than the {_ATTR_FIRST} of the first one")
    size = struct.unpack_from("<I", data, 4)[0] or _ATTR_FIRST
    if not _ATTR_FIRST <= size <= len(data):
        raise RecordingError(f"a perf_event_attr says that it has {size} bytes where {len(data)} are")
    (
        kind, _, config, period, sample_type, read_format, flags, _, _, config1, config2, branches, regs_user, _, clock,
        regs_intr, *_,
    ) = _ATTR.unpack(bytes(data[: min(size, _ATTR.size)]).ljust(_ATTR.size, b"\0"))  # fmt: skip
    by_frequency = bool(flags & _FREQUENCY)
    return EventInfo(
        name="",
        type=kind,
        config=config,
        config1=config1,
        config2=config2,
        period=0 if by_frequency else period,
        frequency=period if by_frequency else 0,
        sample_type=sample_type,
        read_format=read_format,
        branch_sample_type=branches,
        sample_regs_user=regs_user,
        sample_regs_intr=regs_intr,
        precise=flags >> _PRECISE & 3,
        sample_id_all=bool(flags & _SAMPLE_ID_ALL),
        clock=clock if flags & _USE_CLOCKID else None,
        ids=ids,
    )


def name_of(event: EventInfo, pmus: Mapping[int, str]) -> str:
    """A name made of the event's type and config, for a file that lacks one; `pmus` maps types to names."""
    for kind, names in ((0, _HARDWARE), (1, _SOFTWARE)):
        if event.type == kind and event.config < len(names):
            return names[event.config]
    if event.type == 5:
        return f"mem:{event.config1:#x}/{event.config2}"
    pmu = _TYPES[event.type] if event.type < len(_TYPES) else pmus.get(event.type, f"pmu {event.type}")
    return f"{pmu}/config={event.config:#x}/"
