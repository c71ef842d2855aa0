"""Damaged recordings: each is read, or refused with a RecordingError; none takes the reader down."""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recordings import PID, TID, end, events, mapped, record, sampled, window
from tiermem.errors import RecordingError
from tiermem.recording import frame, read
from tiermem.report.accesses import accesses
from tiermem.report.functions import functions
from tiermem.report.heat import heat
from tiermem.report.passes import orders
from tiermem.report.plot import bands
from tiermem.report.threads import threads

MUTATIONS = 3000
MEMORY_BYTES = 4 << 30


def whole(path: Path) -> bytes:
    """A recording with every kind of frame."""
    record(
        path,
        frame("process", 0.5, pid=PID, start_ticks=5, comm="engine"),
        frame("thread", 0.5, pid=PID, tid=TID, comm="worker"),
        frame("open", 0.5, pid=PID, model="ab" * 32, lease="l"),
        mapped(0.5),
        frame("image", 0.6, pid=PID, address=0x1000, nbytes=64, offset=128, path="[vdso]"),
        events("mem-loads"),
        sampled([(1.0, 3), (0.9, 7), (1.2, 2)]),
        events("faults", rung="present"),
        sampled([(1.3, 1)]),
        window(1.0, 1.5, [0, 2, 5], [2]),
        window(1.5, 2.0, [0, 1, 2, 3, 4, 5, 6, 7], [0, 4]),
        frame("counters", 2.0, pid=None, rung="perf", values={"lost": 3}),
        frame("load", 2.0, model="ab" * 32, seconds=0.5, nbytes=10),
        frame("move", 2.0, model="ab" * 32, first=0, pages=2, source=0, target=1, nbytes=4, reason="cold"),
        frame("unmap", 3.0, pid=PID, lease="l"),
        frame("release", 3.0, pid=PID, lease="l"),
        frame("exit", 3.5, pid=PID),
        end(4.0),
    )
    return path.read_bytes()


def frame_places(data: bytes) -> list[int]:
    places, at = [], data.index(b"\n") + 1
    while at < len(data):
        places.append(at)
        at += 4 + struct.unpack_from("<I", data, at)[0]
    return places


def mutated(data: bytes, source: random.Random) -> bytes:
    """One to three of: a flipped bit, extreme bytes, an extreme length, a frame put elsewhere, a cut."""
    out = bytearray(data)
    places = frame_places(data)
    for _ in range(source.randint(1, 3)):
        kind, at = source.randrange(5), source.randrange(len(out))
        begin, to = source.choice(places), source.choice(places)
        if kind == 0:
            out[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            out[at : at + 8] = source.choice([b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xcf" + b"\xff" * 7])
        elif kind == 2:
            out[to : to + 4] = struct.pack("<I", source.choice([0, 1, 0xFFFFFFFF, 64 << 20, source.getrandbits(12)]))
        elif kind == 3:
            length = 4 + struct.unpack_from("<I", data, begin)[0]
            out[to : to + source.choice([0, length])] = data[begin : begin + length]
        else:
            del out[max(at, 1) :]
    return bytes(out)


BY = ("model", "layer", "tensor", "expert", "page")


def examine(path: Path, by: str) -> bool:
    """Whether a file is read; then every report must be made of it."""
    try:
        recording = read(path)
    except RecordingError:
        return False
    for row in heat(recording, by):
        assert row.pages == row.touched + row.cold + row.unknown
    assert len(accesses(recording)) == len(recording.samples)
    orders(recording)
    threads(recording)
    functions(recording)
    bands(recording)
    return True


def examine_mutations(directory: Path, count: int, seed: int) -> tuple[int, float]:
    """(how many of `count` mutations were read, seconds that the slowest took)."""
    source, path = random.Random(seed), directory / "mutated"
    data, accepted, slowest = whole(directory / "whole"), 0, 0.0
    for _ in range(count):
        path.write_bytes(mutated(data, source))
        began = time.monotonic()
        accepted += examine(path, source.choice(BY))
        slowest = max(slowest, time.monotonic() - began)
    return accepted, slowest


def test_the_whole_recording_is_read(tmp_path: Path) -> None:
    whole(tmp_path / "whole")
    assert all(examine(tmp_path / "whole", by) for by in BY)
    assert len(read(tmp_path / "whole").samples) == 4


def test_mutated_recordings_are_read_or_refused(tmp_path: Path) -> None:
    code = f"""
import resource, sys
from pathlib import Path
from tests.hostile.test_recordings import MEMORY_BYTES, MUTATIONS, examine_mutations
resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
accepted, slowest = examine_mutations(Path({str(tmp_path)!r}), MUTATIONS, 20)
assert MUTATIONS // 50 < accepted < MUTATIONS, accepted
assert slowest < 2, slowest
"""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("length", [0, 1, 17, 18, 19, 22])
def test_short_files_are_refused(tmp_path: Path, length: int) -> None:
    data = whole(tmp_path / "whole")
    (tmp_path / "short").write_bytes(data[:length])
    with pytest.raises(RecordingError):
        read(tmp_path / "short")


def test_many_small_frames_take_linear_time(tmp_path: Path) -> None:
    """Mappings that are made and ended over and over, by processes that come and go."""

    def seconds(count: int) -> float:
        frames = b"".join(
            mapped(i / 1000, pid=i % 50 + 1, lease=str(i)) + frame("exit", i / 1000 + 0.0005, pid=i % 50 + 1)
            for i in range(count)
        )
        path = record(tmp_path / "r", frames, events("e"), sampled([(1.0, 0)]))
        began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        examine(path, "layer")
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime - began

    assert seconds(8000) < 10 * seconds(2000) + 0.5
