"""Reading perf.data: what a file says beside its samples, in which order samples come, and what is refused. That every
field of every sample is right, `perf` itself says in tests/integration/test_perf_script*.py."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import perf_files as made
from tests.perf_files import PEBS, Event, record, to_file, to_pipe
from tiermem.errors import ReadError, RecordingError
from tiermem.perfdata import Exit, Fork, Image, PerfData, read

EVENT = Event(PEBS | made.IDENTIFIER, name="mem-loads")
Reader = Callable[[bytes], PerfData]


@pytest.fixture
def reading(tmp_path: Path) -> Reader:
    def take(data: bytes) -> PerfData:
        path = tmp_path / "perf.data"
        path.write_bytes(data)
        return read(str(path))

    return take


def sample(time: int, addr: int = 0, event: Event = EVENT, **values: int) -> bytes:
    return event.sample({"time": time, "addr": addr, "id": event.ids[0], **values})


def test_side_band_is_told_in_time_order(reading: Reader) -> None:
    data = reading(to_file([EVENT], [
        EVENT.mmap(-1, 0xFFFFFFFF81000000, 1 << 24, "[kernel.kallsyms]_text"),
        EVENT.mmap2(10, 0x7F0000000000, 1 << 21, 4096, "/dev/shm/weights", 1, time=30),
        EVENT.mmap2(10, 0x400000, 4096, 0, "/opt/serve", 5, time=20, build_id=bytes(range(20))),
        EVENT.mmap(10, 0x500000, 4096, "//anon", time=40, data=True),
        EVENT.fork(11, 11, 10, 10, 60), EVENT.fork(10, 12, 10, 10, 50),
        EVENT.exit(10, 12, 70),
        EVENT.fact(2, 1, 5), EVENT.fact(2, 1, 7), EVENT.fact(13, 3), EVENT.fact(13, 100, misc=1 << 15),
        EVENT.fact(5, 0, 1, 1), EVENT.fact(6, 0, 1, 1), EVENT.fact(6, 0, 1, 1),
    ]))  # fmt: skip
    assert data.images == (
        Image(-1, 0, 0xFFFFFFFF81000000, 1 << 24, 0, "[kernel.kallsyms]_text", True),
        Image(10, 20, 0x400000, 4096, 0, "/opt/serve", True),
        Image(10, 30, 0x7F0000000000, 1 << 21, 4096, "/dev/shm/weights", False),
        Image(10, 40, 0x500000, 4096, 0, "//anon", False),
    )
    assert data.forks == (Fork(10, 12, 10, 10, 50), Fork(11, 11, 10, 10, 60))
    assert data.exits == (Exit(10, 12, 70),)
    assert (data.lost, data.lost_samples, data.throttled, data.unthrottled) == (12, 3, 1, 2)
    assert data.build_ids == {"/opt/serve": bytes(range(20)).hex()}
    assert data.notes == ()


def test_a_thread_is_called_like_its_parent_until_it_says_otherwise(reading: Reader) -> None:
    data = reading(to_file([EVENT], [
        EVENT.comm(10, 11, "loader", 80), EVENT.fork(10, 11, 10, 10, 50), EVENT.comm(10, 10, "python", 5),
        EVENT.comm(10, 10, "serve", 40), EVENT.comm(10, 10, "late", 90),
    ]))  # fmt: skip
    assert data.comms == {(10, 10): "late", (10, 11): "loader"}
    told = [data.comm_at(10, 11, time) for time in (49, 50, 79, 80, 1000)]
    assert told == ["", "serve", "serve", "loader", "loader"]
    assert data.comm_at(99, 99, 50) == ""


def test_the_features_are_read(reading: Reader) -> None:
    for data in (to_file([EVENT], [sample(1)]), to_pipe([EVENT], [sample(1)])):
        got = reading(data)
        assert (got.hostname, got.os_release, got.perf_version, got.arch) == ("rack7", "6.18.0", "6.18", "x86_64")
        assert (got.cpus, got.cpu, got.cpuid) == (96, "Some CPU", "GenuineIntel,6,143,8")
        assert (got.memory_bytes, got.command) == (1 << 38, ("/usr/bin/perf", "record", "-d"))
        assert got.events[0].name == "mem-loads"
        assert got.notes == ()


def test_build_ids_come_from_the_feature_and_from_records(reading: Reader) -> None:
    short = bytes(range(8)).ljust(20, b"\0") + b"\x08\0\0\0"
    body = struct.pack("<i", -1) + bytes([7] * 20 + [0] * 4) + made.padded("/lib/a.so")
    sized = struct.pack("<i", 5) + short + made.padded("/lib/b.so")
    both = record(67, body) + record(67, sized, 1 << 15)
    wanted = {"/lib/a.so": "07" * 20, "/lib/b.so": bytes(range(8)).hex()}
    assert reading(to_file([EVENT], [sample(1)], {2: both})).build_ids == wanted
    assert reading(to_pipe([EVENT], [both, sample(1)])).build_ids == wanted


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (Event(PEBS, type=0, config=3), "cache-misses"), (Event(PEBS, type=1, config=5), "minor-faults"),
        (Event(PEBS, type=1, config=77), "software/config=0x4d/"), (Event(PEBS, type=5), "mem:0x3/0"),
        (Event(PEBS, type=8, config=16), "ibs_op/config=0x10/"), (Event(PEBS, type=33), "pmu 33/config=0x1cd/"),
    ],
)  # fmt: skip
def test_an_event_without_a_name_gets_one(reading: Reader, event: Event, name: str) -> None:
    features = {made.PMUS: made.pmus({4: "cpu", 8: "ibs_op"})}
    assert reading(to_file([event], [sample(1, event=event)], features)).events[0].name == name


def test_a_pipe_names_an_event_by_an_update(reading: Reader) -> None:
    update = record(78, made.words([2, 5]) + made.padded("cpu/mem-loads/"))
    events = [EVENT, replace(EVENT, ids=(4, 5))]
    assert [each.name for each in reading(to_pipe(events, [update], {})).events] == [
        "raw/config=0x1cd/",
        "cpu/mem-loads/",
    ]


def test_an_attr_says_what_the_event_is(reading: Reader) -> None:
    event = replace(EVENT, ids=(3, 4), freq=True, period=4000, read_format=4)
    got = reading(to_file([event, replace(EVENT, ids=(9,))], [sample(1)])).events
    assert (got[0].frequency, got[0].period, got[0].precise, got[0].ids) == (4000, 0, 2, (3, 4))
    assert (got[1].frequency, got[1].period, got[1].config1, got[1].read_format) == (0, 1000, 3, 0)
    assert got[0].sample_type == EVENT.sample_type


@pytest.mark.parametrize("nbytes", [64, 72, 80, 96, 104, 112, 120, 128, 136, 200])
def test_attributes_of_any_age_are_read(reading: Reader, nbytes: int) -> None:
    event = replace(EVENT, sample_type=PEBS | made.REGS_INTR, regs_intr=1, name="")
    if nbytes < 104:
        event = replace(event, sample_type=PEBS)
    values = {"time": 5, "addr": 6, "phys_addr": 7, "regs_intr": [2, 9]}
    data = reading(to_file([event], [event.sample(values)], {}, attr_bytes=nbytes))
    assert data.samples[["time", "addr", "phys_addr"]].tolist() == [(5, 6, 7)]
    assert data.events[0].config1 == (3 if nbytes >= 64 else 0)


def test_an_attr_ends_where_it_says(reading: Reader) -> None:
    event = replace(EVENT, sample_type=EVENT.sample_type | made.BRANCH_STACK)
    whole = to_file([event], [event.sample({"time": 5, "id": 1, "branches": [1, 2, 3]})], {}).replace(
        event.attr(), event.attr(72)[:72].ljust(128, b"\xff")
    )
    assert reading(whole).samples["time"].tolist() == [5]
    assert reading(whole).events[0].branch_sample_type == 0


def test_samples_of_all_rings_come_by_time_and_else_as_in_the_file(reading: Reader) -> None:
    times = [30, 10, 20, 10, 30, 5]
    data = reading(to_file([EVENT], [sample(time, addr) for addr, time in enumerate(times)]))
    assert data.samples[["time", "addr"]].tolist() == [(5, 5), (10, 1), (10, 3), (20, 2), (30, 0), (30, 4)]


def test_samples_without_a_time_stay_behind_the_one_before_them(reading: Reader) -> None:
    untimed = replace(EVENT, sample_type=EVENT.sample_type & ~made.TIME, ids=(2,))
    data = reading(to_file([EVENT, untimed], [
        sample(0, 1, untimed), sample(30, 2), sample(0, 3, untimed), sample(10, 4), sample(0, 5, untimed),
    ]))  # fmt: skip
    assert data.samples["addr"].tolist() == [1, 4, 5, 2, 3]
    assert data.samples["event"].tolist() == [1, 0, 1, 0, 1]


def test_a_period_that_all_samples_share_is_that_of_the_attr(reading: Reader) -> None:
    shared = replace(EVENT, sample_type=EVENT.sample_type & ~made.PERIOD, period=64)
    assert reading(to_file([shared], [sample(1, event=shared)])).samples["period"].tolist() == [64]
    assert reading(to_file([EVENT], [sample(1, period=5)])).samples["period"].tolist() == [5]


@given(st.data())
@settings(max_examples=30, deadline=None, database=None)
def test_any_order_of_pieces_gives_the_rows_in_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    times = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=60))
    rounds = data.draw(st.sets(st.integers(0, 60)))
    records = []
    for addr, time in enumerate(times):
        records += (
            [record(68)] * (addr in rounds) + [EVENT.comm(1, 1, "x", time)] * (addr % 7 == 0) + [sample(time, addr)]
        )
    path = tmp_path_factory.getbasetemp() / "any.data"
    path.write_bytes(data.draw(st.sampled_from([to_file, to_pipe]))([EVENT], records))
    rows = read(str(path)).samples[["time", "addr"]].tolist()
    assert rows == sorted(zip(times, range(len(times)), strict=True))


def test_many_records_of_one_size_change_size(reading: Reader) -> None:
    """Runs of equal records are found together; what differs within or behind one must not be."""
    chained = replace(EVENT, sample_type=EVENT.sample_type | made.CALLCHAIN)
    sizes = [0] * 300 + [1, 0, 2] + [3] * 5000 + [0] * 40
    records = [chained.sample({"id": 1, "time": n, "callchain": [n] * size}) for n, size in enumerate(sizes)]
    nbytes = len(records[5000])
    records[5000] = record(3, bytes(nbytes - 8))  # as long as its neighbours, and of another type
    trace = made.words([16, 0, 0]).ljust(nbytes - 8, b"\0")
    records[4000] = record(71, trace) + bytes(16)  # that long too, and no records behind it
    data = reading(to_file([chained], records))
    assert data.samples["time"].tolist() == [n for n in range(len(sizes)) if n not in (4000, 5000)]
    assert (0, 0) in data.names


def test_trailers_that_differ_are_told_apart_by_id(reading: Reader) -> None:
    bare = Event(made.IDENTIFIER | made.IP, ids=(2,))
    data = reading(to_file([EVENT, bare], [bare.comm(7, 7, "b" * 15), EVENT.comm(8, 8, "a", 33)]))
    assert data.names == {(7, 7): ((0, "b" * 15),), (8, 8): ((33, "a"),)}


def test_what_is_skipped_is_noted(reading: Reader) -> None:
    stranger = replace(EVENT, ids=(99,))
    data = reading(to_file([EVENT, replace(EVENT, ids=(2,))], [
        sample(1), sample(2, event=stranger), record(40, bytes(24)), record(200, bytes(8)), record(200, bytes(8)),
        made.auxtrace(b"intel" * 9), sample(3),
    ]))  # fmt: skip
    assert data.samples["time"].tolist() == [1, 3]
    assert set(data.notes) == {
        "1 samples have ids of no event of the file and were skipped", "1 records of type 40 were skipped",
        "2 records of type 200 were skipped", "1 records of type 71 were skipped",
    }  # fmt: skip


def test_bytes_that_are_no_records_are_passed_over(reading: Reader) -> None:
    noise = bytes(range(1, 256)) * 3
    data = reading(to_pipe([EVENT], [sample(1), made.auxtrace(noise), sample(2)], tracing=noise))
    assert data.samples["time"].tolist() == [1, 2]


def test_events_may_come_between_records_of_a_pipe(reading: Reader) -> None:
    second = replace(EVENT, ids=(2,), sample_type=EVENT.sample_type | made.CALLCHAIN)
    late = record(64, second.attr() + made.words(second.ids))
    data = reading(to_pipe([EVENT], [sample(1), late, sample(2, event=second), sample(3)], {}))
    assert data.samples[["time", "event"]].tolist() == [(1, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize("kind", [81, 83])
def test_records_may_lie_across_compressed_ones(reading: Reader, kind: int) -> None:
    pytest.importorskip("zstandard")
    plain = b"".join(sample(n) for n in range(1, 200))
    stream = made.Zstd(kind)
    packed = [stream.record(plain[at : at + 333]) for at in range(0, len(plain), 333)]
    data = reading(to_file([EVENT], [EVENT.comm(1, 1, "x"), *packed]))
    assert data.samples["time"].tolist() == list(range(1, 200))
    assert data.notes == ()
    assert "within one: its" in reading(to_file([EVENT], packed[:-1])).notes[0]


def test_a_zstd_bomb_is_refused(reading: Reader) -> None:
    stream = made.Zstd()
    with pytest.raises(RecordingError, match="unpack to more than"):
        reading(to_file([EVENT], [stream.record(struct.pack("<IHH", 3, 0, 32768).ljust(32768, b"\0") * 3000)]))


def test_compressed_within_compressed_is_refused(reading: Reader) -> None:
    inner = made.Zstd().record(sample(1))
    with pytest.raises(RecordingError, match="type 81 is within compressed"):
        reading(to_file([EVENT], [made.Zstd().record(inner)]))


def test_without_zstandard_the_error_says_what_to_install(reading: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    data = to_file([EVENT], [made.Zstd().record(sample(1))])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(RecordingError, match=r"pip install 'tiermem\[report\]'"):
        reading(data)


def test_a_file_gives_what_is_whole_of_it_wherever_it_ends(reading: Reader) -> None:
    samples = [sample(n) for n in range(1, 6)]
    whole = to_file([EVENT], samples)
    begin = struct.unpack_from("<Q", whole, 40)[0]
    for end in range(begin, begin + 5 * len(samples[0]), 7):
        data = reading(whole[:end])
        assert data.samples["time"].tolist() == list(range(1, 1 + (end - begin) // len(samples[0])))
        assert (
            f"{begin + 5 * len(samples[0]) - end} of {5 * len(samples[0])} bytes of records are missing"
            in data.notes[0]
        )
        assert len(data.notes) == 1 + bool((end - begin) % len(samples[0]))
    for end in range(0, begin, 16):
        with pytest.raises(RecordingError):
            reading(whole[:end])
    for end in range(begin + 5 * len(samples[0]), len(whole), 64):
        data = reading(whole[:end])
        assert len(data.samples) == 5
        assert data.notes


def test_a_recording_that_was_killed_is_read_to_its_end(reading: Reader) -> None:
    whole = bytearray(to_file([EVENT], [sample(1), sample(2)], {}))
    whole[48:56] = bytes(8)
    data = reading(bytes(whole))
    assert data.samples["time"].tolist() == [1, 2]
    assert "ended before" in data.notes[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no perf.data"), (b"\x7fELF" + bytes(200), "no perf.data"), (b"PERFILE2", "ends within its header"),
        (b"2ELIFREP" + bytes(200), "big-endian"), (b"PERFFILE" + bytes(200), "first version"),
        (b"PERFILE2" + struct.pack("<Q", 80) + bytes(200), "header of 80 bytes"),
        (b"PERFILE2" + struct.pack("<Q", 104) + bytes(200), "one to 65536 events"),
        (to_pipe([], [sample(1)], {}), "before the first event"),
        (to_pipe([EVENT], [bytes(8)]), "says that it has 0 bytes"),
        (to_pipe([EVENT], [record(9, bytes(8))]), "makes no sense"),
        (to_pipe([EVENT], [record(1, bytes(56))]), "ends after 64 bytes"),
        (to_pipe([EVENT], [record(71, bytes(8))]), "too short"),
        (to_pipe([Event(1 << 40)], [record(9)]), "fields that are not known here"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_in_words(reading: Reader, data: bytes, words: str) -> None:
    with pytest.raises(RecordingError, match=words):
        reading(data)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="No such file"):
        read(str(tmp_path / "none"))
    with pytest.raises(RecordingError, match="no regular file"):
        read(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RecordingError, match="no regular file"):
        read(str(tmp_path / "fifo"))


def test_a_damaged_feature_costs_only_itself(reading: Reader) -> None:
    features = made.facts([EVENT]) | {made.HOSTNAME: struct.pack("<I", 1 << 31), made.CMDLINE: b"\xff\xff\xff\xff"}
    data = reading(to_file([EVENT], [sample(1)], features))
    assert (data.hostname, data.command, data.arch, len(data.samples)) == ("", (), "x86_64", 1)
    assert ["HOSTNAME" in data.notes[0], "CMDLINE" in data.notes[1]] == [True, True]


SPE = Event(
    made.IP | made.TID | made.TIME | made.CPU | made.IDENTIFIER, type=9, config=0, name="arm_spe_0//", period=512
)


def spe(*records: bytes, conversion: bool = True) -> bytes:
    begin = [made.auxtrace_info(4, 9, 0)] + [made.time_conv(0, 2, 1000)] * conversion
    return to_file([SPE], [*begin, *records])


def test_spe_samples_are_those_of_who_ran_on_the_cpu(reading: Reader) -> None:
    ticks = [100, 200, 300, 400]
    trace = b"".join(made.spe_record(pc=1, va=0x1000 + n, ticks=tick) for n, tick in enumerate(ticks))
    ran = [SPE.start(50, 51, cpu=2, time=1400), SPE.start(60, 61, cpu=2, time=1700), SPE.start(70, 71, cpu=3, time=0)]
    data = reading(spe(*ran, made.auxtrace(trace, cpu=2)))
    assert data.samples[["time", "pid", "tid", "cpu"]].tolist() == [
        (1200, 0, 0, 2), (1400, 50, 51, 2), (1600, 50, 51, 2), (1800, 60, 61, 2),
    ]  # fmt: skip
    assert [event.name for event in data.events] == ["arm_spe_0//", "arm_spe"]
    assert set(data.samples["event"].tolist()) == {1}
    assert set(data.samples["period"].tolist()) == {512}


def test_spe_samples_of_a_thread_and_of_contexts_find_their_process(reading: Reader) -> None:
    own = made.spe_record(pc=1, va=0x1000, ticks=1)
    told = made.spe_record(pc=1, va=0x2000, ticks=2, context=82)
    facts = [SPE.comm(80, 81, "one"), SPE.fork(80, 82, 80, 81, 5)]
    data = reading(spe(*facts, made.auxtrace(own + told, tid=81)))
    assert data.samples[["pid", "tid"]].tolist() == [(80, 81), (80, 82)]


def test_spe_without_a_clock_keeps_ticks_and_says_so(reading: Reader) -> None:
    data = reading(spe(made.auxtrace(made.spe_record(pc=1, va=0x1000, ticks=77), cpu=0), conversion=False))
    assert data.samples["time"].tolist() == [77]
    assert "ticks" in data.notes[0]


def test_spe_buffers_are_read_across_pieces(reading: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.perfdata.reader._PIECE", 61)
    trace = b"".join(made.spe_record(pc=1, va=0x1000 + n, ticks=n) for n in range(50))
    data = reading(spe(made.auxtrace(trace, cpu=0), made.auxtrace(trace[:-3], cpu=0), SPE.comm(1, 1, "behind")))
    addresses = data.samples["addr"].tolist()
    assert sorted(addresses) == sorted([*range(0x1000, 0x1032), *range(0x1000, 0x1031)])
    assert data.comms == {(1, 1): "behind"}


def test_a_trace_of_nothing_is_counted_and_dropped(reading: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.perfdata.reader._PIECE", 8192)
    endless = b"\xb0" + bytes(8)  # an address packet: the record that it opens never ends
    data = reading(spe(made.auxtrace(endless * 4096, cpu=0), SPE.comm(1, 1, "behind")))
    assert len(data.samples) == 0
    assert "of trace data are no packets" in data.notes[-1]
    assert data.comms == {(1, 1): "behind"}


def test_threads_that_switch_in_are_those_whose_samples_follow(reading: Reader) -> None:
    trace = b"".join(made.spe_record(pc=1, va=0x1000, ticks=tick) for tick in (100, 200))
    came = SPE.fact(14, pid=50, tid=51, cpu=0, time=1000)
    left = SPE.fact(14, pid=50, tid=51, cpu=0, time=1300, misc=1 << 13)
    wide = record(15, struct.pack("<II", 50, 51) + SPE.trailer(pid=60, tid=61, cpu=0, time=1350))
    data = reading(spe(came, left, wide, made.auxtrace(trace, cpu=0)))
    assert data.samples[["pid", "tid"]].tolist() == [(50, 51), (60, 61)]


def test_pieces_change_nothing(reading: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [EVENT.comm(1, 1, "x"), *(sample(n, n * 7) for n in range(100)), made.auxtrace(bytes(500)), sample(200)]
    whole = reading(to_pipe([EVENT], records))
    for nbytes in (16, 100, 257):
        monkeypatch.setattr("tiermem.perfdata.reader._PIECE", nbytes)
        assert np.array_equal(reading(to_pipe([EVENT], records)).samples, whole.samples)
