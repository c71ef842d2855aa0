"""Reader: path -> PerfData. Owns the order in which a perf.data file is read and its samples are put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tiermem.perfdata.data import PerfData
from tiermem.perfdata.events import EventInfo, name_of
from tiermem.perfdata.header import File, Header, read_header
from tiermem.perfdata.records import Records
from tiermem.perfdata.spe import Threads, processes_of
from tiermem.samples import PERIOD, SAMPLE, TIME, Samples

_PIECE = 16 << 20
"""Bytes read at once; beyond the samples themselves, memory holds a few times as many."""


def read(path: str) -> PerfData:
    """Read a perf.data file of `perf record`: written to a file or a pipe, packed by zstd or not.

    A truncated file gives what is whole of it, and a note. Raises RecordingError where the bytes make no sense or are
    of a kind that is not read, ReadError where they cannot be had. The format: tools/perf/Documentation/
    perf.data-file-format.txt and include/uapi/linux/perf_event.h of Linux.
    """
    file = File(path)
    try:
        header = read_header(file)
        records = Records(header.events, header.features)
        _take_all(file, header, records)
        records.finish()
    finally:
        file.close()
    return _result(path, header, records)


def _take_all(file: File, header: Header, records: Records) -> None:
    offset = header.begin
    data = memoryview(b"")
    while True:
        data = data[records.take(data, offset - len(data)) :]
        if records.follows is not None:
            nbytes, sink = records.follows
            records.follows = None
            inside, data = data[:nbytes], data[nbytes:]
            sink(inside)
            nbytes -= len(inside)
            while nbytes and (piece := file.read(offset, min(nbytes, _PIECE, header.end - offset))):
                sink(memoryview(piece))
                offset += len(piece)
                nbytes -= len(piece)
            if nbytes:
                header.notes.append(f"the last {nbytes} bytes of trace data are missing")
        elif piece := file.read(offset, min(_PIECE, header.end - offset)):
            data = memoryview(bytes(data) + piece)
            offset += len(piece)
        else:
            break
    if len(data):
        header.notes.append(f"the records end within one: its {len(data)} bytes were skipped")


def _result(path: str, header: Header, records: Records) -> PerfData:
    features, sideband = records.features, records.sideband
    names = sideband.names()
    notes = header.notes + records.notes
    events = _named(records)
    if records.aux is not None:
        aux = records.aux
        events.append(aux.event(events))
        threads = Threads(sideband.running, processes_of(list(names), sideband.forks))
        records.chunks += aux.samples(len(events) - 1, events[-1].period, records.clock, threads)
        if not records.clock:
            notes.append("the file does not tell how the trace's ticks become time; times of arm_spe samples are ticks")
        if aux.bad:
            notes.append(f"{aux.bad} bytes of trace data are no packets")
    samples = _in_order(records.chunks, [bool(event.sample_type & TIME) for event in events])
    for number, event in enumerate(events):
        if event.period and not event.sample_type & PERIOD:  # the same for all, and so in none of the records
            samples["period"][samples["event"] == number] = event.period
    return PerfData(
        path=path,
        events=tuple(events),
        samples=samples,
        names=names,
        images=tuple(sorted(sideband.images, key=lambda image: image.time)),
        forks=tuple(sorted(sideband.forks, key=lambda fork: fork.time)),
        exits=tuple(sorted(sideband.exits, key=lambda exit: exit.time)),
        lost=sideband.lost,
        lost_samples=sideband.lost_samples,
        throttled=sideband.throttled,
        unthrottled=sideband.unthrottled,
        hostname=features.hostname,
        os_release=features.os_release,
        perf_version=features.perf_version,
        arch=features.arch,
        cpus=features.cpus_online,
        cpu=features.cpu,
        cpuid=features.cpuid,
        memory_bytes=features.memory_bytes,
        command=features.command,
        build_ids=features.build_ids | sideband.build_ids,
        notes=tuple(notes),
    )


def _named(records: Records) -> list[EventInfo]:
    given = records.features.names
    names = given if len(given) == len(records.events) else ("",) * len(records.events)
    return [
        replace(event, name=name or event.name or name_of(event, records.features.pmus))
        for event, name in zip(records.events, names, strict=True)
    ]


def _in_order(chunks: list[Samples], timed: Sequence[bool]) -> Samples:
    """All rows of the chunks by time, equal times in file order; a row of an event without times stays behind the row
    before it. Empties `chunks` as it goes, so that rows are held once and not twice."""
    if not chunks:
        return np.empty(0, SAMPLE)
    place = _places(_times(chunks, np.array(timed, np.bool_)))
    chunks.reverse()
    if place is None and len(chunks) == 1:
        return chunks.pop()
    rows, start = np.empty(sum(map(len, chunks)), SAMPLE), 0
    while chunks:
        chunk = chunks.pop()
        end = start + len(chunk)
        rows[slice(start, end) if place is None else place[start:end]] = chunk
        start = end
    return rows


def _times(chunks: Sequence[Samples], timed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    times = np.concatenate([chunk["time"] for chunk in chunks])
    if not timed.all():
        has_time = np.concatenate([timed[chunk["event"]] for chunk in chunks])
        last = np.maximum.accumulate(np.where(has_time, np.arange(len(times)), 0))
        times = times[last]
    return times


def _places(times: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64] | None:
    """Where each row goes; None if each stays where it is."""
    if bool(np.all(times[:-1] <= times[1:])):
        return None
    places = np.empty(len(times), np.int64)
    places[np.argsort(times, kind="stable")] = np.arange(len(times))
    return places
