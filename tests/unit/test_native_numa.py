"""Nodes of memory as far as a machine with one node shows them; tests/vm has the moves between two."""

from __future__ import annotations

import ctypes
import errno
import os
import traceback
from collections.abc import Iterator

import numpy as np
import pytest

from tiermem import _native
from tiermem.errors import Closed, NativeError
from tiermem.types import PAGE_BYTES

PAGES = 6
PR_SET_DUMPABLE = 4
MADV_DONTNEED = 4
EVERY = np.arange(PAGES, dtype=np.uint32)


@pytest.fixture(autouse=True)
def one_node() -> None:
    with open("/sys/devices/system/node/has_memory") as file:
        if file.read().strip() != "0":
            pytest.skip("node 0 is not the only one")


@pytest.fixture(params=["small OS pages", pytest.param("2 MiB OS pages", marks=pytest.mark.root)])
def segment(request: pytest.FixtureRequest) -> Iterator[_native.Segment]:
    """A segment that nobody has touched."""
    if request.param == "small OS pages":
        yield _native.Segment.create(-1, "pages", PAGES * PAGE_BYTES)
    else:
        dirfd = _native.tmpfs_detached(2 * PAGES * PAGE_BYTES)
        yield _native.Segment.create(dirfd, "pages", PAGES * PAGE_BYTES)
        os.close(dirfd)


def allocated(segment: _native.Segment) -> int:
    fd = segment.share()
    try:
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def test_a_page_is_nowhere_until_it_is_prefaulted_and_asking_allocates_nothing(segment: _native.Segment) -> None:
    numa = _native.Numa()
    assert numa.where(segment, 0, PAGES).tolist() == [_native.NODE_ABSENT] * PAGES
    assert allocated(segment) == 0
    segment.prefault(2 * PAGE_BYTES, 2 * PAGE_BYTES, nodes=1)
    segment.seal()
    assert numa.where(segment, 1, 4).tolist() == [_native.NODE_ABSENT, 0, 0, _native.NODE_ABSENT]
    assert allocated(segment) == 2 * PAGE_BYTES


@pytest.mark.parametrize("shared", [False, True])
def test_a_move_to_where_a_page_is_does_nothing_and_needs_no_right(segment: _native.Segment, shared: bool) -> None:
    segment.prefault(0, 3 * PAGE_BYTES)
    expected = [_native.WAS_THERE] * 3 + [-errno.ENOENT] * 3
    assert _native.Numa().move(segment, EVERY, 0, shared=shared).tolist() == expected


def test_a_node_that_is_not_there_is_told_and_nothing_is_allocated_for_it(segment: _native.Segment) -> None:
    segment.prefault(0, PAGE_BYTES)
    with pytest.raises(NativeError, match="move 6 pages of segment pages to node 1") as caught:
        _native.Numa().move(segment, EVERY, 1, shared=False)
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(NativeError) as caught:
        segment.prefault(nodes=1 << 1)
    assert caught.value.errno == errno.ENODEV
    assert allocated(segment) == PAGE_BYTES
    segment.prefault(nodes=1 << 1 | 1)  # one of them is enough
    assert allocated(segment) == segment.nbytes


def test_a_prefault_leaves_the_policy_of_its_thread_as_it_was(segment: _native.Segment) -> None:
    def policy() -> str:
        with open("/proc/thread-self/numa_maps") as file:
            return next(line for line in file if " stack " in line).split()[1]

    before = policy()
    segment.prefault(threads=2, nodes=1)
    assert policy() == before == "default"


@pytest.mark.root
def test_reserved_pages_are_found_where_this_process_has_not_mapped_them(reserved: int) -> None:
    numa, segment = _native.Numa(), _native.Segment.create(-1, "reserved", 4 * PAGE_BYTES, hugetlb=True)
    segment.prefault(0, 2 * PAGE_BYTES)
    assert numa.where(segment, 0, 4).tolist() == [0, 0, _native.NODE_ABSENT, _native.NODE_ABSENT]
    segment.prefault()
    address = ctypes.c_void_p(segment.address)
    assert ctypes.CDLL(None).madvise(address, ctypes.c_size_t(segment.nbytes), MADV_DONTNEED) == 0
    assert numa.where(segment, 0, 4).tolist() == [0] * 4


def test_numbers_out_of_order_or_range_are_refused(segment: _native.Segment) -> None:
    numa = _native.Numa()
    segment.prefault()
    for pages, number in (([0, PAGES], _native.E_RANGE), ([1, 0], errno.EINVAL), ([2, 2], errno.EINVAL)):
        with pytest.raises(NativeError) as caught:
            numa.move(segment, np.array(pages, np.uint32), 0, shared=False)
        assert caught.value.errno == number
    with pytest.raises(NativeError) as caught:
        numa.where(segment, 1, PAGES)
    assert caught.value.errno == _native.E_RANGE
    assert len(numa.where(segment, PAGES, 0)) == len(numa.move(segment, EVERY[:0], 1, shared=False)) == 0


def test_closed_handles_say_so(segment: _native.Segment) -> None:
    numa, probe = _native.Numa(), _native.Probe(PAGE_BYTES, 0)
    for handle in (numa, probe):
        handle.close()
    with pytest.raises(Closed, match="numa"):
        numa.where(segment, 0, 1)
    with pytest.raises(Closed, match="probe"):
        probe.latency(1)
    segment.close()
    with pytest.raises(Closed, match="segment"):
        _native.Numa().move(segment, EVERY, 0, shared=False)


def test_a_forked_child_needs_its_own(segment: _native.Segment) -> None:
    numa = _native.Numa()
    segment.prefault()
    child = os.fork()
    if child == 0:
        try:
            assert _native.Numa().where(segment, 0, PAGES).tolist() == [0] * PAGES
            numa.where(segment, 0, PAGES)
        except NativeError as error:
            os._exit(error.errno or 255)
        finally:
            os._exit(254)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.ESRCH


def test_an_ordinary_user_may_ask_and_move_what_is_its_own() -> None:
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # or /proc/self stays root's until the next exec
            segment = _native.Segment.create(-1, "own", PAGE_BYTES)
            segment.prefault(nodes=1)
            numa = _native.Numa()
            assert numa.where(segment, 0, 1).tolist() == [0]
            with pytest.raises(NativeError) as caught:
                numa.move(segment, EVERY[:1], 1, shared=True)
            assert caught.value.errno == errno.EPERM
            with pytest.raises(NativeError) as caught:
                numa.move(segment, EVERY[:1], 1, shared=False)
            assert caught.value.errno == errno.ENODEV
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_probe_lies_where_it_should_and_tells_seconds_and_bytes_per_second() -> None:
    probe = _native.Probe(8 * PAGE_BYTES + 1, 1)
    assert probe.nbytes == 9 * PAGE_BYTES
    assert probe.nodes == 1
    assert 1e-10 < probe.latency(100_000) < 1e-4
    assert 1e7 < probe.bandwidth(2) < 1e13
    for nbytes, nodes, number in ((0, 1, _native.E_RANGE), (1, 1 << 63, errno.ENODEV), (1 << 59, 1, errno.ENOMEM)):
        with pytest.raises(NativeError) as caught:
            _native.Probe(nbytes, nodes)
        assert caught.value.errno == number
