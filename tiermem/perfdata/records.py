"""Records: turns the bytes between header and features of a perf.data file into samples and side-band. Reads no file.

Runs of the kernel's records go to the native decoder at once. Records of perf's own end a run: they may change how the
bytes behind them are to be read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tiermem._native import Decoder, Layout
from tiermem.errors import NativeError, RecordingError
from tiermem.perfdata.events import EVENTS_LIMIT, EventInfo, parse_attr
from tiermem.perfdata.features import Features
from tiermem.perfdata.fields import text_of
from tiermem.perfdata.packed import Packed
from tiermem.perfdata.sideband import Sideband
from tiermem.perfdata.spe import ARM_SPE, AuxArea, Clock
from tiermem.samples import Samples

_SAMPLE = 9
_USER = 64
"""Types from here on are perf's own, and not the kernel's."""
(_ATTR, _EVENT_TYPE, _TRACING_DATA, _BUILD_ID, _ROUND, _ID_INDEX, _AUXTRACE_INFO, _AUXTRACE, _AUXTRACE_ERROR,
 _THREAD_MAP, _CPU_MAP, _STAT_CONFIG, _STAT, _STAT_ROUND, _EVENT_UPDATE, _TIME_CONV, _FEATURE, _COMPRESSED, _INIT,
 _COMPRESSED2, _BPF_METADATA) = range(_USER, 85)  # fmt: skip
_NEVER_PACKED = frozenset((_ATTR, _TRACING_DATA, _AUXTRACE, _COMPRESSED, _COMPRESSED2))
_SILENT = frozenset((_EVENT_TYPE, _ROUND, _ID_INDEX, _THREAD_MAP, _CPU_MAP, _STAT_CONFIG, _STAT, _STAT_ROUND, _INIT,
                     _BPF_METADATA))  # fmt: skip
_NAME = 2
"""The kind of PERF_RECORD_EVENT_UPDATE that names an event."""
_OPENINGS = 64
"""Times that attributes may come after records: each time, what is known of all events is gathered anew."""

_HEAD = struct.Struct("<I2xH")
_MISC = struct.Struct("<4xH")
_AUXTRACE_BODY = struct.Struct("<QQQIII")
_FLUSH = 16 << 20
_ALIKE, _WINDOW = 32, 4096
"""Records of one size in a row until those that follow are looked at together, and how many of them at once."""
_TYPE_AND_SIZE = np.uint64(0xFFFF0000FFFFFFFF)
"""Of a record's header, all but misc."""

Sink = Callable[[memoryview], None]


