"""Decoding: made records of every layout and made SPE packets, against an encoder that knows nothing of ours."""

from __future__ import annotations

import errno
import random
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiermem import _native, samples
from tiermem._native import RECORD, Decoder, Layout, decode_spe
from tiermem.errors import NativeError
from tiermem.samples import SAMPLE

SAMPLE_TYPE, COMM = 9, 3
WORDS = {
    samples.IP: "ip", samples.TIME: "time", samples.ADDR: "addr", samples.STREAM_ID: "stream_id",
    samples.PERIOD: "period", samples.DATA_SRC: "data_src", samples.TRANSACTION: "transaction",
    samples.PHYS_ADDR: "phys_addr", samples.CGROUP: "cgroup", samples.DATA_PAGE_SIZE: "data_page_size",
    samples.CODE_PAGE_SIZE: "code_page_size",
}  # fmt: skip
KERNEL_ORDER = (
    samples.IDENTIFIER, samples.IP, samples.TID, samples.TIME, samples.ADDR, samples.ID, samples.STREAM_ID, samples.CPU,
    samples.PERIOD, samples.READ, samples.CALLCHAIN, samples.RAW, samples.BRANCH_STACK, samples.REGS_USER,
    samples.STACK_USER, samples.WEIGHT, samples.WEIGHT_STRUCT, samples.DATA_SRC, samples.TRANSACTION, samples.REGS_INTR,
    samples.PHYS_ADDR, samples.CGROUP, samples.DATA_PAGE_SIZE, samples.CODE_PAGE_SIZE, samples.AUX,
)  # fmt: skip


class Writer:
    """Writes samples of a layout as perf_output_sample() does, from the header's comments and not from our decoder."""

    def __init__(self, layout: Layout, event: int, ident: int, chance: random.Random) -> None:
        self.layout, self.event, self.ident, self.chance = layout, event, ident, chance

    def sample(self) -> tuple[bytes, dict[str, int]]:
        misc, row = self.chance.getrandbits(16), dict.fromkeys(SAMPLE.names or (), 0)
        body = b"".join(self.field(bit, row) for bit in KERNEL_ORDER if self.layout.sample_type & bit)
        row |= {"misc": misc, "event": self.event}
        return struct.pack("<IHH", SAMPLE_TYPE, misc, 8 + len(body)) + body, row

    def words(self, count: int) -> bytes:
        return self.chance.randbytes(8 * count)

    def field(self, bit: int, row: dict[str, int]) -> bytes:
        chance, layout = self.chance, self.layout
        few = chance.randrange(4)
        if bit in WORDS:
            row[WORDS[bit]] = value = chance.getrandbits(64)
            return struct.pack("<Q", value)
        match bit:
            case samples.ID | samples.IDENTIFIER:
                row["id"] = self.ident
                return struct.pack("<Q", self.ident)
            case samples.TID:
                row["pid"], row["tid"] = chance.getrandbits(32), chance.getrandbits(32)
                return struct.pack("<II", row["pid"], row["tid"])
            case samples.CPU:
                row["cpu"] = chance.getrandbits(32)
                return struct.pack("<II", row["cpu"], chance.getrandbits(32))
            case samples.WEIGHT:
                row["weight"] = chance.getrandbits(32)
                return struct.pack("<II", row["weight"], chance.getrandbits(32))
            case samples.WEIGHT_STRUCT:
                row["weight"], row["weight2"], row["weight3"] = (chance.getrandbits(n) for n in (32, 16, 16))
                return struct.pack("<IHH", row["weight"], row["weight2"], row["weight3"])
            case samples.READ:
                enabled, running, ident, group, lost = (layout.read_format >> n & 1 for n in range(5))
                times, value = self.words(enabled + running), 1 + ident + lost
                return struct.pack("<Q", few) + times + self.words(few * value) if group else self.words(value) + times
            case samples.CALLCHAIN:
                return struct.pack("<Q", few) + self.words(few)
            case samples.RAW:
                return struct.pack("<I", 8 * few + 4) + chance.randbytes(8 * few + 4)
            case samples.BRANCH_STACK:
                index, counters = (layout.branch_sample_type >> n & 1 for n in (17, 19))
                return struct.pack("<Q", few) + self.words(index + few * (3 + counters))
            case samples.REGS_USER | samples.REGS_INTR:
                mask = layout.sample_regs_user if bit == samples.REGS_USER else layout.sample_regs_intr
                return struct.pack("<Q", few) + (self.words(mask.bit_count()) if few else b"")
            case samples.STACK_USER:
                return struct.pack("<Q", 16 * few) + (self.words(2 * few + 1) if few else b"")
            case samples.AUX:
                return struct.pack("<Q", 8 * few) + self.words(few)
        raise AssertionError(bit)


