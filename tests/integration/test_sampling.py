"""Sampling by page tables on the real kernel: touches of sampled pages are told, no others are, and nothing is lost."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import numpy.typing as npt
import pytest

from tests.integration.child import Child
from tiermem import _native
from tiermem.sampler.client import ClientSampling, Order, Report, member_of
from tiermem.segment import open_backing
from tiermem.types import PAGE_BYTES

PAGES, HUGETLB_PAGES = 64, 8
FULL = Order("present", epoch_s=0.002, budget=1.0)
LIBC = ctypes.CDLL(None, use_errno=True)
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x02, 0x10, 0x20, 0x100000
SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER = 425, 427

# Touches a random quarter of the pages in each epoch, tells sampled pages, touched ones, false alarms and misses.
PATTERN = """
import json
import numpy as np
from tiermem import _native
from tiermem.sampler.client import ClientSampling, Order, member_of
path, rung = sys.argv[1:3]
pages, seed, epochs, low, high = map(int, sys.argv[3:])
range_ = _native.Range.reserve(pages << 21)
fd = os.open(path, os.O_RDONLY)
range_.map(0, fd, pages << 21)
content = np.frombuffer(range_.buffer(), np.uint8)
random = np.random.default_rng(seed)
sampling = ClientSampling()
sampling.add("model", member_of("model", range_, pages))
sampling.configure(Order(rung, 0.002, 1.0))
say("ready")
pause()
told = dict(sampled=0, touched=0, false=0, missed=0, untrackable=0, refused="")
touched_s = np.full(pages, -np.inf)  # a window may span several epochs: nothing is due while the process had no CPU
for _ in range(epochs):
    hot = random.random(pages) < 0.25
    touched_s[hot] = time.monotonic()
    content[np.flatnonzero(hot).astype(np.int64) * (2 << 20) + random.integers(low, high, hot.sum())].sum()
    until = time.thread_time() + 0.002
    while time.thread_time() < until:
        pass
    report = sampling.tick(time.monotonic())
    if report is None:
        continue
    told["refused"] = report.refused
    told["untrackable"] += sum(map(len, report.untrackable.values()))
    for window in report.windows:
        seen, truth = window.bits.touched, touched_s[window.bits.pages] > window.bits.begin_s
        told["sampled"] += len(seen)
        told["touched"] += int((seen & truth).sum())
        told["false"] += int((seen & ~truth).sum())
        told["missed"] += int((~seen & truth).sum())
say(json.dumps(told))
pause()
"""


@pytest.fixture(params=["memfd", pytest.param("tmpfs", marks=pytest.mark.root)])
def file(request: pytest.FixtureRequest) -> Iterator[int]:
    with sealed(request.param, PAGES) as fd:
        yield fd


@contextmanager
def sealed(kind: str, pages: int) -> Iterator[int]:
    """A descriptor of a full segment of such a backing, in which page p starts with the byte p."""
    backing = open_backing(kind, None, pages * PAGE_BYTES)
    segment = backing.create("model", pages * PAGE_BYTES)
    segment.prefault(threads=2)
    np.frombuffer(segment.buffer(), np.uint8)[::PAGE_BYTES] = np.arange(pages)
    segment.seal()
    fd = segment.share()
    segment.close()
    yield fd
    os.close(fd)
    backing.close(keep=False)


def mapped(fd: int, pages: int = PAGES, *, cow: bool = False) -> tuple[_native.Range, npt.NDArray[np.uint8]]:
    range_ = _native.Range.reserve(pages * PAGE_BYTES, _native.Access.COW if cow else _native.Access.SHARED)
    range_.map(0, fd, pages * PAGE_BYTES)
    return range_, np.frombuffer(range_.buffer(), np.uint8)


def busy(sampling: ClientSampling) -> Report | None:
    until = time.thread_time() + 0.0003
    while time.thread_time() < until:
        pass
    return sampling.tick(time.monotonic())


def map_anonymous(address: int, nbytes: int, how: int) -> None:
    """Memory of the process's own at this address."""
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    got = LIBC.mmap(address, nbytes, 3, MAP_PRIVATE | MAP_ANONYMOUS | how, -1, 0)
    assert got == address, os.strerror(ctypes.get_errno())


ANYWHERE = (0, PAGE_BYTES)
# Of a page: near its end a processor fetches ahead from the next one, which sets that one's accessed bit.
INSIDE = (65536, PAGE_BYTES - 65536)


