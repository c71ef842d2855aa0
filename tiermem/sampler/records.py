"""Records of a ring that are no samples: what happened to processes, and what of the samples was lost.

Owns their layout (perf_event_open(2), linux/perf_event.h). Never reads a ring.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from tiermem import samples

_MMAP, _COMM, _EXIT, _THROTTLE, _UNTHROTTLE, _FORK, _MMAP2, _AUX, _LOST_SAMPLES = 1, 3, 4, 5, 6, 7, 10, 11, 13
_HEADER_BYTES = 8
_COMM_EXEC, _BUILD_ID = 1 << 13, 1 << 14  # bits of misc
_AUX_TRUNCATED, _AUX_PARTIAL, _AUX_COLLISION = 1, 4, 8
_ID_BITS = (samples.TID, samples.TIME, samples.ID, samples.STREAM_ID, samples.CPU, samples.IDENTIFIER)


@dataclass(frozen=True, slots=True)
class Mmap:
    """A file was mapped: bytes `offset` on of `path`, at [addr, addr+length). `device` and `inode` are 0 where the
    kernel sent a build id in their place."""

    pid: int
    tid: int
    time: int
    addr: int
    length: int
    offset: int
    path: str
    prot: int = 0
    flags: int = 0
    device: tuple[int, int] = (0, 0)
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Comm:
    """A thread has a new name; `exec`: because its process runs another program, so all its mappings are gone."""

    pid: int
    tid: int
    time: int
    name: str
    exec: bool


@dataclass(frozen=True, slots=True)
class Fork:
    """A thread started; a process where `pid` is not `parent_pid`."""

    pid: int
    tid: int
    time: int
    parent_pid: int
    parent_tid: int


@dataclass(frozen=True, slots=True)
class Exit:
    """A thread ended."""

    pid: int
    tid: int
    time: int


Sideband = Mmap | Comm | Fork | Exit


@dataclass(slots=True)
class Tally:
    """What happened to processes, and what was left out. `lost`: records that found no room, as the event counts them,
    for records that tell so come late; `lost_samples`: samples that collided in the hardware; `aux_truncated`: gaps in
    an AUX area, of any cause."""

    lost: int = 0
    lost_samples: int = 0
    throttled: int = 0
    unthrottled: int = 0
    aux_truncated: int = 0
    sideband: list[Sideband] = field(default_factory=list)


def take(data: memoryview, records: npt.NDArray[Any], sample_type: int, shift_ns: int, tally: Tally) -> None:
    """Add to `tally` what the records (dtype RECORD) of `data` say. `sample_type` is their event's; `shift_ns` is added
    to their times."""
    for offset, kind, misc, size in records.tolist():
        body = data[offset + _HEADER_BYTES : offset + size]
        if kind == _LOST_SAMPLES:
            tally.lost_samples += int(struct.unpack_from("<Q", body)[0])
        elif kind == _THROTTLE:
            tally.throttled += 1
        elif kind == _UNTHROTTLE:
            tally.unthrottled += 1
        elif kind == _AUX:
            flags = struct.unpack_from("<QQQ", body)[2]
            tally.aux_truncated += bool(flags & (_AUX_TRUNCATED | _AUX_PARTIAL | _AUX_COLLISION))
        elif kind in (_MMAP, _MMAP2, _COMM, _FORK, _EXIT):
            tally.sideband.append(_sideband(kind, misc, body, sample_type, shift_ns))


def _sideband(kind: int, misc: int, body: memoryview, sample_type: int, shift_ns: int) -> Sideband:
    trailer = 8 * sum(bool(sample_type & bit) for bit in _ID_BITS)
    text_end = len(body) - trailer
    at = text_end + 8 * bool(sample_type & samples.TID)
    time = (struct.unpack_from("<Q", body, at)[0] if sample_type & samples.TIME else 0) + shift_ns
    if kind in (_FORK, _EXIT):
        pid, parent_pid, tid, parent_tid, own_time = struct.unpack_from("<IIIIQ", body)
        if kind == _EXIT:
            return Exit(pid, tid, own_time + shift_ns)
        return Fork(pid, tid, own_time + shift_ns, parent_pid, parent_tid)
    pid, tid = struct.unpack_from("<II", body)
    if kind == _COMM:
        return Comm(pid, tid, time, _text(body[8:text_end]), bool(misc & _COMM_EXEC))
    addr, length, offset = struct.unpack_from("<QQQ", body, 8)
    if kind == _MMAP:
        return Mmap(pid, tid, time, addr, length, offset, _text(body[32:text_end]))
    major, minor, inode = (0, 0, 0) if misc & _BUILD_ID else struct.unpack_from("<IIQ", body, 32)
    prot, flags = struct.unpack_from("<II", body, 56)
    path = _text(body[64:text_end])
    return Mmap(pid, tid, time, addr, length, offset, path, prot, flags, (major, minor), inode)


def _text(body: memoryview) -> str:
    return bytes(body).partition(b"\0")[0].decode(errors="surrogateescape")
