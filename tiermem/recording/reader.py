"""Reader of recordings: the frames of a file put together into a Recording. Never writes, and sums nothing up."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tiermem.addresses import AddressBook, Resolved
from tiermem.errors import ProtocolError, RecordingError
from tiermem.observations import Bits, Rung
from tiermem.recording.frames import MAGIC, VERSION, read_frames
from tiermem.rpc.codec import decode_manifest
from tiermem.samples import SAMPLE, Samples
from tiermem.types import PAGE_BYTES, Manifest

_MAX_ADDRESS = 1 << 57
_MAX_EVENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Header:
    """Who recorded what, where and when. `unix_s` is the wall clock at CLOCK_MONOTONIC `time_s`."""

    time_s: float
    unix_s: float
    tiermem: str
    host: Mapping[str, Any]
    config: Mapping[str, Any]
    command: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class RecordedModel:
    """A model of the pool. `first_page[i]` is the number in the model of segment i's first page; the last entry is the
    number of all pages."""

    id: str
    name: str
    manifest: Manifest
    first_page: tuple[int, ...]

    @property
    def pages(self) -> int:
        return self.first_page[-1]


@dataclass(frozen=True, slots=True)
class Window:
    """One window of one mapping; `model` counts in the recording's models."""

    model: int
    pid: int
    lease: str
    bits: Bits


@dataclass(frozen=True, slots=True)
class Image:
    """A file that a process mapped executable: `nbytes` of it from `offset`, at `address`, from `time_s` on."""

    pid: int
    time_s: float
    address: int
    nbytes: int
    offset: int
    path: str


@dataclass(frozen=True, slots=True)
class Event:
    """What gave samples. Rung.PERF watches every page at once; an event of another rung only sees what it sees."""

    name: str
    rung: Rung
    period: int


@dataclass(slots=True)
class Recording:
    """A recording that was read. Samples are in the order of time, and their `event` is an index of `events`; lists are
    in the order of the file. `opens` (and releases), `loads`, `moves` and `counters` hold frames as they are: maps of
    `kind`, `time_s` and the fields of the kind."""

    header: Header
    models: list[RecordedModel] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    samples: Samples = field(default_factory=lambda: np.empty(0, SAMPLE))
    book: AddressBook = field(default_factory=AddressBook)
    comms: dict[tuple[int, int], str] = field(default_factory=dict)
    images: list[Image] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    opens: list[Mapping[str, Any]] = field(default_factory=list)
    loads: list[Mapping[str, Any]] = field(default_factory=list)
    moves: list[Mapping[str, Any]] = field(default_factory=list)
    counters: list[Mapping[str, Any]] = field(default_factory=list)
    begin_s: float = math.inf
    end_s: float = 0.0
    end_reason: str | None = None
    notes: list[str] = field(default_factory=list)
    _resolved: Resolved | None = field(default=None, repr=False)

    @property
    def resolved(self) -> Resolved:
        """Model, page and offset of each of `samples`; worked out when it is first asked for."""
        if self._resolved is None:
            self._resolved = self.book.resolve(self.samples)
        return self._resolved

    def comm(self, pid: int, tid: int) -> str:
        """Name of a thread, or of its process; empty where neither was recorded."""
        return self.comms.get((pid, tid)) or self.comms.get((pid, pid), "")


def read(path: str | Path) -> Recording:
    """The recording in a file. `notes` says what of it could not be used.

    Raises RecordingError for a file that is no recording, is of a later version, or is damaged before its last frame;
    OSError where it cannot be read.
    """
    try:
        return _read(Path(path))
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from None


def _read(path: Path) -> Recording:
    notes: list[str] = []
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise RecordingError("it is no recording of tiermem; tiermem record makes one")
        frames = read_frames(file, os.fstat(file.fileno()).st_size, notes)
        first = next(frames, None)
        if first is None or first[1]["kind"] != "header":
            raise RecordingError("it has no header: recording ended before it began, or the file is damaged")
        assembly = _Assembly(_header(first[1]), notes)
        for at, fields in frames:
            try:
                assembly.add(fields)
            except (RecordingError, ProtocolError) as error:
                raise RecordingError(f"the frame at byte {at} is damaged: {error}") from None
    return assembly.finish()


