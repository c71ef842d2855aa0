"""Access statistics of a pool: heat per model, who has a model mapped where, and what observing costs.

Owns what samplers reported, from clients' agents and from perf rings, and tells the journal of it. Never samples, and
never decides what is sampled. Guarded by the pool's lock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.addresses import AddressBook
from tiermem.catalog import ModelRecord
from tiermem.errors import ProtocolError
from tiermem.heat import Heat, HeatColumns
from tiermem.journal import Journal
from tiermem.lease import Lease
from tiermem.observations import Bits, Counts, Rung
from tiermem.recording import bits_frame, frame, samples_frames
from tiermem.rpc import messages as m
from tiermem.rpc.codec import encode_manifest
from tiermem.samples import Samples
from tiermem.types import PAGE_BYTES

_REPORTED = {rung.name.lower(): rung for rung in (Rung.ACCESSED, Rung.PRESENT)}
"""Rungs that a client may report by."""

_FUTURE_S = 1.0
"""A window may end so long after now: clocks of one host agree, a larger lead is a client's mistake."""

_REMEMBERED_S = 60.0
"""Samples are taken out of rings much sooner than this after a mapping ended."""

_ADDRESSES = 1 << 57
"""No user's memory lies beyond, on any machine that we know."""

_REFUSED_CHARS = 500
_COST_LIMIT_S = 1e6
"""CPU seconds that one report may tell of: eleven days, more than any process uses between two."""


@dataclass(slots=True)
class Cost:
    """What one rung saw since the pool started, and what that cost: CPU seconds of samplers, of the faults that they
    cause, and of the processes that they watch. `lost` found no room in a ring, `lost_samples` none in the PMU."""

    windows: int = 0
    pages: int = 0
    touched: int = 0
    samples: int = 0
    foreign: int = 0
    lost: int = 0
    lost_samples: int = 0
    throttled: int = 0
    sampler_s: float = 0.0
    fault_s: float = 0.0
    client_s: float = 0.0


@dataclass(slots=True)
class Client:
    """What the pool knows of one process that reads models. `refused`: why not all of it can be sampled; `untrackable`:
    lease -> pages that cannot be."""

    pid: int
    leases: int = 0
    refused: str = ""
    untrackable: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelHeat:
    """Heat of a model's pages, which layer they are: (layer, pages) in page order, and the tier of each: an index in
    `tiers`, or LOADING."""

    layers: tuple[tuple[str, int], ...]
    columns: HeatColumns
    tiers: tuple[str, ...]
    tier: npt.NDArray[np.int8]

    def by_layer(self) -> Iterator[tuple[str, HeatColumns]]:
        """Each layer with the heat of its pages."""
        first = 0
        for layer, pages in self.layers:
            yield layer, self.columns.rows(slice(first, first + pages))
            first += pages


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Where a client has a model's `pages` mapped, one after another, and since when."""

    lease: Lease
    pages: int
    address: int
    since_s: float

    def frame(self) -> bytes:
        lease = self.lease
        return frame("map", self.since_s, pid=lease.session.pid, lease=lease.id, model=lease.model_id,
                     address=self.address, pages=self.pages)  # fmt: skip


