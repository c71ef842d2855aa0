"""Access statistics: heat, clients, mappings and costs agree after whatever they are told, in any order."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.frames import frames_of
from tiermem import statistics
from tiermem.catalog import ModelRecord
from tiermem.errors import ProtocolError
from tiermem.journal import Journal
from tiermem.lease import Lease, LeaseTable, Session
from tiermem.observations import Rung
from tiermem.rpc import messages as m
from tiermem.samples import SAMPLE
from tiermem.statistics import AccessStatistics
from tiermem.types import PAGE_BYTES, Manifest, SegmentInfo

ADDRESS = 0x7F00_0000_0000
EVENTS = ["loads"]


def record_of(name: str, pages: int = 6) -> ModelRecord:
    """A model of two layers without tensors."""
    nbytes = [pages // 2 * PAGE_BYTES, (pages - pages // 2) * PAGE_BYTES]
    segments = tuple(SegmentInfo(f"layer.{i}", size) for i, size in enumerate(nbytes))
    return ModelRecord(
        name, Manifest(path=f"/{name}", identity=f"id-{name}", files=(), tensors=(), segments=segments), []
    )


def window(lease: str, pages: list[int], touched: list[bool], begin_s: float, end_s: float) -> m.WindowReport:
    bits = np.packbits(touched, bitorder="little").tobytes()
    return m.WindowReport(lease, begin_s, end_s, np.array(pages, "<i4").tobytes(), bits)


def samples_of(rows: list[tuple[int, int, float]], period: int = 1) -> Any:
    """Of (process, address, seconds)."""
    samples = np.zeros(len(rows), SAMPLE)
    for i, (pid, address, time_s) in enumerate(rows):
        samples[i]["pid"], samples[i]["addr"], samples[i]["time"] = pid, address, int(time_s * 1e9)
    samples["period"] = period
    return samples


class Host:
    """Statistics, two models, and the leases of processes, as a pool has them."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.statistics = AccessStatistics(self.journal)
        self.records = {name: record_of(name) for name in ("a", "b")}
        self.leases = LeaseTable()
        self.sessions = {pid: Session(pid, 0) for pid in (7, 8)}

    def open(self, pid: int, name: str) -> Lease:
        lease = self.leases.grant(self.records[name].id, self.sessions[pid])
        self.statistics.opened(self.records[name], lease)
        return lease

    def release(self, lease: Lease) -> None:
        if self.leases.release(lease):
            self.statistics.released(lease)

    def report(self, pid: int, **fields: Any) -> None:
        by_id = {record.id: record for record in self.records.values()}
        held = {lease.id: (by_id[lease.model_id], lease) for lease in self.leases.of_session(self.sessions[pid])}
        self.statistics.reported(pid, held, m.ReportRequest(**({"rung": "present"} | fields)))

    def columns(self, name: str) -> Any:
        return self.statistics.heat(self.records[name]).columns(time.monotonic())

    def sampled(self, rows: list[tuple[int, int, float]]) -> None:
        now = time.monotonic()
        self.statistics.sampled(EVENTS, samples_of(rows), list(self.records.values()), now - 0.1, now)

    def mapped(self, lease: Lease, since_s: float, address: int = ADDRESS) -> None:
        self.report(lease.session.pid, mapped=(m.MappedReport(lease.id, address, since_s),))


@pytest.fixture
def host() -> Host:
    return Host()


def test_windows_make_pages_known_and_nothing_else_does(host: Host) -> None:
    lease, now = host.open(7, "a"), time.monotonic()
    assert host.columns("a").rung.tolist() == [Rung.DECLARED] * 6
    assert not host.columns("a").known.any()
    host.report(7, windows=(window(lease.id, [1, 2, 5], [True, False, True], now - 0.1, now),))
    columns = host.columns("a")
    assert columns.known.tolist() == [False, True, True, False, False, True]
    assert (columns.rate[[1, 2, 5]] > 0).tolist() == [True, False, True]
    assert not host.columns("b").known.any()
    cost = host.statistics.costs[Rung.PRESENT]
    assert (cost.windows, cost.pages, cost.touched) == (1, 3, 2)


def test_costs_add_up_by_rung(host: Host) -> None:
    host.open(7, "a")
    for rung in ("present", "accessed", "present"):
        host.report(7, rung=rung, agent_s=0.25, fault_s=0.5, client_s=2.0)
    present, accessed = host.statistics.costs[Rung.PRESENT], host.statistics.costs[Rung.ACCESSED]
    assert (present.sampler_s, present.fault_s, present.client_s) == (0.5, 1.0, 4.0)
    assert (accessed.sampler_s, accessed.fault_s, accessed.client_s) == (0.25, 0.5, 2.0)