def _header(fields: Mapping[str, Any]) -> Header:
    if fields["version"] > VERSION:
        raise RecordingError(
            f"it is of version {fields['version']}, made by tiermem {fields['tiermem']:.40}; this one reads {VERSION}"
        )
    command = fields["command"]
    return Header(
        fields["time_s"], fields["unix_s"], fields["tiermem"], fields["host"], fields["config"],
        None if command is None else tuple(command),
    )  # fmt: skip


class _Assembly:
    """A recording while its frames are read: a frame goes to the method of its kind, of which FIELDS has no other."""

    def __init__(self, header: Header, notes: list[str]) -> None:
        self._recording = Recording(header, notes=notes)
        self._number: dict[str, int] = {}
        self._event_number: dict[tuple[str, Rung], int] = {}
        self._events = np.empty(0, np.uint16)  # number of the recording for each of the last frame's
        self._samples: list[Samples] = []
        self._mapped: defaultdict[int, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self._started: dict[int, int] = {}
        self._strays: Counter[str] = Counter()

    def add(self, fields: dict[str, Any]) -> None:
        kind, time_s = fields["kind"], fields["time_s"]
        recording = self._recording
        recording.begin_s, recording.end_s = min(recording.begin_s, time_s), max(recording.end_s, time_s)
        getattr(self, f"on_{kind}")(fields)

    def finish(self) -> Recording:
        recording = self._recording
        if self._samples:
            samples = np.concatenate(self._samples)
            recording.samples = samples[np.argsort(samples["time"], kind="stable")]
        recording.begin_s = min(recording.begin_s, recording.header.time_s)
        recording.end_s = max(recording.end_s, recording.header.time_s)
        for what, count in self._strays.items():
            recording.notes.append(f"{count} frames are passed over: {what}")
        if recording.end_reason is None:
            recording.notes.append("the recording has no end: its recorder was killed, or still runs")
        return recording

    def on_open(self, fields: Mapping[str, Any]) -> None:
        self._recording.opens.append(fields)

    def on_release(self, fields: Mapping[str, Any]) -> None:
        self._recording.opens.append(fields)

    def on_load(self, fields: Mapping[str, Any]) -> None:
        self._recording.loads.append(fields)

    def on_move(self, fields: Mapping[str, Any]) -> None:
        self._recording.moves.append(fields)

    def on_counters(self, fields: Mapping[str, Any]) -> None:
        self._recording.counters.append(fields)

    def on_header(self, fields: Mapping[str, Any]) -> None:
        raise RecordingError("a second header; two recordings in one file are not read")

    def on_model(self, fields: Mapping[str, Any]) -> None:
        if fields["id"] in self._number:
            return
        manifest = decode_manifest(fields["manifest"])
        first_page = tuple(accumulate((segment.pages for segment in manifest.segments), initial=0))
        if first_page[-1] >= 1 << 31:
            raise RecordingError(f"model {fields['name']!r:.80} of {first_page[-1]} pages; 2^31 are too many")
        self._number[fields["id"]] = len(self._recording.models)
        self._recording.models.append(RecordedModel(fields["id"], fields["name"], manifest, first_page))

    def on_map(self, fields: Mapping[str, Any]) -> None:
        model = self._known(fields)
        if model is None:
            return
        address, pages = fields["address"], fields["pages"]
        limit = self._recording.models[model].pages
        if not 0 < pages <= limit or address + pages * PAGE_BYTES > _MAX_ADDRESS:
            raise RecordingError(f"a mapping of {pages} pages at {address:#x} of a model of {limit}")
        self._mapped[fields["pid"]][fields["lease"]].append(address)
        self._recording.book.map(fields["pid"], model, address, pages * PAGE_BYTES, _ns(fields["time_s"]))

    def on_unmap(self, fields: Mapping[str, Any]) -> None:
        for address in self._mapped[fields["pid"]].pop(fields["lease"], ()):
            self._recording.book.unmap(fields["pid"], address, _ns(fields["time_s"]))

    def on_process(self, fields: Mapping[str, Any]) -> None:
        pid, start_ticks = fields["pid"], fields["start_ticks"]
        if self._started.setdefault(pid, start_ticks) != start_ticks:
            self.on_exit(fields)
            self._started[pid] = start_ticks
        self._recording.comms[pid, pid] = fields["comm"]

    def on_thread(self, fields: Mapping[str, Any]) -> None:
        self._recording.comms[fields["pid"], fields["tid"]] = fields["comm"]

    def on_exit(self, fields: Mapping[str, Any]) -> None:
        self._mapped.pop(fields["pid"], None)
        self._recording.book.end(fields["pid"], _ns(fields["time_s"]))

    def on_image(self, fields: Mapping[str, Any]) -> None:
        names = ("pid", "time_s", "address", "nbytes", "offset", "path")
        self._recording.images.append(Image(*(fields[name] for name in names)))

    def on_events(self, fields: Mapping[str, Any]) -> None:
        names, periods, rung = fields["names"], fields["periods"], _rung(fields)
        if len(names) != len(periods):
            raise RecordingError(f"{len(names)} events with {len(periods)} periods")
        numbers = [self._event_number.setdefault((name, rung), len(self._event_number)) for name in names]
        if len(self._event_number) > _MAX_EVENTS:
            raise RecordingError(f"more than {_MAX_EVENTS} different events")
        events = self._recording.events
        for number, name, period in zip(numbers, names, periods, strict=True):
            if number == len(events):
                events.append(Event(name, rung, period))
            elif period:
                events[number] = Event(name, rung, period)
        self._events = np.array(numbers, np.uint16)

    def on_samples(self, fields: Mapping[str, Any]) -> None:
        if len(fields["data"]) % SAMPLE.itemsize:
            raise RecordingError(f"{len(fields['data'])} bytes of samples, which are {SAMPLE.itemsize} bytes each")
        samples = np.frombuffer(fields["data"], SAMPLE).copy()
        if not len(samples):
            return
        if samples["event"].max() >= len(self._events):
            raise RecordingError(f"samples of event {samples['event'].max()}, of {len(self._events)} announced")
        samples["event"] = self._events[samples["event"]]
        self._samples.append(samples)

    def on_bits(self, fields: Mapping[str, Any]) -> None:
        model = self._known(fields)
        if model is not None:
            bits = _bits(fields, self._recording.models[model].pages)
            self._recording.windows.append(Window(model, fields["pid"], fields["lease"], bits))

    def on_end(self, fields: Mapping[str, Any]) -> None:
        self._recording.end_reason = fields["reason"]

    def _known(self, fields: Mapping[str, Any]) -> int | None:
        number = self._number.get(fields["model"])
        if number is None:
            self._strays[f"no frame before them introduces model {fields['model']:.40}"] += 1
        return number


def _bits(fields: Mapping[str, Any], limit: int) -> Bits:
    count, odd = divmod(len(fields["pages"]), 4)
    if odd or len(fields["touched"]) != -(-count // 8):
        raise RecordingError(f"{len(fields['pages'])} bytes of pages with {len(fields['touched'])} bytes of bits")
    pages = np.frombuffer(fields["pages"], "<i4")
    if count and (pages[0] < 0 or pages[-1] >= limit or (np.diff(pages) <= 0).any()):
        raise RecordingError(f"page numbers that do not ascend from 0 to {limit - 1}")
    if _rung(fields) <= Rung.DECLARED:
        raise RecordingError(f"a window by rung {fields['rung']}, which samples nothing")
    if fields["end_s"] < fields["begin_s"]:
        raise RecordingError(f"a window that ends {fields['begin_s'] - fields['end_s']} s before it begins")
    touched = np.unpackbits(np.frombuffer(fields["touched"], np.uint8), count=count, bitorder="little")
    return Bits(_rung(fields), fields["begin_s"], fields["end_s"], pages, touched.astype(np.bool_))


def _rung(fields: Mapping[str, Any]) -> Rung:
    return Rung[fields["rung"].upper()]


def _ns(time_s: float) -> int:
    return round(time_s * 1e9)