class AccessStatistics:
    """Of one pool, which passes its `lock` around every call."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.rung, self.reason = "none", "nothing samples"
        self.costs: defaultdict[Rung, Cost] = defaultdict(Cost)
        self.clients: dict[int, Client] = {}
        self._heats: dict[str, Heat] = {}
        self._book = AddressBook()
        self._numbers: dict[str, int] = {}
        self._mapped: dict[str, _Mapping] = {}
        self._tidied_s = time.monotonic()

    def heat(self, record: ModelRecord) -> Heat:
        """The model's heat, for the caller to read."""
        heat = self._heats.get(record.id)
        if heat is None:
            heat = self._heats[record.id] = Heat(record.first_page[-1])
        return heat

    # --- what the pool tells ------------------------------------------------------------------------------------

    def opened(self, record: ModelRecord, lease: Lease) -> None:
        """A client got a lease."""
        pid = lease.session.pid
        self.clients.setdefault(pid, Client(pid)).leases += 1
        self.asked(record, range(len(record.keys)))
        if self.journal.watched:
            self.journal.tell("model", id=record.id, name=record.name, manifest=encode_manifest(record.manifest))
            self.journal.tell("open", pid=pid, model=record.id, lease=lease.id)

    def asked(self, record: ModelRecord, segments: Iterable[int]) -> None:
        """A client asked for tensors of these segments by name."""
        pages = [np.arange(*record.pages(i).indices(record.first_page[-1])) for i in sorted(set(segments))]
        if pages:
            self.heat(record).add_declared(np.concatenate(pages).astype(np.int32), time.monotonic())
            self.costs[Rung.DECLARED].pages += sum(map(len, pages))

    def copied(self, record: ModelRecord, pages: npt.NDArray[np.int32]) -> None:
        """A client copied these pages to a device: it read them, and they are for somebody's use."""
        if len(pages):
            self.heat(record).add_declared(pages, time.monotonic())
            self.costs[Rung.DECLARED].pages += len(pages)

    def released(self, lease: Lease) -> None:
        """A lease ended, and with it what its client had mapped."""
        pid = lease.session.pid
        mapped = self._mapped.pop(lease.id, None)
        if mapped is not None:
            self._book.unmap(pid, mapped.address, time.monotonic_ns())
            self.journal.tell("unmap", pid=pid, lease=lease.id)
        self.journal.tell("release", pid=pid, lease=lease.id)
        client = self.clients[pid]
        client.leases -= 1
        client.untrackable.pop(lease.id, None)
        if not client.leases:
            del self.clients[pid]
            self._book.end(pid, time.monotonic_ns())
            self._tidy(time.monotonic())

    def forget(self, record: ModelRecord) -> None:
        """The model was removed."""
        self._heats.pop(record.id, None)

    # --- what samplers tell --------------------------------------------------------------------------------------

    def reported(self, pid: int, held: Mapping[str, tuple[ModelRecord, Lease]], request: m.ReportRequest) -> None:
        """A client's agent reports. What it says of leases that it does not hold (any more) is void.

        Raises ProtocolError for what cannot be; windows before it were taken.
        """
        _check_report(held, request)
        for mapping in request.mapped:
            if mapping.lease_id in held:
                self._map(*held[mapping.lease_id], mapping)
        rung = _REPORTED.get(request.rung)
        if rung is None:
            return
        for window in request.windows:
            if window.lease_id in held:
                self._add_window(*held[window.lease_id], rung, window)
        cost = self.costs[rung]
        cost.sampler_s += request.agent_s
        cost.fault_s += request.fault_s
        cost.client_s += request.client_s
        if client := self.clients.get(pid):
            client.refused = request.refused[:_REFUSED_CHARS]
            client.untrackable |= {
                entry.lease_id: entry.pages for entry in request.untrackable if entry.lease_id in held
            }
        values = {"sampler_s": request.agent_s, "fault_s": request.fault_s, "client_s": request.client_s}
        self.journal.tell("counters", pid=pid, rung=request.rung, values=values)

    def sampled(
        self, events: Sequence[str], batch: Samples, records: Sequence[ModelRecord], begin_s: float, end_s: float
    ) -> None:
        """Rings gave these samples of all clients' threads between two times. `events`: names by the number that a
        sample has; `records`: all models."""
        cost = self.costs[Rung.PERF]
        found = self._book.resolve(batch)
        ours = found.model >= 0
        cost.samples += int(ours.sum())
        cost.foreign += int(len(batch) - ours.sum())
        if self.journal.watched:
            # Whoever watches may add samples of its own: each batch says which events it counts in.
            periods = [int(batch["period"][batch["event"] == i].max(initial=0)) for i in range(len(events))]
            told = frame("events", end_s, names=list(events), periods=periods, rung="perf")
            self.journal.pass_on(told + samples_frames(end_s, batch[ours]))
        mapped = {mapping.lease.model_id for mapping in self._mapped.values()}
        for record in (record for record in records if record.id in mapped):
            mine = found.model == self._number(record.id)
            pages, counts = np.unique(found.page[mine], return_counts=True)
            period = float(np.median(batch["period"][mine])) if len(pages) else 1.0
            # Also without a sample: that says that its pages were watched and not touched.
            self.heat(record).add_counts(
                Counts(Rung.PERF, begin_s, end_s, pages.astype(np.int32), counts.astype(np.uint32), max(period, 1.0))
            )
        self._tidy(end_s)

    # --- for readers ------------------------------------------------------------------------------------------------

    def state(self, records: Iterable[ModelRecord], leases: Iterable[Lease]) -> Iterator[bytes]:
        """Frames that say what is open and mapped now: what a recording begins with."""
        now = time.monotonic()
        known = set()
        for record in records:
            known.add(record.id)
            yield frame("model", now, id=record.id, name=record.name, manifest=encode_manifest(record.manifest))
        for lease in leases:
            if lease.model_id in known:
                yield frame("open", now, pid=lease.session.pid, model=lease.model_id, lease=lease.id)
        for mapping in self._mapped.values():
            yield mapping.frame()

    def check(self) -> None:
        """Every structure agrees with every other."""
        for lease_id, mapping in self._mapped.items():
            assert mapping.lease.session.pid in self.clients, f"the mapping of {lease_id} outlives its client's leases"
        for pid, client in self.clients.items():
            assert client.leases > 0, f"process {pid} is a client without a lease"
            mapped = sum(mapping.lease.session.pid == pid for mapping in self._mapped.values())
            known = max(mapped, len(client.untrackable))
            assert known <= client.leases, f"process {pid} has {client.leases} leases, and told of {known}"

    def _map(self, record: ModelRecord, lease: Lease, report: m.MappedReport) -> None:
        if lease.id in self._mapped:  # a lease is mapped once
            return
        since_s = min(report.since_s, time.monotonic())
        mapping = self._mapped[lease.id] = _Mapping(lease, record.first_page[-1], report.address, since_s)
        nbytes = mapping.pages * PAGE_BYTES
        self._book.map(lease.session.pid, self._number(record.id), mapping.address, nbytes, int(since_s * 1e9))
        self.journal.pass_on(mapping.frame())

    def _tidy(self, now_s: float) -> None:
        """Forgetting goes through all mappings, so it is done now and then."""
        if now_s - self._tidied_s >= _REMEMBERED_S:
            self._tidied_s = now_s
            self._book.forget(int((now_s - _REMEMBERED_S) * 1e9))

    def _add_window(self, record: ModelRecord, lease: Lease, rung: Rung, report: m.WindowReport) -> None:
        bits = _bits(rung, report, record.first_page[-1])
        self.heat(record).add_bits(bits)
        cost = self.costs[rung]
        cost.windows += 1
        cost.pages += len(bits.pages)
        cost.touched += int(bits.touched.sum())
        if self.journal.watched:
            self.journal.pass_on(bits_frame(time.monotonic(), lease.session.pid, lease.id, record.id, bits))

    def _number(self, model_id: str) -> int:
        return self._numbers.setdefault(model_id, len(self._numbers))


