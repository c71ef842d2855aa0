"""The reader of perf.data files against `perf script`: hand-made files of the hardware that this host lacks (PEBS, IBS,
SPE), in every layout of a sample. perf reads the same bytes, and so vouches for the files too."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import perf_files as made
from tests import perf_script
from tests.perf_files import PEBS, Event, record
from tiermem.perfdata import PerfData, read

pytestmark = perf_script.needs_perf

DATA_SOURCES = (0x68100142, 0x1E05080021, 0x68100242, 0x6A100442, 0)
"""Few, because perf cuts the long texts of some off, and with them the blank before the next column."""
PAGE_SIZES = (0, 4096, 2 << 20, 1 << 30)
EVERYTHING = (1 << 24) - 1 & ~made.WEIGHT
LAYOUTS = {
    "PEBS": Event(PEBS),
    "identifier": Event(PEBS | made.IDENTIFIER),
    "id": Event(PEBS | made.ID),
    "both ids": Event(PEBS | made.ID | made.IDENTIFIER | made.STREAM_ID),
    "weight": Event(PEBS & ~made.WEIGHT_STRUCT | made.WEIGHT),
    "no weight": Event(PEBS & ~made.WEIGHT_STRUCT),
    "address": Event(made.IP | made.TID | made.TIME | made.ADDR),
    "no time": Event(PEBS & ~made.TIME),
    "chain": Event(PEBS | made.CALLCHAIN),
    "page sizes": Event(PEBS | made.DATA_PAGE_SIZE | made.CODE_PAGE_SIZE),
    "cgroup": Event(PEBS | made.CGROUP | made.DATA_PAGE_SIZE),
    "transaction": Event(PEBS | made.TRANSACTION),
    "branches": Event(PEBS | made.BRANCH_STACK),
    "branches, index": Event(PEBS | made.BRANCH_STACK, branch_sample_type=made.HW_INDEX),
    "registers": Event(PEBS | made.REGS_USER | made.REGS_INTR, regs_user=0xFF0FFF, regs_intr=0x3),
    "stack": Event(PEBS | made.STACK_USER),
    "read": Event(PEBS | made.READ | made.ID, read_format=4),
    "read with times": Event(PEBS | made.READ | made.ID, read_format=7),
    "group": Event(PEBS | made.READ | made.ID, read_format=4 | made.GROUP),
    "trace": Event(PEBS | made.AUX | made.CODE_PAGE_SIZE),
    "IBS": Event(PEBS | made.RAW | made.DATA_PAGE_SIZE, type=8, config=0, name="ibs_op//"),
    "everything": Event(EVERYTHING | made.WEIGHT_STRUCT, read_format=4, branch_sample_type=made.HW_INDEX,
                        regs_user=0xF, regs_intr=0xFF),
    "by frequency": Event(PEBS, freq=True),
    "no trailer": Event(PEBS, sample_id_all=False),
}  # fmt: skip
FIELDS = {
    made.TIME: "time", made.CPU: "cpu", made.ADDR: "addr", made.DATA_SRC: "data_src", made.PHYS_ADDR: "phys_addr",
    made.DATA_PAGE_SIZE: "data_page_size", made.CODE_PAGE_SIZE: "code_page_size", made.WEIGHT: "weight",
    made.WEIGHT_STRUCT: "weight",
}  # fmt: skip


def values(event: Event, source: random.Random) -> dict[str, object]:
    """One sample's fields, whatever the event takes of them."""
    chain = [source.getrandbits(47) for _ in range(source.randrange(5))]
    read = [source.getrandbits(30) for _ in range((event.read_format & 7).bit_count())]
    read = [1, *read, event.ids[0]] if event.read_format & made.GROUP else [*read, event.ids[0]]
    abi, narrow = source.choice((0, 2)), not event.sample_type & made.WEIGHT
    registers = lambda mask: [2, *(source.getrandbits(64) for _ in range(mask.bit_count()))] if abi else []  # noqa: E731
    return {
        "id": event.ids[-1], "stream_id": event.ids[0], "ip": source.getrandbits(47), "pid": source.choice((10, 20)),
        "tid": source.choice((10, 11, 20)), "time": 10**9 + source.randrange(500), "addr": source.getrandbits(64),
        "cpu": source.randrange(64), "period": source.randrange(1, 1 << 40), "read": read, "callchain": chain,
        "raw": source.randbytes(source.choice((4, 12, 92))), "branches": [7] * 3 * source.randrange(4), "hw_index": 5,
        "regs_user": registers(event.regs_user), "regs_intr": registers(event.regs_intr),
        "stack": bytes(8 * source.randrange(8)), "weight": source.getrandbits(32),
        "weight2": source.getrandbits(16) * narrow, "weight3": source.getrandbits(16) * narrow,
        "data_src": source.choice(DATA_SOURCES),
        "transaction": 3, "phys_addr": source.getrandbits(52), "cgroup": 9, "aux": bytes(8 * source.randrange(3)),
        "data_page_size": source.choice(PAGE_SIZES), "code_page_size": source.choice(PAGE_SIZES),
    }  # fmt: skip