BIT_COUNT = 25
MASKS = st.integers(0, 2**64 - 1)


@st.composite
def layouts(draw: st.DrawFn, always: int = 0, never: int = 0) -> Layout:
    kind = (draw(st.integers(0, 2**BIT_COUNT - 1)) | always) & ~never
    if kind & samples.WEIGHT:
        kind &= ~samples.WEIGHT_STRUCT
    return Layout(kind, draw(st.integers(0, 31)), draw(MASKS), draw(MASKS), draw(MASKS))


def other_record(chance: random.Random) -> bytes:
    body = chance.randbytes(8 * chance.randrange(6))
    return struct.pack("<IHH", chance.choice([1, 2, 3, 7, 10, 68, 4242]), chance.getrandbits(16), 8 + len(body)) + body


def write(
    writers: list[Writer], count: int, chance: random.Random
) -> tuple[bytes, list[dict[str, int]], list[int], list[int]]:
    """A stream of samples and other records: its bytes, rows, the others' offsets, and where each record ends."""
    data, rows, others, ends = b"", list[dict[str, int]](), list[int](), [0]
    for _ in range(count):
        if chance.random() < 0.3:
            others.append(len(data))
            data += other_record(chance)
        else:
            record, row = chance.choice(writers).sample()
            data += record
            rows.append(row)
        ends.append(len(data))
    return data, rows, others, ends


def check_rows(found: npt.NDArray[np.void], wanted: list[dict[str, int]]) -> None:
    assert [dict(zip(SAMPLE.names or (), row.tolist(), strict=True)) for row in found] == wanted


