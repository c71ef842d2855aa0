"""Page tables through the door: states, zapping, and lifetimes of ranges that nobody but a call may keep."""

from __future__ import annotations

import errno
import gc
import os
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
    range_ = _native.Range.reserve(PAGES * PAGE_BYTES, cow=cow)
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
        with pytest.raises(NativeError, match="copy-on-write"):
            pagemap.turn(range_or_reference, pages(1), pages(1), timed=True)
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


def test_a_turn_looks_at_both_lists_and_unmaps_what_is_due(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    content = np.frombuffer(range_.buffer(), np.uint8)
    content[[2 * PAGE_BYTES, 3 * PAGE_BYTES, 5 * PAGE_BYTES]].sum()
    turn = pagemap.turn(range_, pages(1, 3, 5), pages(2, 3, 4), timed=False)
    assert (turn.was_state & _native.PRESENT > 0).tolist() == [False, True, True]
    assert (turn.due_state & _native.PRESENT > 0).tolist() == [True, True, False]
    assert turn.done.tolist() == [True, True, False]
    assert turn.fault_s == 0.0
    assert np.flatnonzero(pagemap.look(range_, np.arange(PAGES, dtype=np.uint32))).tolist() == [5]
    content[2 * PAGE_BYTES]
    again = pagemap.turn(range_, pages(2, 3), pages(), timed=False)
    assert (again.was_state & _native.PRESENT > 0).tolist() == [True, False]


def test_the_touch_that_a_turn_times_leaves_no_page_mapped(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    assert pagemap.turn(range_, pages(), pages(4), timed=True).fault_s == 0.0, "nothing is mapped that could be timed"
    np.frombuffer(range_.buffer(), np.uint8)[::PAGE_BYTES].sum()
    turn = pagemap.turn(range_, pages(), pages(*range(PAGES)), timed=True)
    assert 0 < turn.fault_s < 0.5
    assert turn.done.all()
    assert not pagemap.look(range_, np.arange(PAGES, dtype=np.uint32)).any()


def test_a_closed_pagemap_says_so(memory_file: int) -> None:
    range_, pagemap = mapped(memory_file), _native.Pagemap()
    pagemap.close()
    with pytest.raises(Closed, match="pagemap"):
        pagemap.look(range_, pages(0))
