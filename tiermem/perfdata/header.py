"""Header: which bytes of a perf.data file are its records, and what stands before and behind them. Reads no records."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field

from tiermem.errors import ReadError, RecordingError
from tiermem.perfdata.events import EVENTS_LIMIT, EventInfo, parse_attr
from tiermem.perfdata.features import Features

MAGIC = b"PERFILE2"
_OTHERS = {
    b"2ELIFREP": "was recorded on a big-endian machine; read it with perf on such a one",
    b"PERFFILE": "is of the first version of perf.data, of before 2010; record again",
}
_PIPE_HEADER = 16
_HEADER = struct.Struct("<8sQQQQQQQQ32s")
_OLD_HEADER = _HEADER.size - 32
_SECTION = struct.Struct("<QQ")
_FEATURES = 256
_FEATURE_LIMIT = 16 << 20


class File:
    """A regular file that is read at any offset; its end shortens what comes back."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
        except OSError as error:
            raise ReadError(f"cannot read {path}: {error.strerror}") from error
        facts = os.fstat(self._fd)
        self.nbytes = facts.st_size
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise RecordingError(f"{path} is no regular file; write what perf gives to one, and read that")

    def read(self, offset: int, nbytes: int) -> bytes:
        parts, nbytes = [], min(nbytes, self.nbytes - offset)
        while nbytes > 0:
            try:
                part = os.pread(self._fd, nbytes, offset)
            except OSError as error:
                raise ReadError(f"cannot read {self.path}: {error.strerror}") from error
            if not part:
                raise ReadError(f"{self.path} shrank while it was read; read it again")
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._fd)


@dataclass(slots=True)
class Header:
    """What a file says before its records: they are bytes [begin, end), `end` not beyond the file's."""

    begin: int
    end: int
    events: list[EventInfo] = field(default_factory=list)
    features: Features = field(default_factory=Features)
    notes: list[str] = field(default_factory=list)


def read_header(file: File) -> Header:
    """Raises RecordingError where the file is no perf.data, or its attributes are damaged; what else is damaged or
    missing is noted."""
    start = file.read(0, _HEADER.size)
    magic = start[:8]
    if magic != MAGIC:
        why = _OTHERS.get(magic, f"is no perf.data: it starts with {magic!r} instead of {MAGIC!r}")
        raise RecordingError(f"{file.path} {why}")
    if len(start) < _PIPE_HEADER:
        raise RecordingError(f"{file.path} ends within its header, after {len(start)} bytes; record again")
    size = struct.unpack_from("<Q", start, 8)[0]
    if size == _PIPE_HEADER:
        return Header(_PIPE_HEADER, file.nbytes)
    if size not in (_OLD_HEADER, _HEADER.size) or len(start) < size:
        raise RecordingError(f"{file.path} has a header of {size} bytes, which no perf writes; record again")
    _, _, attr_bytes, attrs_at, attrs_bytes, begin, nbytes, _, _, bits = _HEADER.unpack(
        start.ljust(_HEADER.size, b"\0")
    )
    header = Header(begin, begin + nbytes, _events(file, attr_bytes, attrs_at, attrs_bytes))
    if nbytes == 0 and file.nbytes > begin:
        header.end = file.nbytes
        header.notes.append("perf record was ended before it wrote how much there is; all of it was read")
        return header
    if header.end > file.nbytes:
        missing = header.end - max(file.nbytes, begin)
        header.notes.append(f"the file is truncated: {missing} of {nbytes} bytes of records are missing")
        header.end = file.nbytes
    elif size == _HEADER.size:
        _read_features(file, header, int.from_bytes(bits, "little"))
    return header


def _events(file: File, attr_bytes: int, offset: int, nbytes: int) -> list[EventInfo]:
    entry = max(attr_bytes, _SECTION.size)
    count = nbytes // entry
    if not 0 < count <= EVENTS_LIMIT or offset + nbytes > file.nbytes:
        raise RecordingError(
            f"{file.path} says that its events' attributes are {nbytes} bytes at {offset}, {attr_bytes} bytes each; "
            f"the file has {file.nbytes} bytes, and one to {EVENTS_LIMIT} events are read"
        )
    attrs = file.read(offset, count * entry)
    events, ids_left = [], file.nbytes
    for at in range(0, len(attrs), entry):
        ids_at, ids_bytes = _SECTION.unpack_from(attrs, at + entry - _SECTION.size)
        ids_left -= ids_bytes  # sections may not overlap, or few bytes would make ids without end
        if ids_at + ids_bytes > file.nbytes or ids_left < 0 or ids_bytes % 8:
            raise RecordingError(f"{file.path} says that an event's ids are {ids_bytes} bytes at {ids_at}: damaged")
        ids = struct.unpack(f"<{ids_bytes // 8}Q", file.read(ids_at, ids_bytes))
        events.append(parse_attr(attrs[at : at + entry - _SECTION.size], ids))
    return events


def _read_features(file: File, header: Header, bits: int) -> None:
    """The sections' places stand behind the records, in the order of the bits."""
    numbers = [number for number in range(_FEATURES) if bits >> number & 1]
    table = file.read(header.end, len(numbers) * _SECTION.size)
    for place, number in enumerate(numbers):
        if (place + 1) * _SECTION.size > len(table):
            header.notes.append(f"{len(numbers) - place} feature sections behind the records are missing")
            break
        offset, nbytes = _SECTION.unpack_from(table, place * _SECTION.size)
        data = file.read(offset, min(nbytes, _FEATURE_LIMIT))
        try:
            header.features.take(number, data)
        except RecordingError as error:
            header.notes.append(str(error))
