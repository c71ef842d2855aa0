"""Recordings: what is written is what is read, and what cannot be read is said."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recordings import (
    ADDRESS,
    MODEL,
    PID,
    TID,
    end,
    events,
    header,
    manifest,
    mapped,
    model,
    record,
    sampled,
    window,
)
from tests.recordings import samples as samples_of
from tiermem.errors import Closed, RecordingError
from tiermem.observations import Bits, Rung
from tiermem.recording import FIELDS, MAGIC, Recorder, bits_frame, frame, read, samples_frames
from tiermem.samples import SAMPLE
from tiermem.types import PAGE_BYTES

VALUES: dict[str, Any] = {
    "str": "a", "bytes": b"b", "int": -1, "id": 7, "count": 1 << 40, "number": 1.5, "time": 2.0, "rung": "present",
    "map": {"k": [1]}, "numbers": {"n": 1}, "strs": ["s"], "counts": [3],
}  # fmt: skip


def packed(**fields: Any) -> bytes:
    body = msgpack.packb(fields)
    return struct.pack("<I", len(body)) + bytes(body)


def test_everything_that_is_recorded_is_read(tmp_path: Path) -> None:
    path = record(
        tmp_path / "r",
        frame("process", 0.5, pid=PID, start_ticks=5, comm="engine"),
        frame("thread", 0.5, pid=PID, tid=TID, comm="w\udcff"),
        frame("open", 0.5, pid=PID, model=MODEL, lease="l"),
        mapped(0.5),
        frame("image", 0.6, pid=PID, address=0x1000, nbytes=64, offset=128, path="/bin/engine"),
        events("mem-loads"),
        sampled([(1.0, 3), (0.9, 7)]),
        window(1.0, 1.5, [0, 2, 5], [2]),
        frame("counters", 2.0, pid=None, rung="perf", values={"lost": 3}),
        frame("load", 2.0, model=MODEL, seconds=0.5, nbytes=10),
        frame("move", 2.0, model=MODEL, first=0, pages=2, source=0, target=1, nbytes=4, reason="cold"),
        frame("release", 3.0, pid=PID, lease="l"),
        end(4.0),
    )
    recording = read(path)
    assert recording.notes == []
    assert (recording.begin_s, recording.end_s, recording.end_reason) == (0.0, 4.0, "it was enough")
    assert recording.header.command == ("tiermem", "record")
    assert recording.header.config == {"dram": 1 << 30}
    (told,) = recording.models
    assert (told.id, told.name, told.manifest, told.first_page) == (MODEL, "tiny", manifest(), (0, 2, 4, 6, 8))
    assert recording.samples["time"].tolist() == [900_000_000, 1_000_000_000]  # in the order of time
    assert recording.resolved.model.tolist() == [0, 0]
    assert recording.resolved.page.tolist() == [7, 3]
    (seen,) = recording.windows
    assert (seen.model, seen.pid, seen.bits.rung, seen.bits.end_s) == (0, PID, Rung.PRESENT, 1.5)
    assert seen.bits.pages.tolist() == [0, 2, 5]
    assert seen.bits.touched.tolist() == [False, True, False]
    assert (recording.comm(PID, TID), recording.comm(PID, 999), recording.comm(9, 9)) == ("w\udcff", "engine", "")
    assert recording.images[0].path == "/bin/engine"
    assert [fields["kind"] for fields in recording.opens] == ["open", "release"]
    assert recording.counters[0]["values"] == {"lost": 3}
    assert (recording.loads[0]["nbytes"], recording.moves[0]["reason"]) == (10, "cold")


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    path = record(
        tmp_path / "r", frame("process", 0.0, pid=PID, start_ticks=5, comm="a"), mapped(0.0),
        frame("process", 2.0, pid=PID, start_ticks=6, comm="b"), events("e"),
        sampled([(1.0, 0), (3.0, 0)]), end(4.0),
    )  # fmt: skip
    assert read(path).resolved.model.tolist() == [0, -1]


@pytest.mark.parametrize("kind", ["unmap", "exit"])
def test_what_is_unmapped_is_nobodys(tmp_path: Path, kind: str) -> None:
    fields = {"pid": PID} | ({"lease": "l"} if kind == "unmap" else {})
    path = record(tmp_path / "r", mapped(0.0), frame(kind, 2.0, **fields), events("e"), sampled([(1.0, 1), (3.0, 1)]))
    assert read(path).resolved.page.tolist() == [1, 0]
    assert read(path).resolved.model.tolist() == [0, -1]


def test_events_of_several_samplers_get_numbers_of_their_own(tmp_path: Path) -> None:
    path = record(
        tmp_path / "r", events("loads", "stores"), sampled([(1.0, 0)], event=1),
        events("faults", rung="present"), sampled([(2.0, 0)], event=0), events("loads", "stores", period=7),
        sampled([(3.0, 0)], event=0), end(3.0),
    )  # fmt: skip
    recording = read(path)
    named = [recording.events[number] for number in recording.samples["event"].tolist()]
    assert [(event.name, event.rung, event.period) for event in named] == [
        ("stores", Rung.PERF, 7), ("faults", Rung.PRESENT, 1000), ("loads", Rung.PERF, 7)
    ]  # fmt: skip


@given(st.lists(st.booleans(), max_size=70))
def test_bits_survive_the_round_trip(touched: list[bool]) -> None:
    pages = np.arange(0, 2 * len(touched), 2, dtype=np.int32)
    data = bits_frame(1.0, 1, "l", MODEL, Bits(Rung.ACCESSED, 0.5, 1.0, pages, np.array(touched, np.bool_)))
    fields = msgpack.unpackb(data[4:])
    assert np.frombuffer(fields["pages"], "<i4").tolist() == pages.tolist()
    bits = np.unpackbits(np.frombuffer(fields["touched"], np.uint8), bitorder="little")
    assert bits[: len(touched)].astype(bool).tolist() == touched


@pytest.mark.parametrize("kind", FIELDS)
def test_each_kind_takes_its_fields_and_no_others(kind: str) -> None:
    fields = {name: VALUES[type_name.rstrip("?")] for name, type_name in FIELDS[kind].items()}
    assert msgpack.unpackb(frame(kind, 1.0, **fields)[4:]) == {"kind": kind, "time_s": 1.0, **fields}
    for name, type_name in FIELDS[kind].items():
        with pytest.raises(ValueError, match="has no frame"):
            frame(kind, 1.0, **{key: value for key, value in fields.items() if key != name})
        with pytest.raises(ValueError, match=rf"{kind}\.{name} is"):
            frame(kind, 1.0, **fields | {name: object()})
        if type_name.endswith("?"):
            frame(kind, 1.0, **fields | {name: None})
    with pytest.raises(ValueError, match="has no frame"):
        frame(kind, 1.0, **fields, color=1)
    with pytest.raises(ValueError, match="time_s"):
        frame(kind, float("nan"), **fields)


def test_samples_of_more_than_a_frame_are_cut() -> None:
    rows = np.zeros((64 << 20) // SAMPLE.itemsize + 5, SAMPLE)
    data = samples_frames(0.0, rows)
    (length,) = struct.unpack_from("<I", data)
    assert len(data) > 4 + length
    assert len(data) - rows.nbytes < 200
    assert samples_frames(0.0, rows[:0]) == b""


@pytest.mark.parametrize("missing", [1, 3, 4, 30])
def test_a_cut_off_tail_is_a_note(tmp_path: Path, missing: int) -> None:
    last = window(1.0, 2.0, [1], [1])
    path = record(tmp_path / "r", mapped(), window(0.0, 1.0, [0], [0]), last)
    os.truncate(path, path.stat().st_size - missing)
    recording = read(path)
    assert len(recording.windows) == 1
    assert f"{len(last) - missing} bytes" in recording.notes[0]
    assert "no end" in recording.notes[-1]


def test_kinds_and_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    later = packed(kind="weather", time_s=1.0, degrees=4) * 2 + packed(kind="end", time_s=1.0, reason="r", color="red")
    recording = read(record(tmp_path / "r", later))
    assert recording.notes == ["2 frames of kinds that this version does not know are passed over"]
    assert recording.end_reason == "r"


def test_frames_of_a_model_that_nobody_introduced_are_counted(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.append(header() + mapped() + window(0, 1, [0], []) + end(1.0))
    recording = read(tmp_path / "r")
    assert recording.windows == []
    assert recording.notes[0].startswith("2 frames are passed over: no frame before them introduces model abab")


@pytest.mark.parametrize(
    ("tail", "complaint"),
    [
        (struct.pack("<I", 0), "claims 0 bytes"),
        (struct.pack("<I", (64 << 20) + 1), "claims 67108865 bytes"),
        (b"\x01\0\0\0\xc1", "damaged"),
        (packed(kind="end", time_s=1.0), r"end\.reason is None"),
        (packed(kind="end", time_s=-1.0, reason=""), "no map with a kind and a time"),
        (packed(kind="end", time_s=1.0, reason=msgpack.ExtType(4, b"")), "extension 4"),
        (header(), "second header"),
        (packed(kind="samples", time_s=1.0, data=b"123"), "3 bytes of samples"),
        (sampled([(1.0, 0)]), "samples of event 0, of 0 announced"),
        (events("a") + sampled([(1.0, 0)], event=1), "samples of event 1, of 1 announced"),
        (packed(kind="events", time_s=1.0, names=["a"], periods=[], rung="perf"), "1 events with 0 periods"),
        (mapped(pages=9), "a mapping of 9 pages at 0x7f0000000000 of a model of 8"),
        (mapped(address=1 << 57), "a mapping of 8 pages"),
        (model(id="x", manifest=b"123"), "ManifestColumns"),
        (window(2.0, 1.0, [0], []), "ends 1.0 s before it begins"),
        (window(1.0, 2.0, [8], []), "do not ascend from 0 to 7"),
        (window(1.0, 2.0, [-1, 0], []), "do not ascend"),
        (frame("bits", 1.0, pid=1, lease="l", model=MODEL, rung="declared", begin_s=0.0, end_s=1.0, pages=b"",
               touched=b""), "rung declared"),
        (frame("bits", 1.0, pid=1, lease="l", model=MODEL, rung="present", begin_s=0.0, end_s=1.0, pages=b"1234",
               touched=b""), "4 bytes of pages with 0 bytes of bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "frame",
)  # fmt: skip
def test_damage_is_refused_with_its_place(tmp_path: Path, tail: bytes, complaint: str) -> None:
    path = record(tmp_path / "r", tail)
    with pytest.raises(RecordingError, match=complaint) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: the frame at byte ")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no recording"),
        (b"PERFILE2", "no recording"),
        (MAGIC, "no header"),
        (MAGIC + end(1.0), "no header"),
        (MAGIC + header()[:-1], "no header"),
        (MAGIC + packed(kind="header", time_s=0, version=2, tiermem="9.0", host={}, config={}, command=None, unix_s=0),
         "of version 2, made by tiermem 9.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)  # fmt: skip
def test_what_is_no_recording_is_refused(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(RecordingError, match=complaint):
        read(tmp_path / "r")


def test_a_frame_cannot_grow_by_being_decoded(tmp_path: Path) -> None:
    body = b"\x83" + b"".join(map(msgpack.packb, ("kind", "end", "time_s", 1.0, "reason"))) + b"\xdd\0\x30\0\0"
    body += b"\x90" * (3 << 20)  # three million empty arrays, of 56 bytes each
    path = record(tmp_path / "r", struct.pack("<I", len(body)) + body)
    with pytest.raises(RecordingError, match="are no byte strings"):
        read(path)


def test_only_the_owner_may_read_a_recording_and_a_closed_one_takes_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r")
    recorder.append(header())
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o600
    assert recorder.nbytes == (tmp_path / "r").stat().st_size
    recorder.close()
    recorder.close()
    with pytest.raises(Closed, match="closed"):
        recorder.append(end(1.0))


def test_a_full_disk_leaves_whole_frames(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tests.recordings import end, header, samples, samples_frames, events
from tiermem.recording import Recorder
recorder = Recorder({str(tmp_path / "r")!r})
recorder.append(header() + events("e"))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    recorder.append(samples_frames(0.0, samples([(1.0, 0)] * 100)))
except OSError as error:
    recorder.append(end(1.0))
    sys.exit(error.errno)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
    assert run.returncode == 27  # EFBIG
    recording = read(tmp_path / "r")
    assert (len(recording.samples), recording.end_reason, recording.notes) == (0, "it was enough", [])


def test_an_address_between_mappings_is_nobodys(tmp_path: Path) -> None:
    stray = samples_of([(1.0, 0)])
    stray["addr"] = ADDRESS + 8 * PAGE_BYTES
    assert read(record(tmp_path / "r", mapped(), events("e"), samples_frames(0.0, stray))).resolved.model.tolist() == [
        -1
    ]
