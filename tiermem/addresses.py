"""Address book: which page of which model an address of a process was at a time. Never asks the kernel or the clock.

It holds what it is told (mapped, unmapped, ended) in the order of the times told, so that a number of a process or an
address that is used again later means what it meant when a sample was taken. Times are CLOCK_MONOTONIC in nanoseconds.

No lock inside: its owner's lock guards it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiermem.samples import Samples
from tiermem.types import PAGE_BYTES

_ADDRESSES = 1 << 64
_FOREVER = (1 << 64) - 1
_U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Resolved:
    """What each sample touched. `model`: int32, -1 where it was none of ours; `page`: int32, of the model; `offset`:
    uint64, bytes from where the mapping begins; both 0 where it was none of ours."""

    model: npt.NDArray[np.int32]
    page: npt.NDArray[np.int32]
    offset: npt.NDArray[np.uint64]


class _Event(NamedTuple):
    """From `time_ns` on, [start, stop) of a process is model `model` (-1: nothing of ours).

    `only`: it touches nothing but what was mapped at `base`.
    """

    time_ns: int
    start: int
    stop: int
    model: int
    base: int
    only: bool = False


class _Span(NamedTuple):
    """[start, stop) was `model`, mapped at `base`, in [begin_ns, end_ns). No two spans of a process overlap."""

    start: int
    stop: int
    begin_ns: int
    end_ns: int
    model: int
    base: int


@dataclass(slots=True)
class _Process:
    events: list[_Event] = field(default_factory=list)

    def add(self, event: _Event) -> None:
        """Events of one time are in the order in which they were told."""
        bisect.insort_right(self.events, event, key=lambda known: known.time_ns)

    def spans(self) -> list[_Span]:
        """What was mapped when: each event ends, or cuts, what lives in its range, and begins its own."""
        ended: list[_Span] = []
        live: list[_Span] = []
        for event in self.events:
            kept: list[_Span] = []
            for span in live:
                start, stop = max(span.start, event.start), min(span.stop, event.stop)
                if start >= stop or (event.only and span.base != event.base):
                    kept.append(span)
                    continue
                ended.append(span._replace(start=start, stop=stop, end_ns=event.time_ns))
                kept.append(span._replace(stop=start))
                kept.append(span._replace(start=stop))
            live = [span for span in kept if span.start < span.stop]
            if event.model >= 0:
                live.append(_Span(event.start, event.stop, event.time_ns, _FOREVER, event.model, event.base))
        return [span for span in ended + live if span.begin_ns < span.end_ns]

    def forget(self, before_ns: int) -> None:
        """Drops spans that ended by then; the others are told anew."""
        kept = [span for span in self.spans() if span.end_ns > before_ns]
        ends = [_Event(span.end_ns, span.start, span.stop, -1, span.base) for span in kept if span.end_ns != _FOREVER]
        begins = [_Event(span.begin_ns, span.start, span.stop, span.model, span.base) for span in kept]
        self.events = sorted(ends + begins, key=lambda event: (event.time_ns, event.model >= 0))


class AddressBook:
    """(process, address, time) -> (model, page, offset), for all processes of a host that read models.

    What is told of a process may arrive late or out of order, after its first mapping. A later mapping replaces what
    it covers of an earlier one, as mmap with MAP_FIXED does. Raises ValueError for numbers that can be no mapping's.
    """

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}
        self._table: _Table | None = None

    def __len__(self) -> int:
        """Processes of which something is known."""
        return len(self._processes)

    def map(self, pid: int, model: int, address: int, nbytes: int, time_ns: int) -> None:
        """From `time_ns` on, the `nbytes` at `address` are model number `model` from its first page on."""
        if not (0 <= model < 1 << 31 and 0 < nbytes <= PAGE_BYTES << 31 and address + nbytes < _ADDRESSES):
            raise ValueError(f"no mapping has {nbytes} bytes of model number {model} at address {address:#x}")
        _check(pid, address, time_ns)
        process = self._processes.setdefault(pid, _Process())
        process.add(_Event(time_ns, address, address + nbytes, model, address))
        self._table = None

    def unmap(self, pid: int, address: int, time_ns: int) -> None:
        """What was mapped at `address` ends; nothing happens if nothing was."""
        _check(pid, address, time_ns)
        self._end(pid, _Event(time_ns, address, _ADDRESSES, -1, address, only=True))

    def end(self, pid: int, time_ns: int) -> None:
        """The process exits or executes another program: all its mappings end."""
        _check(pid, 0, time_ns)
        self._end(pid, _Event(time_ns, 0, _ADDRESSES, -1, 0))

    def forget(self, before_ns: int) -> None:
        """Mappings that ended by then are no more found, and processes without any are dropped."""
        for pid, process in list(self._processes.items()):
            process.forget(before_ns)
            if not process.events:
                del self._processes[pid]
        self._table = None

    def resolve(self, samples: Samples) -> Resolved:
        """What each sample touched, for any array with the fields pid, addr and time of the dtype SAMPLE."""
        if self._table is None:
            self._table = _Table(self._processes)
        return self._table.resolve(samples)

    def _end(self, pid: int, event: _Event) -> None:
        # A host has many processes that never map anything of ours: they must leave nothing here.
        if pid in self._processes:
            self._processes[pid].add(event)
            self._table = None


def _check(pid: int, address: int, time_ns: int) -> None:
    if not (0 <= pid < 1 << 32 and 0 <= address < _ADDRESSES and 0 <= time_ns < _FOREVER):
        raise ValueError(f"no process {pid} has a mapping at address {address:#x} at {time_ns} ns")


class _Table:
    """All spans as sorted arrays, so that a sample is found by binary search.

    A cell is a range of addresses of one process that no span cuts; its rows are the spans there, which follow one
    another in time. Addresses and times are replaced by their rank among all that occur, so that (process, address)
    and (cell, time) each fit into one sortable number.
    """

    def __init__(self, processes: dict[int, _Process]) -> None:
        rows = sorted(row for pid, process in processes.items() for row in _rows(pid, process.spans()))
        columns = list(zip(*rows, strict=True)) or [()] * 7
        self._pid, self._start, self._begin, self._stop, self._end, self._base = (
            np.array(columns[i], np.uint64) for i in (0, 1, 2, 3, 4, 6)
        )
        self._model = np.array(columns[5], np.int32)
        self._starts = np.unique(self._start)
        self._begins = np.unique(self._begin)
        keys = _key(self._pid, self._starts, self._start)
        self._cells, cell = np.unique(keys, return_inverse=True)
        self._versions = _key(cell.astype(np.uint64), self._begins, self._begin)

    def resolve(self, samples: Samples) -> Resolved:
        count = len(samples)
        if not len(self._model) or not count:
            return Resolved(np.full(count, -1, np.int32), np.zeros(count, np.int32), np.zeros(count, np.uint64))
        pid, address, time = (samples[name].astype(np.uint64) for name in ("pid", "addr", "time"))
        row = _last_not_above(self._cells, _key(pid, self._starts, address))
        if len(self._cells) < len(self._model):
            row = _last_not_above(self._versions, _key(row.astype(np.uint64), self._begins, time))
        ours = self._pid[row] == pid
        ours &= (self._start[row] <= address) & (address < self._stop[row])
        ours &= (self._begin[row] <= time) & (time < self._end[row])
        offset = np.where(ours, address - self._base[row], np.uint64(0))
        page = (offset // np.uint64(PAGE_BYTES)).astype(np.int32)
        return Resolved(np.where(ours, self._model[row], np.int32(-1)), page, offset)


def _rows(pid: int, spans: list[_Span]) -> Iterator[tuple[int, ...]]:
    edges = sorted({edge for span in spans for edge in (span.start, span.stop)})
    for span in spans:
        first, last = bisect.bisect_left(edges, span.start), bisect.bisect_left(edges, span.stop)
        for start, stop in pairwise(edges[first : last + 1]):
            yield pid, start, span.begin_ns, stop, span.end_ns, span.model, span.base


def _key(group: _U64, known: _U64, values: _U64) -> _U64:
    return group << np.uint64(32) | np.searchsorted(known, values, "right").astype(np.uint64)


def _last_not_above(keys: _U64, wanted: _U64) -> npt.NDArray[np.intp]:
    """Index of the last key that is not above each wanted one; 0 where there is none, which the caller tells apart."""
    return np.maximum(np.searchsorted(keys, wanted, "right") - 1, 0)
