"""Page tables through the door: states, zapping, and lifetimes of ranges that nobody but a call may keep."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tiermem import _native
from tiermem.errors import Closed, NativeError
from tiermem.types import PAGE_BYTES

PAGES = 8


@pytest.fixture
def memory_file() -> Iterator[int]:
    """A sparse memory file in which page p starts with the byte p + 1."""
    fd = os.memfd_create("pages", os.MFD_CLOEXEC)
    os.truncate(fd, PAGES * PAGE_BYTES)
    for page in range(PAGES):
        os.pwrite(fd, bytes([page + 1]), page * PAGE_BYTES)
    yield fd
    os.close(fd)


def mapped(fd: int, *, cow: bool = False) -> _native.Range:
    range_ = _native.Range.reserve(PAGES * PAGE_BYTES, _native.Access.COW if cow else _native.Access.SHARED)
    range_.map(0, fd, PAGES * PAGE_BYTES)
    return range_


def pages(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(numbers, np.uint32)


def test_touched_pages_are_present_until_they_are_zapped_and_keep_their_bytes(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    content = np.frombuffer(range_.buffer(), np.uint8)
    assert [content[page * PAGE_BYTES] for page in (1, 2, 6)] == [2, 3, 7]
    everything = np.arange(PAGES, dtype=np.uint32)
    present = pagemap.look(range_, everything) & _native.PRESENT
    assert np.flatnonzero(present).tolist() == [1, 2, 6]
    assert pagemap.zap(range_, pages(2, 6)).tolist() == [True, True]
    assert np.flatnonzero(pagemap.look(range_, everything)).tolist() == [1]
    assert content[::PAGE_BYTES].tolist() == list(range(1, PAGES + 1))


def test_pages_of_any_integer_dtype_are_taken_for_what_they_are(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    content = np.frombuffer(range_.buffer(), np.uint8)
    assert content[5 * PAGE_BYTES] == 6
    state = pagemap.look(range_, np.array([4, 5, 6], np.int64))  # type: ignore[arg-type]
    assert (state > 0).tolist() == [False, True, False]


def test_a_write_to_a_copy_on_write_page_is_seen_and_its_range_cannot_be_zapped(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file, cow=True), _native.Pagemap()
    content = np.frombuffer(range_.buffer(), np.uint8)
    assert content[PAGE_BYTES] == 2
    content[3 * PAGE_BYTES] = 99
    state = pagemap.look(range_, np.arange(PAGES, dtype=np.uint32))
    assert np.flatnonzero(state & _native.PRIVATE).tolist() == [3]
    for range_or_reference in (range_, range_.reference()):
        with pytest.raises(NativeError, match="copy-on-write"):
            pagemap.zap(range_or_reference, pages(1))
    assert content[3 * PAGE_BYTES] == 99


@pytest.mark.parametrize("wrong", [pages(PAGES), pages(0, PAGES), pages(3, 2), pages(2, 2)])
def test_pages_beyond_the_range_or_out_of_order_are_refused(memory_file: int, wrong: np.ndarray) -> None:  # type: ignore[type-arg]
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    with pytest.raises(NativeError) as refused:
        pagemap.zap(range_, wrong)
    assert refused.value.errno in (_native.E_RANGE, errno.EINVAL)


def test_no_pages_are_fine(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    assert len(pagemap.look(range_, pages())) == len(pagemap.zap(range_, pages())) == 0


def test_a_reference_lives_as_long_as_the_memory_and_does_not_prolong_it(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    reference = range_.reference()
    buffer = range_.buffer()
    range_.close()
    assert not reference.closed  # a buffer is left
    assert len(pagemap.look(reference, pages(0))) == 1
    handle = reference.live()
    del buffer
    gc.collect()
    assert not reference.closed  # a caller is inside
    del handle
    assert reference.closed
    with pytest.raises(Closed, match="unmapped"):
        pagemap.look(reference, pages(0))


def test_a_closed_pagemap_says_so(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    pagemap.close()
    with pytest.raises(Closed, match="pagemap"):
        pagemap.look(range_, pages(0))


def swept(memory_file: int, mask: np.ndarray) -> tuple[_native.Range, _native.Sweep]:  # type: ignore[type-arg]
    range_, sweep = mapped(memory_file), _native.Sweep(_native.Pagemap())
    sweep.add(1, range_.reference(), np.arange(PAGES, dtype=np.uint32), mask)
    return range_, sweep


def test_a_sweep_tells_what_was_touched_between_two_turns(memory_file: int) -> None:
    mask = np.zeros(PAGES, np.uint8)
    mask[1] = _native.PINNED
    range_, sweep = swept(memory_file, mask)
    content = np.frombuffer(range_.buffer(), np.uint8)
    content[::PAGE_BYTES].sum()
    first = sweep.run(PAGES, timed=True)
    assert (first.windows, first.turns, first.due) == ((), 1, PAGES - 1)
    assert 0 < first.fault_s < 0.5
    content[2 * PAGE_BYTES]
    second = sweep.run(PAGES)
    (window,) = second.windows
    assert window.key == 1
    assert window.pages.tolist() == [page for page in range(PAGES) if page != 1]
    assert window.pages[window.touched].tolist() == [2]
    assert second.faults == 1
    assert second.turn_s > 0


def test_a_run_of_turns_ends_when_it_is_woken(memory_file: int) -> None:
    range_, sweep = swept(memory_file, np.zeros(PAGES, np.uint8))
    threading.Timer(0.05, sweep.wake).start()
    begin = time.monotonic()
    found = sweep.run(PAGES, 1000, 0.01)
    assert time.monotonic() - begin < 5
    assert 1 < found.turns < 1000
    assert len(found.windows) == found.turns - 1
    assert not range_.closed


def test_a_dropped_mapping_and_a_closed_sweep_are_left_alone(memory_file: int) -> None:
    range_, sweep = swept(memory_file, np.zeros(PAGES, np.uint8))
    sweep.drop(1)
    sweep.drop(1)
    assert sweep.run(PAGES).due == 0
    sweep.close()
    sweep.drop(1)
    sweep.wake()
    with pytest.raises(Closed, match="sweep"):
        sweep.run(PAGES)
    assert not range_.closed


def test_a_forked_child_unmaps_while_a_thread_of_its_parent_holds_the_lock(memory_file: int) -> None:
    mask = np.zeros(PAGES, np.uint8)
    range_, sweep = swept(memory_file, mask)
    released: list[bool] = []
    range_.before_release(lambda: sweep.drop(1))
    range_.on_release(lambda: released.append(True))
    running = threading.Thread(target=sweep.run, args=(PAGES, 100_000))
    running.start()
    children = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            sweep.wake()
            del range_
            os._exit(0 if released else 1)
        children.append(child)
    deadline = time.monotonic() + 60
    left, ended = set(children), []
    while left and time.monotonic() < deadline:
        ended += [(child, status) for child, status in (os.waitpid(child, os.WNOHANG) for child in left) if child]
        left = set(children) - {child for child, _ in ended}
        time.sleep(0.01)
    for child in left:
        os.kill(child, 9)
        os.waitpid(child, 0)
    sweep.wake()
    running.join()
    assert not left, f"{len(left)} of 20 children hang"
    assert {status for _, status in ended} == {0}