def recording(*events: Event, count: int = 60) -> list[bytes]:
    """Records out of order, as rings deliver them, with the same time more than once."""
    source = random.Random(count)
    first = events[0]
    begin = [first.comm(10, 10, "serve"), first.comm(10, 11, "worker"), first.comm(20, 20, "other")]
    begin.append(first.mmap2(10, 0x400000, 1 << 20, 0, "/opt/serve", 5))
    samples = [
        (event := source.choice(events)).sample(values(event, source), source.choice((1, 2))) for _ in range(count)
    ]
    return begin + samples[: count // 2] + [record(68)] + samples[count // 2 :] + [record(68)]


def fields_of(*events: Event) -> list[str]:
    """What perf can print of all these events."""
    common = -1
    for event in events:
        common &= event.sample_type
    fields = ["pid", "event", "misc", *{name for bit, name in FIELDS.items() if common & bit}]
    if common & made.WEIGHT_STRUCT:
        fields.append("ins_lat")
    if not any(event.sample_type & made.CALLCHAIN for event in events):
        fields.append("ip")
    if not any(event.sample_type & made.READ for event in events):  # perf puts the difference of the counts there
        fields.append("period")
    return fields


def compare(data: PerfData, said: list[dict[str, Any]]) -> None:
    assert data.notes == ()
    assert len(said) == len(data.samples) > 0
    for name in said[0]:
        column = data.samples[name].tolist()
        if name == "event":
            column = [data.events[number].name for number in column]
        assert [row[name] for row in said] == column, name


MODES = [("file", name) for name in LAYOUTS]
MODES += [("pipe", "PEBS"), ("pipe", "both ids"), ("pipe", "identifier")]
MODES += [("compressed", "PEBS"), ("compressed", "both ids"), ("compressed", "everything")]


@pytest.mark.parametrize(("mode", "name"), MODES)
def test_perf_prints_the_same_samples(tmp_path: Path, mode: str, name: str) -> None:
    event = replace(LAYOUTS[name], name=LAYOUTS[name].name or "mem-loads")
    records = recording(event)
    path = tmp_path / "perf.data"
    if mode == "compressed":
        pytest.importorskip("zstandard")
        stream, middle = made.Zstd(), b"".join(records[4:])
        packed = [stream.record(middle[at : at + 1001]) for at in range(0, len(middle), 1001)]  # across records
        features = made.facts([event]) | {made.COMPRESSED_FEATURE: made.compressed_feature()}
        path.write_bytes(made.to_file([event], records[:4] + packed, features))
    else:
        path.write_bytes((made.to_pipe if mode == "pipe" else made.to_file)([event], records))
    said = perf_script.samples(path, fields_of(event), pipe=mode == "pipe")
    if not event.sample_id_all:  # without times of the other records, perf leaves samples in the order of the file
        said.sort(key=lambda row: row["time"])
    compare(read(str(path)), said)


MIXED = {
    "identifier": [
        Event(PEBS | made.IDENTIFIER, ids=(5, 6), name="mem-loads"),
        Event(PEBS | made.IDENTIFIER | made.CALLCHAIN, ids=(7,), name="mem-stores", config=0x2CD),
        Event(made.IP | made.TID | made.TIME | made.CPU | made.IDENTIFIER, ids=(1 << 40,), name="branches", config=9),
        Event(EVERYTHING | made.WEIGHT_STRUCT, ids=(9, 10, 11), name="all", type=8, read_format=4),
    ],
    "id": [
        Event(PEBS | made.ID, ids=(5, 6), name="mem-loads"),
        Event(PEBS | made.ID | made.RAW, ids=(7,), name="ibs_op//", type=8),
    ],
}


@pytest.mark.parametrize("name", MIXED)
def test_perf_tells_the_same_events_apart(tmp_path: Path, name: str) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(made.to_file(MIXED[name], recording(*MIXED[name], count=200)))
    data = read(str(path))
    assert set(data.samples["event"].tolist()) == set(range(len(MIXED[name])))
    compare(data, perf_script.samples(path, fields_of(*MIXED[name])))


def test_perf_makes_the_same_samples_of_spe(tmp_path: Path) -> None:
    source = random.Random(1)
    event = Event(
        made.IP | made.TID | made.TIME | made.CPU | made.IDENTIFIER, type=9, config=0, name="arm_spe_0//", period=1024
    )
    ticks = iter(range(1000, 10_000, 7))
    buffers = [
        b"".join(
            made.spe_record(
                pc=source.getrandbits(47), va=source.getrandbits(47), pa=source.getrandbits(47), ticks=next(ticks),
                context=71 + cpu, total=source.getrandbits(12), issue=1, translation=2, events=0x12, store=bool(n % 2),
            )
            for n in range(50)
        )
        for cpu in (0, 1, 0)
    ]  # fmt: skip
    records = [
        event.comm(70, 71, "one"), event.comm(70, 72, "two"), made.time_conv(3, 1000, 12345),
        made.auxtrace_info(4, 9, 0), made.auxtrace(buffers[0], cpu=0), made.auxtrace(buffers[1], cpu=1),
        made.auxtrace(buffers[2], cpu=0, offset=len(buffers[0])),
        *(event.fact(11, 0, len(buffers[0]), 0, pid=70, tid=71 + cpu, cpu=cpu, time=1 << 40) for cpu in (0, 1)),
    ]  # fmt: skip
    features = made.facts([event], "aarch64") | {18: bytes(8), made.CPUID: made.string("0x00000000410fd0c0")}
    path = tmp_path / "perf.data"
    path.write_bytes(made.to_file([event], records, features))
    data = read(str(path))
    fields = ("pid", "cpu", "time", "addr", "weight", "ip", "phys_addr", "data_src")
    said = perf_script.samples(path, fields, options=["--itrace=M"])
    for row in said:
        del row["data_src"]  # perf makes one up of the events; ours is the packet's
    compare(data, said)
    assert {data.events[number].name for number in data.samples["event"]} == {"arm_spe"}
    assert set(data.samples["period"].tolist()) == {1024}
