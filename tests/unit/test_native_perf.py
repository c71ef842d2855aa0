"""Rings: the kernel's own records of page faults and watchpoints, with addresses that the test knows."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import struct
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tiermem import samples
from tiermem._native import Decoder, Event, Layout, Ring
from tiermem.errors import Closed, NativeError

OS_PAGE = mmap.PAGESIZE
MADV_NOHUGEPAGE = 15
SOFTWARE, BREAKPOINT = 1, 5
PAGE_FAULTS, PAGE_FAULTS_MIN = 2, 5
RW = 3
USUAL = (
    samples.IP | samples.TID | samples.TIME | samples.ADDR | samples.CPU | samples.PERIOD | samples.WEIGHT_STRUCT
    | samples.DATA_SRC
)  # fmt: skip
USUAL_BYTES = 72
FAULTS = Event(SOFTWARE, PAGE_FAULTS_MIN, sample_type=USUAL, disabled=True)
LOST, COMM, MMAP2 = 2, 3, 10


def ring(event: Event, pid: int = 0, cpu: int = -1, **options: Any) -> Ring:
    """A ring, or a test that is skipped where nobody may have one."""
    try:
        return Ring(event, pid, cpu, **options)
    except NativeError as refused:
        if refused.errno in (errno.EACCES, errno.EPERM, errno.ENOSYS, errno.ENOSPC):
            pytest.skip(f"lacks the right to sample: {refused}")
        raise


def drain(opened: Ring) -> bytes:
    parts, buffer = list[bytes](), bytearray(1 << 16)
    while got := opened.read(buffer):
        parts.append(bytes(buffer[:got]))
    return b"".join(parts)


class Pages:
    """Fresh memory on OS pages that nobody has touched."""

    def __init__(self, count: int) -> None:
        self.memory = mmap.mmap(-1, count * OS_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(MADV_NOHUGEPAGE)
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data

    def touch(self, offset: int) -> None:
        self.memory[offset] = 1

    def within(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """The rows of these pages."""
        return rows[(rows["addr"] >= self.address) & (rows["addr"] < self.address + len(self.memory))]


def test_every_first_touch_is_a_sample_in_order() -> None:
    pages, chance = Pages(500), random.Random(1)
    offsets = [page * OS_PAGE + chance.randrange(OS_PAGE) for page in chance.sample(range(500), 500)]
    with_times = replace(FAULTS, monotonic=True, sample_type=USUAL | samples.DATA_PAGE_SIZE)
    opened = ring(with_times)
    before = time.monotonic_ns()
    opened.enable()
    for offset in offsets:
        pages.touch(offset)
    opened.disable()
    decoded = Decoder([Layout(with_times.sample_type)]).decode(drain(opened))
    rows = pages.within(decoded.samples)
    assert (rows["addr"] - pages.address).tolist() == offsets
    assert set(rows["tid"]) == {threading.get_native_id()}
    assert set(rows["pid"]) == {os.getpid()}
    assert set(rows["period"]) == {1}
    assert set(rows["data_page_size"]) == {OS_PAGE}
    times = [before, *rows["time"].tolist(), time.monotonic_ns()]
    assert times == sorted(times)
    assert opened.count().value == len(decoded.samples)
    assert opened.count().lost == 0


def test_what_finds_no_room_is_counted() -> None:
    pages, opened = Pages(1000), ring(FAULTS, nbytes=OS_PAGE)
    opened.enable()
    for page in range(1000):
        pages.touch(page * OS_PAGE)
    opened.disable()
    decoder = Decoder([Layout(USUAL)])
    samples = decoder.decode(drain(opened)).samples
    seen = pages.within(samples)
    count = opened.count()
    assert 0 < len(seen) <= OS_PAGE // USUAL_BYTES
    assert (seen["addr"] == pages.address + OS_PAGE * np.arange(len(seen), dtype=np.uint64)).all()
    assert count.lost == count.value - len(samples)  # Python may fault as well


def test_the_next_record_tells_what_was_lost() -> None:
    pages, opened = Pages(1000), ring(FAULTS, nbytes=OS_PAGE)
    opened.enable()
    for page in range(999):
        pages.touch(page * OS_PAGE)
    data = drain(opened)
    pages.touch(999 * OS_PAGE)
    opened.disable()
    data += drain(opened)  # the record is in either part: Python may have faulted while it read the first
    records = Decoder([Layout(USUAL)]).decode(data).records
    assert len(records) > 0
    assert set(records["type"]) == {LOST}
    lost = [struct.unpack_from("<QQ", data, int(offset) + 8)[1] for offset in records["offset"]]
    assert sum(lost) == opened.count().lost > 0


def test_another_process_is_sampled_from_its_exec_on() -> None:
    kind = samples.TID | samples.TIME | samples.ADDR
    event = Event(SOFTWARE, PAGE_FAULTS_MIN, sample_type=kind, sideband=True, on_exec=True)
    with subprocess.Popen(["sh", "-c", "read line; exec true"], stdin=subprocess.PIPE) as child:
        opened = ring(event, child.pid)
        child.communicate(b"\n")
    assert child.returncode == 0
    data = drain(opened)
    decoded = Decoder([Layout(kind)]).decode(data)
    assert set(decoded.samples["pid"]) == {child.pid}
    commands, mappings = (decoded.records[decoded.records["type"] == kind] for kind in (COMM, MMAP2))
    assert b"true\0" in data[int(commands[0]["offset"]) :][: int(commands[0]["size"])]
    texts = [
        data[int(at) + 72 : int(at) + int(size)] for at, size in zip(mappings["offset"], mappings["size"], strict=True)
    ]
    assert any(text.startswith(b"/") for text in texts)


def test_a_watchpoint_sees_each_access() -> None:
    watched = ctypes.c_uint64(0)
    address = ctypes.addressof(watched)
    kind = samples.ADDR | samples.TID
    event = Event(BREAKPOINT, 0, config1=address, config2=8, breakpoint_type=RW, sample_type=kind, disabled=True)
    try:
        opened = ring(event)
    except NativeError as refused:
        pytest.skip(f"no hardware watchpoint is free: {refused}")
    opened.enable()
    for value in range(100):
        watched.value = value
    opened.disable()
    rows = Decoder([Layout(kind)]).decode(drain(opened)).samples
    assert set(rows["addr"]) == {address}
    assert len(rows) in (100, 200)  # ctypes may read before it writes


def test_a_group_counts_by_id() -> None:
    # Two kinds of fault: Linux 6.18 writes the first event's id into the samples of all events of one kind.
    leader = ring(replace(FAULTS, sample_type=samples.IDENTIFIER | samples.ADDR))
    kind = samples.IDENTIFIER | samples.ADDR | samples.TID
    member = ring(replace(FAULTS, config=PAGE_FAULTS, sample_type=kind), leader=leader)
    decoder = Decoder(
        [Layout(leader.event.sample_type), Layout(member.event.sample_type)],
        {leader.count().id: 0, member.count().id: 1},
    )
    pages = Pages(1)
    for opened in (leader, member):
        opened.enable()
    pages.touch(0)
    leader.disable()
    rows = pages.within(decoder.decode(drain(leader) + drain(member)).samples)
    assert rows["event"].tolist() == [0, 1]
    assert rows["tid"].tolist() == [0, threading.get_native_id()]
    assert rows["id"].tolist() == [leader.count().id, member.count().id]


def test_a_quarter_full_wakes_epoll() -> None:
    pages, opened = Pages(300), ring(FAULTS, nbytes=OS_PAGE)
    poll = select.poll()
    poll.register(opened.fd, select.POLLIN)
    opened.enable()
    pages.touch(0)
    assert poll.poll(0) == []
    for page in range(1, 300):
        pages.touch(page * OS_PAGE)
    opened.disable()
    assert poll.poll(1000) == [(opened.fd, select.POLLIN)]


def test_refusals_name_the_event_and_what_to_do() -> None:
    ring(FAULTS).close()
    with pytest.raises(NativeError, match=r"event 0x5 of type 1 for pid 0.*no power of two") as refused:
        Ring(FAULTS, 0, -1, nbytes=3 * OS_PAGE)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(NativeError, match="inherit lacks a cpu"):
        Ring(replace(FAULTS, inherit=True), 0, -1)
    with pytest.raises(NativeError, match="no such event"):
        Ring(Event(0x7FFFFFF0, 0, sample_type=samples.IP), 0, -1)
    with pytest.raises(NativeError, match="the process has ended"):
        Ring(FAULTS, 2**22 + 1, -1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NativeError, match="no such event"):
        Ring(FAULTS, 0, -1, aux_nbytes=OS_PAGE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_right_names_the_setting_and_the_capability() -> None:
    if os.getuid() == 0 or int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) < 1:
        pytest.skip("may sample whole CPUs, which an unprivileged user may not")
    with pytest.raises(NativeError, match=r"perf_event_paranoid.*CAP_PERFMON"):
        Ring(FAULTS, -1, 0)


def test_buffers_are_checked() -> None:
    pages, opened = Pages(1), ring(FAULTS)
    opened.enable()
    pages.touch(0)
    opened.disable()
    with pytest.raises(NativeError, match="longer than the buffer of 16 bytes"):
        opened.read(bytearray(16))
    with pytest.raises((TypeError, BufferError, ValueError)):
        opened.read(bytes(4096))
    with pytest.raises(NativeError, match="cannot read"):
        opened.read_aux(bytearray(16))
    opened.close()
    with pytest.raises(Closed):
        opened.read(bytearray(4096))