def test_a_client_is_known_as_long_as_it_has_a_lease(host: Host) -> None:
    first, second = host.open(7, "a"), host.open(7, "b")
    host.report(7, refused="why", untrackable=(m.UntrackableReport(first.id, 6), m.UntrackableReport(second.id, 1)))
    client = host.statistics.clients[7]
    assert (client.leases, client.refused, sum(client.untrackable.values())) == (2, "why", 7)
    host.release(first)
    assert (client.leases, client.untrackable) == (1, {second.id: 1})
    host.release(second)
    assert host.statistics.clients == {}


@pytest.mark.parametrize("rung", ["perf", "declared", "none", "off", "nonsense", "PRESENT", ""])
def test_a_client_reports_by_no_rung_but_its_own(host: Host, rung: str) -> None:
    lease, now = host.open(7, "a"), time.monotonic()
    host.report(7, rung=rung, windows=(window(lease.id, [0], [True], now - 0.1, now),), agent_s=1.0)
    assert not host.columns("a").known.any()
    assert all(not cost.windows and not cost.sampler_s for cost in host.statistics.costs.values())


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "page beyond": {"pages": [6]},
    "negative page": {"pages": [-1]},
    "descending": {"pages": [2, 1]},
    "twice": {"pages": [1, 1]},
    "too few bits": {"pages": list(range(6)), "touched": b""},
    "too many bits": {"pages": [1], "touched": b"\1\1"},
    "half a page number": {"pages": b"\1\0\0"},
    "future": {"end_s": 3600.0},
    "ends before it begins": {"begin_s": 0.0, "end_s": -1.0},
    "before the host": {"begin_s": -1e11},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_window_that_cannot_be_is_refused(host: Host, name: str) -> None:
    lease, now = host.open(7, "a"), time.monotonic()
    asked = {"pages": [1], "begin_s": -0.1, "end_s": 0.0} | IMPOSSIBLE[name]
    pages = asked["pages"] if isinstance(asked["pages"], bytes) else np.array(asked["pages"], "<i4").tobytes()
    report = m.WindowReport(lease.id, now + asked["begin_s"], now + asked["end_s"], pages, asked.get("touched", b"\1"))
    with pytest.raises(ProtocolError, match=lease.id):
        host.report(7, windows=(report,))
    assert not host.columns("a").known.any()
    assert host.statistics.costs[Rung.PRESENT].windows == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"address": -PAGE_BYTES}, {"address": 0}, {"address": 1 << 64}, {"address": (1 << 57) - PAGE_BYTES},
        {"since_s": -1.0}, {"agent_s": -1.0}, {"fault_s": 1e308}, {"client_s": float("inf")},
        {"untrackable": -1}, {"untrackable": 7},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_process_can_have_is_refused_and_leaves_nothing(host: Host, fields: dict[str, Any]) -> None:
    lease = host.open(7, "a")
    place = {"address": ADDRESS, "since_s": 1.0} | {k: v for k, v in fields.items() if k in ("address", "since_s")}
    costs = {key: value for key, value in fields.items() if key in ("agent_s", "fault_s", "client_s")}
    with pytest.raises(ProtocolError):
        host.report(
            7, mapped=(m.MappedReport(lease.id, **place),), **costs,
            untrackable=(m.UntrackableReport(lease.id, fields.get("untrackable", 6)),),
        )  # fmt: skip
    told = [frames_of(data)[0]["kind"] for data in host.statistics.state((), host.leases)]
    assert told == [], "nothing is mapped"
    assert host.statistics.clients[7].untrackable == {}
    assert host.statistics.costs[Rung.PRESENT].sampler_s == 0
    host.mapped(lease, 1.0)
    host.statistics.check()


def test_a_report_tells_nothing_of_leases_that_its_client_does_not_hold(host: Host) -> None:
    theirs, now = host.open(8, "a"), time.monotonic()
    mine = host.open(7, "b")
    for lease_id in (theirs.id, "nothing"):
        host.report(
            7, mapped=(m.MappedReport(lease_id, ADDRESS, now),), windows=(window(lease_id, [0], [True], 0.0, now),),
            untrackable=(m.UntrackableReport(lease_id, 3),),
        )  # fmt: skip
    assert not host.columns("a").known.any()
    assert host.statistics.clients[7].untrackable == host.statistics.clients[8].untrackable == {}
    host.sampled([(7, ADDRESS, now), (8, ADDRESS, now)])
    assert host.statistics.costs[Rung.PERF].samples == 0
    host.release(mine)
    host.report(7, windows=(window(mine.id, [0], [True], now - 0.1, now),))
    assert not host.columns("b").known.any()


