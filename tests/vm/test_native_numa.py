"""Pages move between two nodes, stay what they are, and where they do not move, the cause is told."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.vm import os_pages
from tiermem import _native
from tiermem.errors import NativeError
from tiermem.types import PAGE_BYTES

pytestmark = pytest.mark.numa
PAGES = 8
EVERY = np.arange(PAGES, dtype=np.uint32)
NODES = Path("/sys/devices/system/node")

Maker = Callable[[int], _native.Segment]


def tmpfs(pages: int, nodes: int = 1) -> _native.Segment:
    """A prefaulted segment on 2 MiB OS pages."""
    dirfd = _native.tmpfs_detached((pages + 1) * PAGE_BYTES)
    segment = _native.Segment.create(dirfd, "pages", pages * PAGE_BYTES)
    os.close(dirfd)
    segment.prefault(threads=3, nodes=nodes)
    return segment


def memfd(pages: int, nodes: int = 1) -> _native.Segment:
    """The same on small OS pages."""
    segment = _native.Segment.create(-1, "pages", pages * PAGE_BYTES)
    segment.prefault(threads=3, nodes=nodes)
    return segment


@pytest.fixture(params=[tmpfs, memfd], ids=["2 MiB OS pages", "small OS pages"])
def make(request: pytest.FixtureRequest) -> Maker:
    made: Maker = request.param
    return made


def nodes_of(segment: _native.Segment) -> list[list[int]]:
    """For each page, the nodes of its OS pages as the kernel tells them."""
    found = np.array(os_pages.nodes_of(segment.address, segment.nbytes)).reshape(segment.nbytes // PAGE_BYTES, -1)
    return [sorted(set(page.tolist())) for page in found]


def huge(segment: _native.Segment) -> int:
    return os_pages.huge_bytes(segment.address, segment.nbytes)


def free_bytes(node: int) -> int:
    for line in (NODES / f"node{node}" / "meminfo").read_text().splitlines():
        if "MemFree:" in line:
            return int(line.split()[3]) << 10
    raise AssertionError(f"no MemFree of node {node}")


def pinned(segment: _native.Segment, page: int, until: ExitStack) -> None:
    """Hold an OS page of it as a device would: a pipe has a reference to the memory itself."""
    out, into = os.pipe()
    until.callback(os.close, out)
    until.callback(os.close, into)
    vector = (ctypes.c_uint64 * 2)(segment.address + page * PAGE_BYTES + 5 * 4096, 4096)
    assert ctypes.CDLL(None).vmsplice(into, vector, ctypes.c_ulong(1), 0) == 4096


def mapper(segment: _native.Segment, pages: list[int], until: ExitStack) -> None:
    """Another process that maps it and has read these pages."""
    fd, (out, into) = segment.share(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            range_ = _native.Range.reserve(segment.nbytes)
            range_.map(0, fd, segment.nbytes)
            np.frombuffer(range_.buffer(), np.uint8).reshape(-1, PAGE_BYTES)[pages, ::4096].sum()
            os.write(into, b"!")
            signal.pause()
        finally:
            os._exit(1)
    until.callback(os.waitpid, child, 0)
    until.callback(os.kill, child, signal.SIGKILL)
    assert os.read(out, 1) == b"!"
    for each in (fd, out, into):
        os.close(each)


def test_pages_move_both_ways_with_their_bytes_and_in_one_piece(make: Maker) -> None:
    numa, segment = _native.Numa(), make(PAGES)
    content = np.frombuffer(segment.buffer(), np.uint64)
    content[:] = np.arange(len(content))
    segment.seal()
    before = huge(segment)
    assert before == (segment.nbytes if make is tmpfs else 0)
    assert numa.move(segment, EVERY[::3], 1, shared=False).tolist() == [_native.MOVED] * 3
    assert numa.where(segment, 0, PAGES).tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    assert nodes_of(segment) == [[1], [0], [0], [1], [0], [0], [1], [0]]
    results = numa.move(segment, EVERY, 1, shared=False)
    assert results.tolist() == [_native.MOVED if page % 3 else _native.WAS_THERE for page in range(PAGES)]
    assert nodes_of(segment) == [[1]] * PAGES
    assert numa.move(segment, EVERY, 0, shared=True).tolist() == [_native.MOVED] * PAGES
    assert numa.where(segment, 0, PAGES).tolist() == [0] * PAGES
    assert nodes_of(segment) == [[0]] * PAGES
    assert huge(segment) == before
    assert np.array_equal(np.frombuffer(segment.buffer(), np.uint64), np.arange(len(content)))


def test_more_pages_than_go_in_one_call(make: Maker) -> None:
    numa, segment = _native.Numa(), make(40)
    odd = np.arange(1, 40, 2, dtype=np.uint32)
    assert not numa.move(segment, odd, 1, shared=True).any()
    assert numa.where(segment, 0, 40).tolist() == [0, 1] * 20


def test_pages_that_others_map_move_only_if_that_is_asked_for(make: Maker) -> None:
    numa, segment = _native.Numa(), make(PAGES)
    before = huge(segment)
    with ExitStack() as until:
        mapper(segment, EVERY.tolist(), until)
        assert numa.move(segment, EVERY, 1, shared=False).tolist() == [-errno.EACCES] * PAGES
        assert nodes_of(segment) == [[0]] * PAGES
        assert numa.move(segment, EVERY, 1, shared=True).tolist() == [_native.MOVED] * PAGES
        assert nodes_of(segment) == [[1]] * PAGES
        assert huge(segment) == before


def test_a_page_in_use_stays_and_all_others_are_tried(make: Maker) -> None:
    numa, segment = _native.Numa(), make(2 * PAGES)
    with ExitStack() as until:
        for page in (0, 5, 6):
            pinned(segment, page, until)
        results = numa.move(segment, np.arange(2 * PAGES, dtype=np.uint32), 1, shared=True)
        assert np.flatnonzero(results == -errno.EBUSY).tolist() == [0, 5, 6]
        assert np.count_nonzero(results == _native.MOVED) == 2 * PAGES - 3
        expected = [0] if make is tmpfs else [0, 1]  # a part of the small ones can move
        assert [nodes_of(segment)[page] for page in (0, 4, 5, 7)] == [expected, [1], expected, [1]]
        where = numa.where(segment, 0, 2 * PAGES)
        assert set(where[[0, 5, 6]]) == {0 if make is tmpfs else _native.NODE_MIXED}
    assert numa.move(segment, EVERY[[0, 5, 6]], 1, shared=True).tolist() == [_native.MOVED] * 3
    assert nodes_of(segment) == [[1]] * 2 * PAGES


def test_each_page_has_its_own_cause(make: Maker) -> None:
    numa, segment = _native.Numa(), make(PAGES)
    with ExitStack() as until:
        mapper(segment, [2, 5], until)
        for page in (1, 3):
            pinned(segment, page, until)
        moved, busy, denied = _native.MOVED, -errno.EBUSY, -errno.EACCES
        results = numa.move(segment, EVERY, 1, shared=False)
        assert results.tolist() == [moved, busy, denied, busy, moved, denied, moved, moved]
        assert [page for page in range(PAGES) if nodes_of(segment)[page] == [1]] == [0, 4, 6, 7]


@pytest.fixture
def reserved() -> Iterator[None]:
    """Reserved 2 MiB OS pages on node 0; for those that leave, the kernel takes whole ones from the target."""
    file = NODES / "node0/hugepages/hugepages-2048kB/nr_hugepages"
    file.write_text(str(PAGES))
    yield
    file.write_text("0")


@pytest.mark.usefixtures("reserved")
def test_reserved_pages_move_too() -> None:
    numa, segment = _native.Numa(), _native.Segment.create(-1, "reserved", PAGES * PAGE_BYTES, hugetlb=True)
    assert numa.where(segment, 0, PAGES).tolist() == [_native.NODE_ABSENT] * PAGES
    segment.prefault(nodes=1)
    assert nodes_of(segment) == [[0]] * PAGES
    assert numa.move(segment, EVERY, 1, shared=False).tolist() == [_native.MOVED] * PAGES
    assert numa.where(segment, 0, PAGES).tolist() == [1] * PAGES
    assert nodes_of(segment) == [[1]] * PAGES


def test_what_does_not_fit_is_told_and_few_pages_are_split(make: Maker) -> None:
    numa, pages = _native.Numa(), 60
    segment = make(pages)
    ballast = tmpfs((free_bytes(1) - (70 << 20)) // PAGE_BYTES, nodes=2)
    assert set(_native.Numa().where(ballast, 0, ballast.nbytes // PAGE_BYTES)) == {1}
    results = numa.move(segment, np.arange(pages, dtype=np.uint32), 1, shared=True)
    assert set(results.tolist()) == {_native.MOVED, -errno.ENOMEM}
    where = numa.where(segment, 0, pages)
    assert (where[results == _native.MOVED] == 1).all()
    assert (where[results != _native.MOVED] != 1).all()
    assert np.count_nonzero(where == 0) > pages // 3
    if make is tmpfs:
        assert segment.nbytes - huge(segment) <= 16 * PAGE_BYTES
    ballast.close()
    assert (numa.move(segment, np.arange(pages, dtype=np.uint32), 1, shared=True) >= 0).all()
    assert nodes_of(segment) == [[1]] * pages


def test_a_prefault_puts_new_pages_where_they_are_wanted(make: Callable[[int, int], _native.Segment]) -> None:
    segment = make(3 * PAGES, 1 << 1)
    assert nodes_of(segment) == [[1]] * 3 * PAGES
    plain = _native.Segment.create(-1, "plain", PAGE_BYTES)
    plain.prefault()
    assert nodes_of(plain) == [[0]], "the wish outlived its call"


def test_a_probe_lies_where_it_should() -> None:
    for nodes in (1, 2):
        assert _native.Probe(8 * PAGE_BYTES, nodes).nodes == nodes


def test_an_offline_node_and_a_missing_right_fail_the_call(make: Maker) -> None:
    segment = make(PAGES)
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: or /proc/self stays root's until the next exec
            numa = _native.Numa()
            with pytest.raises(NativeError) as caught:
                numa.move(segment, EVERY, 1, shared=True)
            assert caught.value.errno == errno.EPERM
            assert numa.where(segment, 0, PAGES).tolist() == [0] * PAGES
            with pytest.raises(NativeError) as caught:
                numa.move(segment, EVERY, 7, shared=False)
            assert caught.value.errno == errno.ENODEV
            own = memfd(1)
            assert numa.move(own, EVERY[:1], 1, shared=False).tolist() == [_native.MOVED]
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
