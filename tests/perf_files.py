"""Hand-made perf.data files: attributes, records and sections, written from the format's documentation and without any
of what reads them. `perf script` reads these files too, and so says whether they are right."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

IP, TID, TIME, ADDR, READ, CALLCHAIN, ID, CPU, PERIOD, STREAM_ID, RAW, BRANCH_STACK, REGS_USER, STACK_USER, WEIGHT, \
    DATA_SRC, IDENTIFIER, TRANSACTION, REGS_INTR, PHYS_ADDR, AUX, CGROUP, DATA_PAGE_SIZE, CODE_PAGE_SIZE, \
    WEIGHT_STRUCT = (1 << bit for bit in range(25))  # fmt: skip
PEBS = IP | TID | TIME | ADDR | CPU | PERIOD | WEIGHT_STRUCT | DATA_SRC | PHYS_ADDR
HW_INDEX, GROUP = 1 << 17, 1 << 3
HOSTNAME, OSRELEASE, VERSION, ARCH, NRCPUS, CPUDESC, CPUID, MEMORY, CMDLINE, EVENT_DESC = range(3, 13)
PMUS, SAMPLE_TIME, COMPRESSED_FEATURE = 16, 21, 27


@dataclass(frozen=True)
class Event:
    """A perf_event_attr with what else a file says of it."""

    sample_type: int
    ids: tuple[int, ...] = (1,)
    name: str = ""
    type: int = 4
    config: int = 0x1CD
    period: int = 1000
    freq: bool = False
    read_format: int = 0
    branch_sample_type: int = 0
    regs_user: int = 0
    regs_intr: int = 0
    sample_id_all: bool = True

    def attr(self, nbytes: int = 128) -> bytes:
        flags = self.freq << 10 | 2 << 15 | self.sample_id_all << 18
        whole = struct.pack(
            "<IIQQQQQIIQQQQIiQIHHIIQ", self.type, nbytes, self.config, self.period, self.sample_type, self.read_format,
            flags, 0, 0, 3, 0, self.branch_sample_type, self.regs_user, 0, 0, self.regs_intr, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        return whole[:nbytes].ljust(nbytes, b"\0")

    def sample(self, values: Mapping[str, object], misc: int = 2) -> bytes:
        return record(9, self.body(values), misc)

    def body(self, values: Mapping[str, object]) -> bytes:
        """A sample's fields in the kernel's order; what `values` lacks is 0 or empty."""
        n = lambda name: int(values.get(name, 0))  # type: ignore[call-overload] # noqa: E731
        one = lambda name: struct.pack("<Q", n(name))  # noqa: E731
        many = lambda name: values.get(name, ())  # noqa: E731
        raw = bytes(values.get("raw", b""))  # type: ignore[arg-type]
        raw += bytes(-(len(raw) + 4) % 8)
        aux = bytes(values.get("aux", b""))  # type: ignore[arg-type]
        stack = bytes(values.get("stack", b""))  # type: ignore[arg-type]
        branches = many("branches")
        weight = n("weight") | n("weight2") << 32 | n("weight3") << 48
        parts = {
            IDENTIFIER: one("id"), IP: one("ip"), TID: struct.pack("<II", n("pid"), n("tid")), TIME: one("time"),
            ADDR: one("addr"), ID: one("id"), STREAM_ID: one("stream_id"), CPU: struct.pack("<II", n("cpu"), 0),
            PERIOD: one("period"), READ: words(many("read")), CALLCHAIN: counted(many("callchain")),
            RAW: struct.pack("<I", len(raw)) + raw,
            BRANCH_STACK: struct.pack("<Q", len(branches) // 3)  # type: ignore[arg-type]
            + (one("hw_index") if self.branch_sample_type & HW_INDEX else b"") + words(branches),
            REGS_USER: words(many("regs_user")) or bytes(8),
            STACK_USER: struct.pack("<Q", len(stack)) + stack + (struct.pack("<Q", len(stack)) if stack else b""),
            WEIGHT: struct.pack("<Q", weight), WEIGHT_STRUCT: struct.pack("<Q", weight), DATA_SRC: one("data_src"),
            TRANSACTION: one("transaction"), REGS_INTR: words(many("regs_intr")) or bytes(8),
            PHYS_ADDR: one("phys_addr"), CGROUP: one("cgroup"), DATA_PAGE_SIZE: one("data_page_size"),
            CODE_PAGE_SIZE: one("code_page_size"), AUX: struct.pack("<Q", len(aux)) + aux,
        }  # fmt: skip
        return b"".join(part for bit, part in parts.items() if self.sample_type & bit)

    def trailer(self, *, pid: int = 0, tid: int = 0, time: int = 0, cpu: int = 0) -> bytes:
        """What ends every other record of this event."""
        parts = {
            TID: struct.pack("<II", pid, tid), TIME: words([time]), ID: words([self.ids[0]]),
            STREAM_ID: words([self.ids[0]]), CPU: struct.pack("<II", cpu, 0), IDENTIFIER: words([self.ids[0]]),
        }  # fmt: skip
        return b"".join(part for bit, part in parts.items() if self.sample_id_all and self.sample_type & bit)

    def comm(self, pid: int, tid: int, name: str, time: int = 0) -> bytes:
        return record(3, struct.pack("<II", pid, tid) + padded(name) + self.trailer(pid=pid, tid=tid, time=time))

    def fork(self, pid: int, tid: int, parent: int, parent_tid: int, time: int, *, kind: int = 7) -> bytes:
        body = struct.pack("<IIIIQ", pid, parent, tid, parent_tid, time)
        return record(kind, body + self.trailer(pid=parent, tid=parent_tid, time=time))

    def exit(self, pid: int, tid: int, time: int) -> bytes:
        return self.fork(pid, tid, pid, tid, time, kind=4)

    def mmap(self, pid: int, address: int, nbytes: int, path: str, *, time: int = 0, data: bool = False) -> bytes:
        body = struct.pack("<iIQQQ", pid, max(pid, 0), address, nbytes, 0) + padded(path)
        return record(1, body + self.trailer(time=time), 2 | data << 13)

    def mmap2(
        self, pid: int, address: int, nbytes: int, offset: int, path: str, protection: int, *, time: int = 0,
        build_id: bytes = b"",
    ) -> bytes:  # fmt: skip
        file = struct.pack("<B3x20s", len(build_id), build_id) if build_id else struct.pack("<IIQQ", 8, 1, 77, 0)
        body = struct.pack("<iIQQQ", pid, pid, address, nbytes, offset) + file + struct.pack("<II", protection, 2)
        return record(10, body + padded(path) + self.trailer(pid=pid, tid=pid, time=time), 2 | bool(build_id) << 14)

    def fact(self, kind: int, *values: int, misc: int = 0, **who: int) -> bytes:
        """A side-band record of u64 only: LOST, LOST_SAMPLES, THROTTLE, AUX, ..."""
        return record(kind, words(values) + self.trailer(**who), misc)

    def start(self, pid: int, tid: int, *, cpu: int, time: int) -> bytes:
        """PERF_RECORD_ITRACE_START."""
        return record(12, struct.pack("<II", pid, tid) + self.trailer(pid=pid, tid=tid, cpu=cpu, time=time))


def words(values: object) -> bytes:
    numbers = list(values)  # type: ignore[call-overload]
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def counted(values: object) -> bytes:
    body = words(values)
    return struct.pack("<Q", len(body) // 8) + body


def padded(text: str) -> bytes:
    data = text.encode() + b"\0"
    return data + bytes(-len(data) % 8)


def record(kind: int, body: bytes = b"", misc: int = 0) -> bytes:
    return struct.pack("<IHH", kind, misc, 8 + len(body)) + body


def string(text: str) -> bytes:
    data = text.encode() + b"\0"
    data += bytes(-len(data) % 64)
    return struct.pack("<I", len(data)) + data


def strings(*texts: str) -> bytes:
    return struct.pack("<I", len(texts)) + b"".join(map(string, texts))


def event_desc(events: Sequence[Event]) -> bytes:
    """The feature that names events."""
    each = (
        event.attr() + struct.pack("<I", len(event.ids)) + string(event.name) + words(event.ids) for event in events
    )
    return struct.pack("<II", len(events), 128) + b"".join(each)


def pmus(names: Mapping[int, str]) -> bytes:
    each = (struct.pack("<I", kind) + string(name) for kind, name in names.items())
    return struct.pack("<I", len(names)) + b"".join(each)


def facts(events: Sequence[Event], arch: str = "x86_64") -> dict[int, bytes]:
    """The features that every recording has."""
    return {
        HOSTNAME: string("rack7"), OSRELEASE: string("6.18.0"), VERSION: string("6.18"), ARCH: string(arch),
        NRCPUS: struct.pack("<II", 128, 96), CPUDESC: string("Some CPU"), CPUID: string("GenuineIntel,6,143,8"),
        MEMORY: words([1 << 28]), CMDLINE: strings("/usr/bin/perf", "record", "-d"), EVENT_DESC: event_desc(events),
        PMUS: pmus({4: "cpu", 8: "ibs_op", 9: "arm_spe_0"}),
    }  # fmt: skip


def to_file(
    events: Sequence[Event], records: Iterable[bytes], features: Mapping[int, bytes] | None = None, *,
    attr_bytes: int = 128,
) -> bytes:  # fmt: skip
    """File mode: header, ids, attributes, records, features."""
    data = b"".join(records)
    ids, attrs, at = b"", b"", 104
    for event in events:
        attrs += event.attr(attr_bytes) + struct.pack("<QQ", at + len(ids), 8 * len(event.ids))
        ids += words(event.ids)
    begin = at + len(ids) + len(attrs)
    end = begin + len(data)
    sections = sorted((facts(events) if features is None else features).items())
    places, bodies, where = b"", b"", end + 16 * len(sections)
    for _, body in sections:
        places += struct.pack("<QQ", where + len(bodies), len(body))
        bodies += body
    bits = sum(1 << number for number, _ in sections)
    places_of = (at + len(ids), len(attrs), begin, len(data), 0, 0)
    header = struct.pack("<8sQQQQQQQQ", b"PERFILE2", 104, attr_bytes + 16, *places_of)
    return header + bits.to_bytes(32, "little") + ids + attrs + data + places + bodies


def to_pipe(
    events: Sequence[Event], records: Iterable[bytes], features: Mapping[int, bytes] | None = None, *,
    tracing: bytes = b"",
) -> bytes:  # fmt: skip
    """Pipe mode: everything is a record."""
    parts = [struct.pack("<8sQ", b"PERFILE2", 16)]
    parts += [record(64, event.attr() + words(event.ids)) for event in events]
    sections = facts(events) if features is None else features
    parts += [record(80, words([number]) + body) for number, body in sorted(sections.items())]
    if tracing:
        parts += [record(66, struct.pack("<II", len(tracing), 0)), tracing, bytes(-len(tracing) % 8)]
    return b"".join([*parts, *records])


def auxtrace(data: bytes, *, tid: int = 0xFFFFFFFF, cpu: int = 0xFFFFFFFF, offset: int = 0) -> bytes:
    """A record of trace data, and the data behind it; the ring is numbered like the cpu or thread."""
    data += bytes(-len(data) % 8)
    return record(71, struct.pack("<QQQIIII", len(data), offset, 0, min(cpu, tid), tid, cpu, 0)) + data


def auxtrace_info(kind: int, *private: int) -> bytes:
    return record(70, struct.pack("<II", kind, 0) + words(private))


def time_conv(shift: int, factor: int, zero: int) -> bytes:
    return record(79, words([shift, factor, zero, 0, 0]) + bytes([1, 0]) + bytes(6))


@dataclass
class Zstd:
    """The compressed records of one file: one zstd stream, a record of it per call."""

    kind: int = 81
    _stream: object = field(init=False)

    def __post_init__(self) -> None:
        import zstandard

        self._stream = zstandard.ZstdCompressor(level=1).compressobj()
        self._flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK

    def record(self, data: bytes) -> bytes:
        packed = self._stream.compress(data) + self._stream.flush(self._flush)  # type: ignore[attr-defined]
        if self.kind == 81:
            return record(81, packed)
        return record(83, words([len(packed)]) + packed + bytes(-len(packed) % 8))


def compressed_feature(mmap_bytes: int = 1 << 20) -> bytes:
    return struct.pack("<IIIII", 1, 1, 1, 5, mmap_bytes)


def spe_record(
    *, pc: int, va: int, pa: int = 0, context: int | None = None, ticks: int = 0, total: int = 0, issue: int = 0,
    translation: int = 0, events: int = 0, source: int | None = None, store: bool = False,
) -> bytes:  # fmt: skip
    """The packets of one sampled load or store, as DDI 0487 D10 orders them."""
    packets = b"\xb0" + pc.to_bytes(7, "little") + b"\x80"  # EL0, non-secure
    if context is not None:
        packets += b"\x64" + struct.pack("<I", context)
    packets += bytes([0x49, int(store)])
    packets += b"\x52" + struct.pack("<H", events)
    packets += b"\x99" + struct.pack("<H", issue) + b"\x98" + struct.pack("<H", total)
    packets += b"\xb2" + struct.pack("<Q", va) + b"\x9a" + struct.pack("<H", translation)
    if pa:
        packets += b"\xb3" + pa.to_bytes(7, "little") + b"\x80"
    if source is not None:
        packets += bytes([0x43, source])
    return packets + b"\x71" + struct.pack("<Q", ticks)