def told_by_children(
    fd: int, pages: int, rung: str, children: int, epochs: int, where: tuple[int, int]
) -> list[dict[str, int]]:
    """What processes that sample at the same time, each its own touches of the same file, found."""
    with ExitStack() as stack:
        path = f"/proc/{os.getpid()}/fd/{fd}"
        running = [
            stack.enter_context(Child.script(PATTERN, path, rung, pages, seed, epochs, *where))
            for seed in range(children)
        ]
        for child in running:
            assert child.line() == "ready"
        for child in running:
            child.say()
        return [json.loads(child.line()) for child in running]


def assert_true(told: dict[str, int], false_in: int | None = None, missed_in: int = 500) -> None:
    """No false alarm, or at most one in `false_in` sampled pages; of touches at most one, and one in `missed_in`, is
    missed: the kernel may unmap a page of its own accord (reclaim) between touch and look."""
    assert told["untrackable"] == 0, told
    assert told["false"] == 0 if false_in is None else told["false"] * false_in <= told["sampled"], told
    assert told["missed"] <= 1 + told["touched"] // missed_in, told


def test_every_touch_of_a_sampled_page_is_told_and_no_other(file: int) -> None:
    for told in told_by_children(file, PAGES, "present", 3, 60, ANYWHERE):
        assert_true(told)
        assert told["sampled"] > 5 * PAGES, told  # many more where there is a core for each
        assert told["touched"] > 0.15 * told["sampled"]


@pytest.mark.root
@pytest.mark.usefixtures("reserved")
def test_every_touch_is_told_on_reserved_pages() -> None:
    with sealed("hugetlb", HUGETLB_PAGES) as fd:
        for told in told_by_children(fd, HUGETLB_PAGES, "present", 2, 60, ANYWHERE):
            assert_true(told)
            assert told["touched"] > 0.15 * told["sampled"] > 0


def test_accessed_bits_tell_the_same(file: int) -> None:
    for told in told_by_children(file, PAGES, "accessed", 2, 25, INSIDE):
        # A load that the processor makes on speculation, and takes back, sets the bit all the same.
        # The kernel clears the bits and leaves TLBs alone: a touch by a translation that is still there sets none.
        assert_true(told, false_in=200, missed_in=20)
        assert told["sampled"] >= 5 * PAGES, told
        assert told["touched"] > 0.15 * told["sampled"]


@pytest.mark.root
@pytest.mark.usefixtures("reserved")
def test_reserved_pages_show_no_accessed_bits_and_this_is_said() -> None:
    with sealed("hugetlb", HUGETLB_PAGES) as fd:
        (told,) = told_by_children(fd, HUGETLB_PAGES, "accessed", 1, 5, INSIDE)
    assert told["sampled"] == 0
    assert told["untrackable"] == HUGETLB_PAGES
    assert "reserved" in str(told["refused"])


def test_writes_to_copy_on_write_mappings_outlive_hundreds_of_epochs(file: int) -> None:
    """The property: whatever is sampled around it, a client's own bytes stay; shared bytes do too."""
    random = np.random.default_rng(5)
    sampling = ClientSampling()
    shared = [mapped(file) for _ in range(2)]
    own = [mapped(file, cow=True) for _ in range(2)]
    for number, (range_, _) in enumerate([*shared, *own]):
        sampling.add(str(number), member_of(str(number), range_, PAGES))
    sampling.configure(FULL)
    places = [random.choice(PAGES * 512, 300, replace=False) * 4096 + 1 for _ in own]
    expected = [content[where].copy() for (_, content), where in zip(own, places, strict=True)]
    sampled = 0
    for _ in range(400):
        which = int(random.integers(len(own)))
        at = random.integers(300, size=4)
        expected[which][at] = random.integers(1, 256, 4, np.uint8)
        own[which][1][places[which][at]] = expected[which][at]
        shared[0][1][random.integers(PAGES, size=8) * PAGE_BYTES].sum()
        report = busy(sampling)
        for window in report.windows if report else ():
            assert window.key in ("0", "1")
            sampled += len(window.bits.pages)
        if _ % 20 == 0:
            for (range_, content), where, values in zip(own, places, expected, strict=True):
                assert not range_.closed
                np.testing.assert_array_equal(content[where], values)
    assert sampled > 50 * PAGES
    for _range, content in shared:
        np.testing.assert_array_equal(content[::PAGE_BYTES], np.arange(PAGES))