@given(layout=layouts(), seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_field_of_every_layout(layout: Layout, seed: int) -> None:
    chance = random.Random(seed)
    data, rows, others, _ = write([Writer(layout, 0, chance.getrandbits(64), chance)], 12, chance)
    decoded = Decoder([layout]).decode(data)
    check_rows(decoded.samples, rows)
    assert decoded.records["offset"].tolist() == others
    for offset, *header in decoded.records[["offset", "type", "misc", "size"]].tolist():
        assert tuple(header) == struct.unpack_from("<IHH", data, offset)
    assert decoded.used == len(data)


@given(data=st.data(), by_identifier=st.booleans(), count=st.integers(2, 5), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_events_are_told_apart_by_id(data: st.DataObject, by_identifier: bool, count: int, seed: int) -> None:
    before = samples.IP | samples.TID | samples.TIME | samples.ADDR
    always, never = (samples.IDENTIFIER, 0) if by_identifier else (samples.ID | samples.TIME, before - samples.TIME)
    mixed = layouts(always, never | (0 if by_identifier else samples.IDENTIFIER))
    chance = random.Random(seed)
    plans = [data.draw(mixed) for _ in range(count)]
    idents = [*{chance.getrandbits(63) for _ in range(3 * count)}]
    known = {ident: k % count for k, ident in enumerate(idents)}
    writers = [Writer(plans[event], event, ident, chance) for ident, event in known.items()]
    stream, rows, others, _ = write(writers, 20, chance)
    stranger = Writer(plans[0], 0, 2**64 - 1, chance).sample()[0]
    decoded = Decoder(plans, known).decode(stream + stranger)
    check_rows(decoded.samples, rows)
    assert decoded.records["offset"].tolist() == [*others, len(stream)]
    assert decoded.records["type"][-1] == SAMPLE_TYPE


@given(layout=layouts(), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_a_cut_stream_is_used_up_to_a_record(layout: Layout, seed: int) -> None:
    chance = random.Random(seed)
    data, _, _, ends = write([Writer(layout, 0, 1, chance)], 3, chance)
    decoder = Decoder([layout])
    for length in range(len(data)):
        decoded = decoder.decode(data[:length])
        assert decoded.used == max(end for end in ends if end <= length)
        assert len(decoded.samples) + len(decoded.records) == ends.index(decoded.used)


@given(layout=layouts(), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_sample_that_is_too_short_is_refused_where_it_is(layout: Layout, seed: int) -> None:
    chance = random.Random(seed)
    writer = Writer(layout, 0, 1, chance)
    good, bad = writer.sample()[0], writer.sample()[0]
    if len(bad) == 8:
        return
    size = chance.randrange(0, len(bad))
    damaged = bad[:6] + struct.pack("<H", size) + bad[8:]
    with pytest.raises(NativeError, match=f"at byte {len(good)} of") as refused:
        Decoder([layout]).decode(good + damaged)
    assert refused.value.errno == _native.E_RANGE


LISTS = (samples.CALLCHAIN, samples.BRANCH_STACK, samples.STACK_USER, samples.AUX)


@pytest.mark.parametrize(
    ("bit", "count"),
    # 2**61 words or branches are no bytes at all, where the product is cut at 64 bits.
    [(bit, count) for bit in LISTS for count in (2**64 - 1, 2**63, 2**61, 2**32 - 1, 25)]
    + [(samples.RAW, 2**32 - 1), (samples.RAW, 25)],
)
def test_counts_beyond_the_record_are_refused(bit: int, count: int) -> None:
    record = struct.pack("<IHHQ", SAMPLE_TYPE, 0, 32, count) + bytes(16)
    with pytest.raises(NativeError, match="at byte 0 of 32"):
        Decoder([Layout(bit)]).decode(record)


def test_more_records_than_expected_fit() -> None:
    data = struct.pack("<IHHI", COMM, 1, 12, 0) * 5000
    decoded = Decoder([Layout(samples.ADDR)]).decode(data)
    assert decoded.records.dtype == RECORD
    assert decoded.records["offset"].tolist() == list(range(0, len(data), 12))
    assert decoded.used == len(data)


def test_layouts_that_cannot_be_told_apart_are_refused() -> None:
    ident = samples.ID
    for plans, ids in (
        ([], {}),
        ([Layout(1 << BIT_COUNT)], {}),
        ([Layout(samples.READ, read_format=32)], {}),
        ([Layout(samples.WEIGHT | samples.WEIGHT_STRUCT)], {}),
        ([Layout(samples.IP), Layout(samples.IP)], {1: 0, 2: 1}),
        ([Layout(ident), Layout(ident | samples.IP)], {1: 0, 2: 1}),
        ([Layout(ident), Layout(ident)], {1: 0, 2: 2}),
    ):
        with pytest.raises(NativeError) as refused:
            Decoder(plans, ids)
        assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("shape", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint64)])
def test_any_buffer_is_decoded(shape: Any) -> None:
    data = struct.pack("<IHHQ", SAMPLE_TYPE, 0, 16, 77) * 3
    assert Decoder([Layout(samples.ADDR)]).decode(shape(data)).samples["addr"].tolist() == [77] * 3
    assert Decoder([Layout(samples.ADDR)]).decode(shape(b"")).used == 0


# --- SPE --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def load() -> bytes:
    """A load by thread 9 from 0x2000: latencies 30, 5 and 2, its source 0xe."""
    return b"".join((
        b"\xb0" + struct.pack("<Q", 0x4000), b"\x65" + struct.pack("<I", 9), b"\x49\x00",
        b"\x62" + struct.pack("<I", 0x10106),
        b"\x98" + struct.pack("<H", 30), b"\x99" + struct.pack("<H", 5), b"\x9a" + struct.pack("<H", 2),
        b"\xb2" + struct.pack("<Q", 0x2000), b"\x43\x0e", b"\x71" + struct.pack("<Q", 123),
    ))  # fmt: skip


def test_spe_records_become_rows(load: bytes) -> None:
    found = decode_spe(b"\xff" + load + bytes(7) + load[:-1])
    wanted = dict.fromkeys(SAMPLE.names or (), 0) | {
        "ip": 0x4000, "pid": 9, "tid": 9, "addr": 0x2000, "weight": 30, "weight2": 5, "weight3": 2, "data_src": 0xE,
        "transaction": 0x10106, "time": 123,
    }  # fmt: skip
    check_rows(found.samples, [wanted])
    assert found.used == 1 + len(load) + 7
    assert found.bad == 1


@given(st.binary(max_size=300))
def test_spe_takes_any_bytes(data: bytes) -> None:
    found = decode_spe(data)
    assert len(found.samples) * 10 + found.bad <= found.used <= len(data)


@given(st.binary(max_size=300), layouts())
def test_decoding_takes_any_bytes(data: bytes, layout: Layout) -> None:
    try:
        decoded = Decoder([layout]).decode(data)
    except NativeError as refused:
        assert refused.errno == _native.E_RANGE  # noqa: PT017
    else:
        assert 8 * (len(decoded.samples) + len(decoded.records)) <= decoded.used <= len(data)
