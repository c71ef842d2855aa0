"""Damaged perf.data files, ten thousand of them: each is refused by RecordingError or read, soon, in little memory."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import perf_files as made
from tests.perf_files import PEBS, Event, record
from tiermem.errors import RecordingError
from tiermem.perfdata import read

MUTATIONS = 10_000
LIMITED = 2_000
ROOM = 1 << 30
"""Bytes that reading a file of some kilobytes may take of address space."""
LOADS = Event(PEBS | made.IDENTIFIER, ids=(5, 6), name="mem-loads")
EXTREMES = {
    1: (0, 1, 0x7F, 0x80, 0xFF), 2: (0, 1, 7, 8, 0x7FFF, 0xFFFF), 4: (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 64, 71, 81, 83),
    8: (0, 1, 8, 16, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8),
}  # fmt: skip


def bases() -> list[bytes]:
    """Files that between them have everything that is read."""
    chains = Event(PEBS | made.IDENTIFIER | made.CALLCHAIN | made.RAW | made.READ, ids=(7,), type=8, read_format=12)
    rest = Event((1 << 25) - 1 & ~made.WEIGHT, ids=(9,), read_format=4, regs_user=3, regs_intr=7)
    spe = Event(made.IP | made.TID | made.TIME | made.CPU | made.IDENTIFIER, type=9, config=0, name="arm_spe_0//")
    events = [LOADS, chains, rest]
    beside = [
        LOADS.comm(10, 10, "serve"), LOADS.mmap2(10, 0x400000, 4096, 0, "/opt/serve", 5, build_id=bytes(20)),
        LOADS.mmap(-1, 1 << 63, 4096, "[kernel]"), LOADS.fork(10, 11, 10, 10, 5), LOADS.exit(10, 11, 9),
        LOADS.fact(2, 1, 5), LOADS.fact(13, 1), LOADS.start(1, 2, cpu=0, time=1), record(68), record(79, bytes(40)),
    ]  # fmt: skip
    samples = [
        event.sample({"id": event.ids[0], "time": 10**6 + n, "pid": 10, "callchain": range(n % 4), "raw": b"ibs",
                      "read": (1, 5, 7) if event is chains else (5, 9), "stack": bytes(16), "branches": [1, 2, 3]})
        for n in range(4) for event in events
    ]  # fmt: skip
    trace = b"".join(made.spe_record(pc=1, va=n, ticks=n, context=7) for n in range(8))
    stream, packed_stream = made.Zstd(), made.Zstd(83)
    plain = b"".join(samples)
    named = record(78, made.words([2, 5, 0x41]))
    traced = [
        spe.comm(7, 7, "x"), made.auxtrace_info(4, 9, 0), made.time_conv(3, 5, 7), made.auxtrace(trace, cpu=0),
        spe.start(7, 7, cpu=0, time=1), made.auxtrace(trace, tid=7),
    ]  # fmt: skip
    cuts = [plain[at : at + 300] for at in range(0, len(plain), 300)]
    ids = record(67, bytes(28) + made.padded("/lib/x.so"))
    features = made.facts(events) | {2: ids, made.SAMPLE_TIME: bytes(16)}
    return [
        made.to_file(events, beside + samples, features),
        made.to_file([LOADS], beside + samples[::3], {}, attr_bytes=96),
        made.to_pipe(events, [named, ids, *beside, *samples], features, tracing=bytes(20)),
        made.to_file(events, beside + [stream.record(cut) for cut in cuts]),
        made.to_pipe(events, beside + [packed_stream.record(cut) for cut in cuts], {}),
        made.to_file([spe], traced, {}),
    ]


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Damage of every kind, half of it near the start, where the lengths of everything are."""
    source, originals = random.Random(seed), bases()
    for _ in range(count):
        data = bytearray(source.choice(originals))
        for _ in range(source.choice((1, 1, 2, 8))):
            at = source.randrange(min(len(data), 120) if source.random() < 0.3 else len(data))
            match source.randrange(6):
                case 0:
                    data[at] ^= 1 << source.randrange(8)
                case 1:
                    del data[at:]
                case 2 | 3:
                    width = source.choice((1, 2, 4, 8))
                    at -= at % width
                    value = source.choice(EXTREMES[width]).to_bytes(width, "little")
                    data[at : at + width] = value[: len(data) - at]
                case 4:
                    begin = source.randrange(len(data)) & ~7
                    data[at & ~7 : at & ~7] = data[begin : begin + source.choice((8, 64, 512))]
                case _:
                    del data[at & ~7 : (at & ~7) + source.choice((8, 16, 64))]
            if not data:
                break
        yield bytes(data)


def read_all(files: Iterator[bytes]) -> tuple[int, int]:
    """How many were read and how many refused; anything else is raised."""
    outcomes = [0, 0]
    fd = os.memfd_create("mutant")
    try:
        for data in files:
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
            started = time.thread_time()
            try:
                read(f"/proc/self/fd/{fd}")
                outcomes[0] += 1
            except RecordingError:
                outcomes[1] += 1
            assert time.thread_time() - started < 2
    finally:
        os.close(fd)
    return outcomes[0], outcomes[1]


def test_the_files_are_sound_before_they_are_damaged() -> None:
    pytest.importorskip("zstandard")
    assert read_all(iter(bases())) == (6, 0)


def test_damage_is_refused_or_read() -> None:
    pytest.importorskip("zstandard")
    good, refused = read_all(mutants(1, MUTATIONS))
    assert good + refused == MUTATIONS
    assert min(good, refused) > MUTATIONS // 10  # both ways were taken


def test_damage_takes_little_memory() -> None:
    """In a process of its own, which cannot have more address space than a file of some kilobytes may ask for."""
    pytest.importorskip("zstandard")
    code = (
        "import resource, sys, numpy, zstandard; from tests.hostile import test_perfdata as t\n"
        "t.read_all(iter(t.bases()))\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {ROOM}, used + {ROOM}))\n"
        f"assert sum(t.read_all(t.mutants(2, {LIMITED}))) == {LIMITED}\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def attrs_of(count: int, ids_at: int, ids_bytes: int) -> bytes:
    """A file whose events all point to the same ids."""
    attrs = (LOADS.attr() + struct.pack("<QQ", ids_at, ids_bytes)) * count
    header = struct.pack("<8sQQQQQQQQ", b"PERFILE2", 104, 144, 104, len(attrs), 104 + len(attrs), 8, 0, 0)
    return header + bytes(32) + attrs + record(68)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (attrs_of(60_000, 0, 1 << 20), "damaged"),
        (attrs_of(70_000, 0, 0), "one to 65536 events"),
        (made.to_pipe([LOADS], [record(64, LOADS.attr()), LOADS.comm(1, 1, "x")] * 200, {}), "more than 64 times"),
    ],
    ids=["shared ids", "too many events", "events again and again"],
)
def test_what_would_take_time_without_end_is_refused(data: bytes, words: str) -> None:
    fd = os.memfd_create("greedy")
    try:
        os.pwrite(fd, data, 0)
        started = time.thread_time()
        with pytest.raises(RecordingError, match=words):
            read(f"/proc/self/fd/{fd}")
        assert time.thread_time() - started < 2
    finally:
        os.close(fd)