def test_locked_pages_are_told_untrackable_and_sampled_again_once_unlocked(file: int) -> None:
    range_, content = mapped(file)
    lock = (ctypes.c_void_p(range_.address + 5 * PAGE_BYTES), ctypes.c_size_t(4096))
    if LIBC.mlock(*lock):
        pytest.skip("lacks the right to lock 4 KiB in memory (ulimit -l)")
    content[::PAGE_BYTES].sum()
    sampling = ClientSampling()
    sampling.add("a", member_of("a", range_, PAGES))
    sampling.configure(FULL)
    told: dict[str, list[int]] = {}
    for _ in range(20):
        report = busy(sampling)
        if report:
            told |= {key: pages.tolist() for key, pages in report.untrackable.items()}
            last = report
    assert told == {"a": [5]}
    assert "locked" in last.refused
    assert 5 not in last.windows[0].bits.pages
    assert LIBC.munlock(*lock) == 0
    sampled: set[int] = set()
    for _ in range(20):
        report = busy(sampling)
        if report:
            told |= {key: pages.tolist() for key, pages in report.untrackable.items()}
            sampled.update(page for window in report.windows for page in window.bits.pages.tolist())
            last = report
    assert told == {"a": []}
    assert last.refused == ""
    assert 5 in sampled


def test_memory_mapped_over_a_part_of_the_range_keeps_its_content(file: int) -> None:
    range_, content = mapped(file)
    sampling = ClientSampling()
    sampling.add("a", member_of("a", range_, PAGES))
    sampling.configure(FULL)
    for _ in range(10):
        busy(sampling)
    # Two OS pages in the middle of page 7, all of page 20.
    map_anonymous(range_.address + 7 * PAGE_BYTES + 40960, 8192, MAP_FIXED)
    map_anonymous(range_.address + 20 * PAGE_BYTES, PAGE_BYTES, MAP_FIXED)
    own = [slice(7 * PAGE_BYTES + 40960, 7 * PAGE_BYTES + 49152), slice(20 * PAGE_BYTES, 21 * PAGE_BYTES)]
    for part in own:
        ctypes.memset(range_.address + part.start, 0xA5, part.stop - part.start)
    untrackable: list[int] = []
    for _ in range(60):
        content[::PAGE_BYTES].sum()
        report = busy(sampling)
        if report and "a" in report.untrackable:
            untrackable = report.untrackable["a"].tolist()
    assert untrackable == [7, 20]
    for part in own:
        assert (content[part] == 0xA5).all()


def test_ranges_end_while_another_thread_samples_and_whoever_gets_the_addresses_keeps_his_content() -> None:
    sampling = ClientSampling()
    sampling.configure(Order("present", epoch_s=0.001, budget=1.0))
    stop, failed = threading.Event(), list[BaseException]()

    def sample() -> None:
        try:
            while not stop.is_set():
                sampling.tick(time.monotonic())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    fd, taken = os.memfd_create("model", os.MFD_CLOEXEC), []
    os.truncate(fd, 4 * PAGE_BYTES)
    try:
        for number in range(150):
            range_, content = mapped(fd, 4)
            sampling.add(str(number), member_of(str(number), range_, 4))
            assert content[::PAGE_BYTES].sum() == 0
            reference = range_.reference()
            range_.close()
            del range_, content
            while not reference.closed:  # a call may be inside
                pass
            map_anonymous(reference.address, 4 * PAGE_BYTES, MAP_FIXED_NOREPLACE)
            taken.append(reference.address)
            for page in range(4):
                ctypes.memset(reference.address + page * PAGE_BYTES, 7, 64)
            time.sleep(0.0003)
            assert all(ctypes.string_at(reference.address + page * PAGE_BYTES, 64) == b"\7" * 64 for page in range(4))
    finally:
        stop.set()
        thread.join()
        os.close(fd)
        for address in taken:
            LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE_BYTES))
    assert not failed


def test_memory_registered_with_io_uring_by_someone_makes_all_pages_untrackable(file: int) -> None:
    ring = LIBC.syscall(SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(256))
    if ring < 0:
        pytest.skip(f"lacks io_uring: {os.strerror(ctypes.get_errno())}")
    buffer = ctypes.create_string_buffer(8192)
    vector = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(buffer), 8192), 16)
    range_, content = mapped(file)
    sampling = ClientSampling()
    sampling.add("a", member_of("a", range_, PAGES))
    sampling.configure(FULL)
    try:
        if LIBC.syscall(SYS_IO_URING_REGISTER, ring, 0, vector, 1) < 0:
            pytest.skip(f"lacks registered buffers: {os.strerror(ctypes.get_errno())}")
        report = busy(sampling)
        assert report is not None
        assert report.untrackable["a"].tolist() == list(range(PAGES))
        assert "VmPin" in report.refused
    finally:
        with suppress(OSError):
            os.close(ring)
    deadline = time.monotonic() + 5  # the kernel unpins in the background
    while time.monotonic() < deadline and not (report and report.windows):
        report = busy(sampling)
    assert report is not None
    assert report.refused == ""
    assert content[0] == 0