def test_what_a_client_says_of_its_refusal_is_kept_short(host: Host) -> None:
    host.open(7, "a")
    host.report(7, refused="x" * 1_000_000)
    assert len(host.statistics.clients[7].refused) == 500


def test_samples_are_counted_where_the_process_had_its_model_then(host: Host) -> None:
    before = time.monotonic()
    lease = host.open(7, "a")
    host.mapped(lease, before)
    now = time.monotonic()
    host.sampled([
        (7, ADDRESS, now), (7, ADDRESS + 3 * PAGE_BYTES + 5, now), (7, ADDRESS + 3 * PAGE_BYTES, now),
        (7, ADDRESS + 6 * PAGE_BYTES, now), (8, ADDRESS, now), (7, ADDRESS, before - 1),
    ])  # fmt: skip
    cost = host.statistics.costs[Rung.PERF]
    assert (cost.samples, cost.foreign) == (3, 3)
    columns = host.columns("a")
    assert columns.observed.tolist() == [1, 0, 0, 2, 0, 0]
    assert columns.known.all()
    assert (columns.rate == 0).tolist() == [False, True, True, False, True, True]
    assert not host.columns("b").known.any(), "nobody has it mapped, so nobody watched it"


def test_a_process_number_that_is_used_again_means_the_later_process(host: Host) -> None:
    first = host.open(7, "a")
    host.mapped(first, time.monotonic())
    early = time.monotonic()
    host.release(first)
    between = time.monotonic()
    second = host.open(7, "b")
    host.mapped(second, time.monotonic())
    late = time.monotonic()
    host.sampled([(7, ADDRESS, early), (7, ADDRESS, between), (7, ADDRESS, late), (7, ADDRESS + PAGE_BYTES, late)])
    assert host.columns("b").observed.tolist() == [1, 1, 0, 0, 0, 0]
    cost = host.statistics.costs[Rung.PERF]
    assert (cost.samples, cost.foreign) == (3, 1)


def test_a_mapping_ends_with_its_lease_while_its_process_goes_on(host: Host) -> None:
    first, second = host.open(7, "a"), host.open(7, "b")
    host.mapped(first, time.monotonic())
    host.mapped(second, time.monotonic(), ADDRESS + 8 * PAGE_BYTES)
    host.release(first)
    now = time.monotonic()
    host.sampled([(7, ADDRESS, now), (7, ADDRESS + 8 * PAGE_BYTES, now)])
    cost = host.statistics.costs[Rung.PERF]
    assert (cost.samples, cost.foreign) == (1, 1)
    assert host.columns("b").observed.tolist() == [1, 0, 0, 0, 0, 0]