def _check_report(held: Mapping[str, tuple[ModelRecord, Lease]], request: m.ReportRequest) -> None:
    """Raises ProtocolError for an address, a number of pages or a cost that cannot be."""
    for mapping in request.mapped:
        if mapping.lease_id in held:
            last = mapping.address + held[mapping.lease_id][0].first_page[-1] * PAGE_BYTES
            if not (0 < mapping.address < last <= _ADDRESSES and mapping.since_s >= 0):
                raise ProtocolError(
                    f"lease {mapping.lease_id}: no model is mapped at {mapping.address:#x} since {mapping.since_s} s"
                )
    for entry in request.untrackable:
        pages = held[entry.lease_id][0].first_page[-1] if entry.lease_id in held else entry.pages
        if not 0 <= entry.pages <= pages:
            raise ProtocolError(f"lease {entry.lease_id}: {entry.pages} pages of {pages} cannot be untrackable")
    if not all(0 <= cost_s < _COST_LIMIT_S for cost_s in (request.agent_s, request.fault_s, request.client_s)):
        raise ProtocolError(
            f"a report of {request.agent_s}, {request.fault_s} and {request.client_s} CPU seconds: "
            f"each must be from 0 to {_COST_LIMIT_S:.0f}"
        )


def _bits(rung: Rung, report: m.WindowReport, pages: int) -> Bits:
    if len(report.pages) % 4:
        raise ProtocolError(f"window of lease {report.lease_id}: {len(report.pages)} bytes are no i32 page numbers")
    numbers = np.frombuffer(report.pages, "<i4")
    if len(report.touched) != -(-len(numbers) // 8):
        raise ProtocolError(
            f"window of lease {report.lease_id}: {len(numbers)} pages with {len(report.touched)} bytes of bits"
        )
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= pages or (np.diff(numbers) <= 0).any()):
        raise ProtocolError(f"window of lease {report.lease_id}: page numbers must ascend from 0 to {pages - 1}")
    if not 0 <= report.begin_s <= report.end_s <= time.monotonic() + _FUTURE_S:
        raise ProtocolError(f"window of lease {report.lease_id}: from {report.begin_s} to {report.end_s} is no past")
    touched = np.unpackbits(np.frombuffer(report.touched, np.uint8), count=len(numbers), bitorder="little")
    return Bits(rung, report.begin_s, report.end_s, numbers, touched.astype(np.bool_))