class Records:
    """The records of one file, given in order by `take`, as far as they have come."""

    def __init__(self, events: list[EventInfo], features: Features) -> None:
        self.events = events
        self.features = features
        self.sideband = Sideband()
        self.chunks: list[Samples] = []
        self.aux: AuxArea | None = None
        self.clock: Clock | None = None
        self.notes: list[str] = []
        self.follows: tuple[int, Sink] | None = None
        """Bytes behind the record just taken that are no records, and where to put them; the caller clears it."""
        self._ids = {i: number for number, event in enumerate(events) for i in event.ids}
        self._decoder: Decoder | None = None
        self._openings = 0
        self._packed: Packed | None = None
        self._unpacked = bytearray()
        self._skipped: dict[int, int] = {}

    def take(self, data: memoryview, at: int, *, unpacked: bool = False) -> int:
        """Take the whole records that `data` starts with, up to one that other bytes follow; gives the bytes used.

        `at` is where in the file they are, for errors. Raises RecordingError where they make no sense.
        """
        position = 0
        while self.follows is None:
            end, kind, size = _run(data, position, at)
            if end > position:
                self._decode(data[position:end], at + position)
            position = end
            if not size:
                break
            if unpacked and kind in _NEVER_PACKED:
                raise RecordingError(f"a record of type {kind} is within compressed ones; record again")
            try:
                self._own(kind, data[end : end + size])
            except struct.error:
                raise RecordingError(f"the record of type {kind} at byte {at + end} is too short") from None
            position += size
        return position

    def finish(self) -> None:
        """Take what is unpacked and waits; note what never became whole."""
        self._flush()
        if self._unpacked:
            self.notes.append(f"the compressed records end within one: its {len(self._unpacked)} bytes were skipped")
        if foreign := self.sideband.unknown.pop(_SAMPLE, 0):
            self.notes.append(f"{foreign} samples have ids of no event of the file and were skipped")
        for kind, count in sorted((self.sideband.unknown | self._skipped).items()):
            self.notes.append(f"{count} records of type {kind} were skipped")

    def _decode(self, run: memoryview, at: int) -> None:
        try:
            decoded = self._opened().decode(run)
        except NativeError as error:
            raise RecordingError(f"the records from byte {at} on make no sense: {error}") from error
        if decoded.used != len(run):
            raise RecordingError(f"the record at byte {at + decoded.used} makes no sense; record again")
        if len(decoded.samples):
            self.chunks.append(_snug(decoded.samples))
        for offset, kind, misc, size in decoded.records.tolist():
            if kind != _ROUND:
                self.sideband.take(kind, misc, run[offset : offset + size])

    def _opened(self) -> Decoder:
        if self._decoder is None:
            if not self.events:
                raise RecordingError("records come before the first event's attributes; record again")
            self._openings += 1
            if self._openings > _OPENINGS:
                raise RecordingError(
                    f"attributes of events come after records more than {_OPENINGS} times; record again"
                )
            self.sideband.of_events(self.events, self._ids)
            layouts = [
                Layout(e.sample_type, e.read_format, e.branch_sample_type, e.sample_regs_user, e.sample_regs_intr)
                for e in self.events
            ]
            try:
                self._decoder = Decoder(layouts, self._ids if len(layouts) > 1 else None)
            except NativeError as error:
                raise RecordingError(
                    f"the samples of the file's {len(layouts)} events have fields that are not known here, or their "
                    f"ids in different places, and cannot be told apart; record again"
                ) from error
        return self._decoder

    def _own(self, kind: int, record: memoryview) -> None:
        """A record of perf's own. Raises RecordingError or struct.error where it makes no sense."""
        if kind in (_COMPRESSED, _COMPRESSED2):
            self._unpack(record, padded=kind == _COMPRESSED2)
        elif kind == _ATTR:
            self._attribute(record)
        elif kind == _AUXTRACE:
            self._trace(record)
        elif kind == _TRACING_DATA:
            self.follows = (struct.unpack_from("<I", record, 8)[0] + 7) & ~7, lambda data: None
        elif kind == _BUILD_ID:
            self.features.take_build_id(_MISC.unpack_from(record)[0], record)
        elif kind == _AUXTRACE_INFO:
            if struct.unpack_from("<I", record, 8)[0] == ARM_SPE and self.aux is None:
                self.aux = AuxArea(struct.unpack_from("<I", record, 16)[0])
                self.sideband.watch_cpus()
        elif kind == _TIME_CONV:
            self.clock = Clock(record[8:])
        elif kind == _EVENT_UPDATE:
            what, identity = struct.unpack_from("<QQ", record, 8)
            if what == _NAME and (number := self._ids.get(identity)) is not None:
                self.events[number] = replace(self.events[number], name=text_of(record[24:]))
        elif kind == _FEATURE:
            self._feature(record)
        elif kind not in _SILENT:
            self._skip(kind)

    def _unpack(self, record: memoryview, *, padded: bool) -> None:
        begin, end = 8, len(record)
        if padded:  # to 8 bytes, and so it says how many of them are zstd's
            begin, end = 16, 16 + struct.unpack_from("<Q", record, 8)[0]
        if end > len(record):
            raise RecordingError(f"a compressed record of {len(record)} bytes says that it has {end}; record again")
        self._packed = self._packed or Packed()
        self._unpacked += self._packed.unpack(record[begin:end])
        if len(self._unpacked) >= _FLUSH:
            self._flush()

    def _trace(self, record: memoryview) -> None:
        nbytes, _, _, _, tid, cpu = _AUXTRACE_BODY.unpack_from(record, 8)
        if self.aux is None:
            self._skip(_AUXTRACE)
            self.follows = nbytes, lambda data: None
        else:
            self.aux.begin(tid, cpu)
            self.follows = nbytes, self.aux.take

    def _feature(self, record: memoryview) -> None:
        number = struct.unpack_from("<Q", record, 8)[0]
        try:
            self.features.take(number, record[16:])
        except RecordingError as error:
            self.notes.append(str(error))

    def _attribute(self, record: memoryview) -> None:
        nbytes = struct.unpack_from("<I", record, 12)[0] or 64
        ids = record[8 + nbytes :]
        event = parse_attr(record[8 : 8 + nbytes], struct.unpack(f"<{len(ids) // 8}Q", ids[: len(ids) & ~7]))
        if len(self.events) == EVENTS_LIMIT:
            raise RecordingError(f"the file has more than {EVENTS_LIMIT} events; record fewer")
        self._ids |= dict.fromkeys(event.ids, len(self.events))
        self.events.append(event)
        self._decoder = None

    def _flush(self) -> None:
        data = bytes(self._unpacked)
        used = self.take(memoryview(data), 0, unpacked=True)
        self._unpacked = bytearray(data[used:])

    def _skip(self, kind: int) -> None:
        self._skipped[kind] = self._skipped.get(kind, 0) + 1


def _snug(rows: Samples) -> Samples:
    """The rows, without the room that the decoder had to allow for where that is most of it."""
    return rows.copy() if rows.base is not None and rows.base.nbytes > 2 * rows.nbytes else rows


def _run(data: memoryview, position: int, at: int) -> tuple[int, int, int]:
    """(end of the run of the kernel's records at `position`, type and size of the whole one of perf's own behind it);
    size is 0 where the bytes end instead. What perf marks its rounds with stays in the run: they are many."""
    read, nbytes = _HEAD.unpack_from, len(data)
    last = nbytes - _HEAD.size
    alike = before = 0
    while position <= last:
        kind, size = read(data, position)
        if size < _HEAD.size:
            raise RecordingError(f"the record at byte {at + position} says that it has {size} bytes; record again")
        if position + size > nbytes:
            break
        if kind >= _USER and kind != _ROUND:
            return position, kind, size
        position += size
        alike = alike + 1 if size == before else 0
        before = size
        if alike == _ALIKE:
            position += size * _repeats(data, position, kind, size)
            alike = 0
    return position, 0, 0


def _repeats(data: memoryview, position: int, kind: int, size: int) -> int:
    """How many records of this type and size follow one another from `position` on: most files are of one kind."""
    head, count = np.uint64(kind | size << 48), 0
    while window := min(_WINDOW, (len(data) - position) // size):
        heads = np.ndarray(window, "<u8", data, position, (size,)) & _TYPE_AND_SIZE
        differ = np.flatnonzero(heads != head)
        if len(differ):
            return count + int(differ[0])
        count, position = count + window, position + window * size
    return count
