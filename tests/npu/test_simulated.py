"""The simulated ACL itself, without torch: memory that the host cannot touch, streams, events, faults, the log."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.npu.conftest import CAPACITY
from tests.sim_acl import library
from tests.sim_acl.control import DMA_FAILED, LOST_HEARTBEAT, OUT_OF_MEMORY, Fault, SimulatedAcl

H2D, D2H, D2D = 1, 2, 3
MIB = 1 << 20
CONTEXT_NULL, PARAM_INVALID, INVALID_MEMORY_TYPE = 107002, 107000, 107016


class Acl:
    """Calls of ACL by name, without the prefix. A status other than 0 raises AclError, except in `status`."""

    def __init__(self, directory: Path) -> None:
        self._library = library.load(directory)
        self.status("SetDevice", 0)

    def status(self, name: str, *arguments: Any) -> int:
        return int(self._library[f"aclrt{name}"](*arguments))

    def __call__(self, name: str, *arguments: Any) -> None:
        if status := self.status(name, *arguments):
            raise AclError(name, status)

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """What a function gives through its first argument."""
        value = ctypes.c_void_p()
        self(name, ctypes.byref(value), *arguments)
        return value

    def malloc(self, nbytes: int) -> ctypes.c_void_p:
        return self.made("Malloc", ctypes.c_size_t(nbytes), 0)

    def copy(self, to: Any, source: Any, nbytes: int, kind: int, stream: Any = None) -> int:
        what = to, ctypes.c_size_t(nbytes), source, ctypes.c_size_t(nbytes), kind
        return self.status("MemcpyAsync", *what, stream) if stream else self.status("Memcpy", *what)

    def free_bytes(self) -> int:
        left, whole = ctypes.c_size_t(), ctypes.c_size_t()
        self("GetMemInfo", 1, ctypes.byref(left), ctypes.byref(whole))
        assert whole.value == CAPACITY
        return left.value


class AclError(Exception):
    pass


@pytest.fixture
def api(libraries: Path, acl: SimulatedAcl) -> Acl:
    return Acl(libraries)


@pytest.fixture
def block(api: Acl) -> Iterator[ctypes.c_void_p]:
    """4 MiB of device memory."""
    address = api.malloc(4 * MIB)
    yield address
    api.status("Free", address)


@pytest.fixture
def streams(api: Acl, acl: SimulatedAcl) -> Iterator[Callable[[], ctypes.c_void_p]]:
    """`streams()`: a new stream that stops at its first failure."""
    made: list[ctypes.c_void_p] = []

    def new() -> ctypes.c_void_p:
        made.append(api.made("CreateStream"))
        api("SetStreamFailureMode", made[-1], ctypes.c_uint64(1))
        return made[-1]

    yield new
    acl.heal()
    for stream in made:
        api("DestroyStreamForce", stream)


def test_copies_there_and_back(api: Acl, block: ctypes.c_void_p) -> None:
    for nbytes in (0, 1, 4095, 4097, 4 * MIB):
        sent = bytes(i * 7 % 251 for i in range(min(nbytes, 65536))) * (nbytes // 65536 or 1)
        got = ctypes.create_string_buffer(nbytes + 1)
        assert api.copy(block, sent, len(sent), H2D) == 0
        assert api.copy(got, block, len(sent), D2H) == 0
        assert got.raw[: len(sent)] == sent


def test_refuses_what_a_copy_cannot_be(api: Acl, block: ctypes.c_void_p) -> None:
    host = ctypes.create_string_buffer(16)
    assert api.copy(host, block, 16, H2D) == INVALID_MEMORY_TYPE
    assert api.copy(block, host, 16, D2D) == INVALID_MEMORY_TYPE
    behind = ctypes.c_void_p((block.value or 0) + 4 * MIB - 8)
    assert api.copy(behind, host, 16, H2D) == PARAM_INVALID
    api("Free", block)
    assert api.copy(block, host, 16, H2D) != 0


def test_capacity_is_capped_and_comes_back(api: Acl, acl: SimulatedAcl) -> None:
    before = api.free_bytes()
    most = api.malloc(before)
    assert api.free_bytes() == 0
    with pytest.raises(AclError, match=str(OUT_OF_MEMORY)):
        api.malloc(1)
    api("Free", most)
    assert api.free_bytes() == before
    assert api.status("Free", most) == PARAM_INVALID


def test_a_thread_without_a_device_has_no_context(api: Acl) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(api.status("SynchronizeDevice")))
    thread.start()
    thread.join()
    assert statuses == [CONTEXT_NULL]


def test_copies_are_asynchronous_and_in_order(
    api: Acl, acl: SimulatedAcl, block: ctypes.c_void_p, streams: Callable[[], ctypes.c_void_p]
) -> None:
    stream, position = streams(), acl.position()
    acl.set_delays(copy_us_per_mib=100_000)
    host = [ctypes.create_string_buffer(bytes([value]) * MIB) for value in (1, 2)]
    began = time.monotonic()
    for buffer in host:
        assert api.copy(block, buffer, MIB, H2D, stream) == 0
    assert time.monotonic() - began < 0.1  # both together take twice as long
    api("SynchronizeStream", stream)
    assert time.monotonic() - began >= 0.2
    first, second = acl.calls(position, "aclrtMemcpyAsync")
    assert 0 < first.issued < second.issued < first.ended < second.begun < second.ended
    assert first.stream == stream.value
    assert (first.bytes, first.detail) == (MIB, "h2d pageable")


def test_an_event_orders_two_streams_and_only_those(
    api: Acl, acl: SimulatedAcl, block: ctypes.c_void_p, streams: Callable[[], ctypes.c_void_p]
) -> None:
    copying, waiting, free = streams(), streams(), streams()
    event, position = api.made("CreateEvent"), acl.position()
    acl.set_delays(copy_us_per_mib=100_000)
    host, got = ctypes.create_string_buffer(b"\7" * MIB), ctypes.create_string_buffer(16)
    assert api.copy(block, host, MIB, H2D, copying) == 0
    api("RecordEvent", event, copying)
    api("StreamWaitEvent", waiting, event)
    assert api.copy(got, block, 16, D2H, waiting) == 0
    assert api.copy(ctypes.create_string_buffer(16), block, 16, D2H, free) == 0
    recorded = ctypes.c_int32(1)
    api("QueryEventStatus", event, ctypes.byref(recorded))
    assert recorded.value == 0
    api("SynchronizeStream", waiting)
    api("QueryEventStatus", event, ctypes.byref(recorded))
    assert recorded.value == 1
    assert got.raw == b"\7" * 16
    slow, ordered, unordered = acl.calls(position, "aclrtMemcpyAsync")
    assert unordered.ended < slow.ended < ordered.begun
    api("DestroyEvent", event)


def test_memory_freed_under_a_queued_copy_fails_the_copy(
    api: Acl, acl: SimulatedAcl, block: ctypes.c_void_p, streams: Callable[[], ctypes.c_void_p]
) -> None:
    stream = streams()
    acl.set_delays(copy_us_per_mib=100_000)
    host = ctypes.create_string_buffer(MIB)
    assert api.copy(block, host, MIB, H2D, stream) == 0
    api("Free", block)
    assert api.status("SynchronizeStream", stream) == DMA_FAILED


def test_the_nth_malloc_fails(api: Acl, acl: SimulatedAcl) -> None:
    acl.fail(Fault.MALLOC, first=2, count=2)
    got = []
    for _ in range(4):
        address = ctypes.c_void_p()
        got.append(api.status("Malloc", ctypes.byref(address), ctypes.c_size_t(MIB), 0))
        if not got[-1]:
            api("Free", address)
    assert got == [0, OUT_OF_MEMORY, OUT_OF_MEMORY, 0]


def test_a_failed_copy_stops_its_stream_and_those_that_wait(
    api: Acl, acl: SimulatedAcl, block: ctypes.c_void_p, streams: Callable[[], ctypes.c_void_p]
) -> None:
    failing, waiting, free = streams(), streams(), streams()
    event, host = api.made("CreateEvent"), ctypes.create_string_buffer(b"\7" * 16)
    acl.set_delays(copy_us_per_mib=1)
    acl.fail(Fault.COPY, first=2)
    assert api.copy(block, b"\0" * 16, 16, H2D) == 0
    assert api.copy(block, host, 16, H2D, failing) == 0
    api.status("RecordEvent", event, failing)
    api.status("StreamWaitEvent", waiting, event)
    assert api.status("SynchronizeStream", failing) == DMA_FAILED
    assert api.status("SynchronizeStream", waiting) == DMA_FAILED
    assert api.status("SynchronizeStream", free) == 0
    assert api.copy(block, host, 16, H2D, failing) == DMA_FAILED
    got = ctypes.create_string_buffer(16)
    assert api.copy(got, block, 16, D2H) == 0
    assert got.raw == b"\7" * 8 + b"\0" * 8  # half of it
    acl.heal()
    assert api.copy(block, host, 16, H2D, failing) == 0
    assert api.status("SynchronizeStream", failing) == 0
    api("DestroyEvent", event)


def test_a_lost_device_fails_calls_and_queued_work(
    api: Acl, acl: SimulatedAcl, block: ctypes.c_void_p, streams: Callable[[], ctypes.c_void_p]
) -> None:
    stream, host = streams(), ctypes.create_string_buffer(MIB)
    acl.set_delays(copy_us_per_mib=50_000)
    position = acl.position()
    acl.lose_device(first=2)
    assert api.copy(block, host, MIB, H2D, stream) == 0
    assert api.status("SynchronizeStream", stream) == LOST_HEARTBEAT
    assert api.status("Malloc", ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1), 0) == LOST_HEARTBEAT
    deadline = time.monotonic() + 20
    while not (call := acl.calls(position, "aclrtMemcpyAsync")[0]).ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert call.status == LOST_HEARTBEAT


def test_pinned_and_registered_memory_is_counted(api: Acl, acl: SimulatedAcl, block: ctypes.c_void_p) -> None:
    before = acl.pinned_bytes()
    pinned = api.made("MallocHost", ctypes.c_size_t(MIB))
    buffer = ctypes.create_string_buffer(MIB)
    api("HostRegister", buffer, ctypes.c_uint64(MIB), 0, None)
    assert acl.pinned_bytes() == before + 2 * MIB
    assert api.status("HostRegister", buffer, ctypes.c_uint64(MIB), 0, None) == PARAM_INVALID
    position = acl.position()
    for source in (pinned, buffer):
        assert api.copy(block, source, MIB, H2D) == 0
    assert [call.detail for call in acl.calls(position, "aclrtMemcpy")] == ["h2d pinned"] * 2
    api("FreeHost", pinned)
    api("HostUnregister", buffer)
    assert acl.pinned_bytes() == before


def test_the_log_counts_more_than_it_keeps(api: Acl, acl: SimulatedAcl) -> None:
    before = acl.count("aclrtGetDevice")
    device = ctypes.c_int32()
    for _ in range(70_000):
        api.status("GetDevice", ctypes.byref(device))
    assert acl.count("aclrtGetDevice") == before + 70_000
    kept = acl.calls()
    assert len(kept) == 65536
    assert [call.number for call in kept] == list(range(acl.position() - 65535, acl.position() + 1))
