"""Records that are no samples, built by hand and read back."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem import samples
from tiermem._native.perf import RECORD
from tiermem.sampler.records import Comm, Exit, Fork, Mmap, Sideband, Tally, take

U32 = st.integers(0, 2**32 - 1)
U63 = st.integers(0, 2**63 - 1)
PATHS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=40)
ID_BITS = (samples.TID, samples.TIME, samples.ID, samples.STREAM_ID, samples.CPU, samples.IDENTIFIER)
COLUMNS = st.sets(st.sampled_from(ID_BITS)).map(sum)


def text(value: str) -> bytes:
    """NUL-terminated, padded to 8 bytes, as the kernel writes names."""
    encoded = value.encode() + b"\0"
    return encoded + bytes(-len(encoded) % 8)


def trailer(sample_type: int, record: Sideband) -> bytes:
    """sample_id: the columns that every record ends with, in the kernel's order."""
    parts = {samples.TID: struct.pack("<II", record.pid, record.tid), samples.TIME: struct.pack("<Q", record.time)}
    return b"".join(parts.get(bit, b"\xa5" * 8) for bit in ID_BITS if sample_type & bit)


def encode(record: Sideband, sample_type: int) -> bytes:
    misc = 0
    match record:
        case Comm():
            kind, misc = 3, record.exec << 13
            body = struct.pack("<II", record.pid, record.tid) + text(record.name)
        case Mmap():
            kind = 10
            place = (record.pid, record.tid, record.addr, record.length, record.offset)
            file = (*record.device, record.inode, 0, record.prot, record.flags)
            body = struct.pack("<IIQQQIIQQII", *place, *file) + text(record.path)
        case Fork():
            kind = 7
            body = struct.pack("<IIIIQ", record.pid, record.parent_pid, record.tid, record.parent_tid, record.time)
        case Exit():
            kind = 4
            body = struct.pack("<IIIIQ", record.pid, 0, record.tid, 0, record.time)
    body += trailer(sample_type, record)
    return struct.pack("<IHH", kind, misc, 8 + len(body)) + body


def read(data: bytes, sample_type: int, shift_ns: int = 0) -> Tally:
    headers, at = [], 0
    while at < len(data):
        kind, misc, size = struct.unpack_from("<IHH", data, at)
        headers.append((at, kind, misc, size))
        at += size
    tally = Tally()
    take(memoryview(data), np.array(headers, RECORD), sample_type, shift_ns, tally)
    return tally


records = st.one_of(
    st.builds(Comm, U32, U32, U63, PATHS, st.booleans()),
    st.builds(Mmap, U32, U32, U63, U63, U63, U63, PATHS, U32, U32, st.tuples(U32, U32), U63),
    st.builds(Fork, U32, U32, U63, U32, U32),
    st.builds(Exit, U32, U32, U63),
)


@given(st.lists(records, max_size=5), COLUMNS.map(lambda bits: bits | samples.TIME))
def test_what_is_written_is_read(wanted: list[Sideband], sample_type: int) -> None:
    assert read(b"".join(encode(record, sample_type) for record in wanted), sample_type).sideband == wanted


def test_times_are_shifted() -> None:
    wanted = [Comm(1, 2, 1000, "python", False), Fork(3, 4, 1000, 1, 2), Exit(3, 4, 1000)]
    data = b"".join(encode(record, samples.TIME) for record in wanted)
    assert [record.time for record in read(data, samples.TIME, -400).sideband] == [600, 600, 600]


def test_a_build_id_takes_the_place_of_device_and_inode() -> None:
    data = bytearray(encode(Mmap(1, 1, 5, 0x1000, 0x2000, 0, "/lib/x.so", 5, 2, (8, 1), 77), samples.TIME))
    struct.pack_into("<H", data, 4, 1 << 14)
    (record,) = read(bytes(data), samples.TIME).sideband
    assert record == Mmap(1, 1, 5, 0x1000, 0x2000, 0, "/lib/x.so", 5, 2)


def test_the_older_mapping_record() -> None:
    body = struct.pack("<IIQQQ", 1, 2, 0x1000, 0x2000, 0x3000) + text("/lib/x.so") + struct.pack("<Q", 9)
    data = struct.pack("<IHH", 1, 0, 8 + len(body)) + body
    assert read(data, samples.TIME).sideband == [Mmap(1, 2, 9, 0x1000, 0x2000, 0x3000, "/lib/x.so")]


@pytest.mark.parametrize(("flags", "gap"), [(0, 0), (1, 1), (2, 0), (4, 1), (8, 1), (13, 1)])
def test_gaps_of_an_aux_area_are_counted(flags: int, gap: int) -> None:
    data = struct.pack("<IHHQQQ", 11, 0, 32, 0, 4096, flags)
    assert read(data, samples.TIME).aux_truncated == gap


def test_records_of_other_kinds_are_passed_over() -> None:
    assert read(struct.pack("<IHHQ", 99, 0, 16, 1), samples.TIME) == Tally()