def test_mappings_that_ended_long_ago_are_forgotten_also_where_nothing_takes_samples(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        lease = host.open(7, "a")
        host.mapped(lease, time.monotonic())
        host.release(lease)
    assert len(host.statistics._book._processes[7].events) > 5
    later = time.monotonic() + 2 * statistics._REMEMBERED_S
    monkeypatch.setattr(statistics.time, "monotonic", lambda: later)
    monkeypatch.setattr(statistics.time, "monotonic_ns", lambda: int(later * 1e9))
    host.release(host.open(8, "a"))
    assert len(host.statistics._book) == 0


def test_a_removed_model_starts_anew(host: Host) -> None:
    lease, now = host.open(7, "a"), time.monotonic()
    host.report(7, windows=(window(lease.id, [0], [True], now - 0.1, now),))
    host.release(lease)
    assert host.columns("a").known.any(), "heat outlives its readers"
    host.statistics.forget(host.records["a"])
    assert not host.columns("a").known.any()


def test_what_happens_is_told_in_order(host: Host) -> None:
    watcher = host.journal.watch(lambda: None)
    now = time.monotonic()
    lease = host.open(7, "a")
    host.report(
        7, mapped=(m.MappedReport(lease.id, ADDRESS, now),), agent_s=0.5,
        windows=(window(lease.id, [0, 4], [False, True], now - 0.1, now),),
    )  # fmt: skip
    host.sampled([(7, ADDRESS, now), (7, 5, now)])
    host.release(lease)
    told = frames_of(watcher.take()[0])
    kinds = [frame["kind"] for frame in told]
    assert kinds == ["model", "open", "map", "bits", "counters", "events", "samples", "unmap", "release"]
    by_kind = {frame["kind"]: frame for frame in told}
    assert (by_kind["map"]["address"], by_kind["map"]["pages"], by_kind["map"]["time_s"]) == (ADDRESS, 6, now)
    assert np.frombuffer(by_kind["bits"]["pages"], "<i4").tolist() == [0, 4]
    assert by_kind["bits"]["touched"] == b"\2"
    assert by_kind["counters"]["values"] == {"sampler_s": 0.5, "fault_s": 0.0, "client_s": 0.0}
    assert len(by_kind["samples"]["data"]) == SAMPLE.itemsize, "the address in no model is not told"


def test_state_says_what_is_open_and_mapped(host: Host) -> None:
    first, second = host.open(7, "a"), host.open(8, "b")
    host.mapped(first, 1.0)
    told = [frames_of(data)[0] for data in host.statistics.state(host.records.values(), host.leases)]
    assert [(frame["kind"], frame.get("lease")) for frame in told] == [
        ("model", None), ("model", None), ("open", first.id), ("open", second.id), ("map", first.id),
    ]  # fmt: skip


class Statistics(RuleBasedStateMachine):
    """Opens, closes, reports, samples and removals in any order; the structures agree after each."""

    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.watcher = self.host.journal.watch(lambda: None)

    @rule(target=leases, pid=st.sampled_from([7, 8]), name=st.sampled_from("ab"))
    def opened(self, pid: int, name: str) -> Lease:
        return self.host.open(pid, name)

    @rule(lease=consumes(leases))
    def released(self, lease: Lease) -> None:
        self.host.release(lease)

    @rule(pid=st.sampled_from([7, 8]))
    def ended(self, pid: int) -> None:
        for lease in self.host.leases.of_session(self.host.sessions[pid]):
            self.host.release(lease)

    @rule(
        lease=leases, pid=st.sampled_from([7, 8]), page=st.integers(-1, 6), ago_s=st.floats(-2, 1),
        address=st.sampled_from([ADDRESS, ADDRESS + PAGE_BYTES, -1]), untrackable=st.integers(-1, 7),
        rung=st.sampled_from(["present", "accessed", "perf"]),
    )  # fmt: skip
    def reported(
        self, lease: Lease, pid: int, page: int, ago_s: float, address: int, untrackable: int, rung: str
    ) -> None:
        end_s = time.monotonic() - ago_s
        before = self.host.columns("a").known.sum() + self.host.columns("b").known.sum()
        try:
            self.host.report(
                pid, rung=rung, mapped=(m.MappedReport(lease.id, address, end_s),),
                windows=(window(lease.id, [page], [True], end_s - 0.1, end_s),),
                untrackable=(m.UntrackableReport(lease.id, untrackable),),
            )  # fmt: skip
        except ProtocolError:
            assert self.host.columns("a").known.sum() + self.host.columns("b").known.sum() == before
        else:
            assert rung == "perf" or lease.session.pid != pid or lease not in list(self.host.leases) or 0 <= page < 6

    @rule(page=st.integers(0, 7), pid=st.sampled_from([7, 8]))
    def sampled(self, page: int, pid: int) -> None:
        self.host.sampled([(pid, ADDRESS + page * PAGE_BYTES, time.monotonic())])

    @rule(name=st.sampled_from("ab"))
    def forgotten(self, name: str) -> None:
        record = self.host.records[name]
        if not self.host.leases.holders(record.id):
            self.host.statistics.forget(record)

    @invariant()
    def agrees(self) -> None:
        statistics = self.host.statistics
        statistics.check()
        held = {pid: len(self.host.leases.of_session(session)) for pid, session in self.host.sessions.items()}
        assert {pid: client.leases for pid, client in statistics.clients.items()} == {
            p: n for p, n in held.items() if n
        }
        told = [frames_of(data)[0] for data in statistics.state(self.host.records.values(), self.host.leases)]
        open_now = {frame["lease"] for frame in told if frame["kind"] == "open"}
        assert {frame["lease"] for frame in told if frame["kind"] == "map"} <= open_now
        frames_of(self.watcher.take()[0])


TestStatistics = Statistics.TestCase
TestStatistics.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
