"""The address book against the plainest one that can be written: a list of what was told, walked for each sample."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.addresses import AddressBook
from tiermem.samples import SAMPLE, Samples
from tiermem.types import PAGE_BYTES

BASE = 0x7F00_0000_0000
Found = tuple[int, int, int]
NOTHING = (-1, 0, 0)


def samples_of(rows: list[tuple[int, int, int]]) -> Samples:
    samples = np.zeros(len(rows), SAMPLE)
    for name, values in zip(("pid", "addr", "time"), zip(*rows, strict=True), strict=False):
        samples[name] = values
    return samples


def found(book: AddressBook, *rows: tuple[int, int, int]) -> list[Found]:
    resolved = book.resolve(samples_of(list(rows)))
    assert (resolved.model.dtype, resolved.page.dtype, resolved.offset.dtype) == (np.int32, np.int32, np.uint64)
    return list(zip(resolved.model.tolist(), resolved.page.tolist(), resolved.offset.tolist(), strict=True))


@dataclass
class Naive:
    """Every byte address of interest is walked through all events in order of their time."""

    events: list[tuple[int, int, str, int, int, int]] = field(default_factory=list)

    def find(self, pid: int, address: int, time_ns: int) -> Found:
        held: tuple[int, int] | None = None
        for at, owner, kind, start, stop, model in sorted(self.events, key=lambda event: event[0]):
            if owner != pid or at > time_ns:
                continue
            if kind == "map" and start <= address < stop:
                held = model, start
            elif kind == "end" or (kind == "unmap" and held is not None and held[1] == start):
                held = None
        if held is None:
            return NOTHING
        offset = address - held[1]
        return held[0], offset // PAGE_BYTES, offset


def tell(book: AddressBook, naive: Naive, event: tuple[str, int, int, int, int, int]) -> None:
    kind, pid, slot, pages, model, at = event
    address = BASE + slot * PAGE_BYTES // 2
    naive.events.append((at, pid, kind, address, address + pages * PAGE_BYTES, model))
    if kind == "map":
        book.map(pid, model, address, pages * PAGE_BYTES, at)
    elif kind == "unmap":
        book.unmap(pid, address, at)
    else:
        book.end(pid, at)


small = st.integers(0, 8)
events = st.tuples(st.sampled_from(["map", "map", "map", "unmap", "end"]), st.integers(1, 3), small,
                   st.integers(1, 4), st.integers(0, 5), small)  # fmt: skip
EVERYWHERE = [
    (pid, BASE + half * PAGE_BYTES // 2 + more, at)
    for pid in (1, 2, 3, 4)
    for half in range(-1, 17)
    for more in (0, 1, PAGE_BYTES // 2 - 1)
    for at in range(10)
]


@given(st.lists(events, max_size=12))
def test_it_finds_what_the_naive_book_finds(told: list[tuple[str, int, int, int, int, int]]) -> None:
    """In whatever order and however late it was told: PID reuse, remaps, overlaps, partial overlaps."""
    book, naive = AddressBook(), Naive()
    for event in told:
        # Of a process that never mapped anything, no end is kept.
        if event[0] != "map" and not any(owner == event[1] for _, owner, *_ in naive.events):
            continue
        tell(book, naive, event)
    assert found(book, *EVERYWHERE) == [naive.find(*row) for row in EVERYWHERE]


@given(st.lists(events, max_size=12), st.integers(0, 9))
def test_forgetting_changes_nothing_later(told: list[tuple[str, int, int, int, int, int]], before: int) -> None:
    book, naive = AddressBook(), Naive()
    for event in told:
        tell(book, naive, event)
    later = [row for row in EVERYWHERE if row[2] >= before]
    expected = found(book, *later)
    book.forget(before)
    assert found(book, *later) == expected


def test_a_number_of_a_process_that_is_used_again_is_another_process() -> None:
    book = AddressBook()
    book.map(7, 0, BASE, 4 * PAGE_BYTES, 100)
    book.end(7, 200)
    book.map(7, 5, BASE, 4 * PAGE_BYTES, 300)
    address = BASE + 3 * PAGE_BYTES + 17
    assert found(book, *((7, address, at) for at in (99, 100, 199, 200, 299, 300, 10**15))) == [
        NOTHING, (0, 3, 3 * PAGE_BYTES + 17), (0, 3, 3 * PAGE_BYTES + 17), NOTHING, NOTHING,
        (5, 3, 3 * PAGE_BYTES + 17), (5, 3, 3 * PAGE_BYTES + 17),
    ]  # fmt: skip
    assert found(book, (8, address, 150)) == [NOTHING]


def test_what_ended_is_forgotten_and_what_lives_is_not() -> None:
    book = AddressBook()
    book.map(1, 0, BASE, PAGE_BYTES, 10)
    book.unmap(1, BASE, 20)
    book.map(2, 1, BASE, PAGE_BYTES, 10)
    book.forget(19)
    assert (len(book), found(book, (1, BASE, 15))) == (2, [(0, 0, 0)])
    book.forget(20)
    assert len(book) == 1
    assert found(book, (1, BASE, 15), (2, BASE, 15)) == [NOTHING, (1, 0, 0)]


def test_an_empty_book_and_no_samples() -> None:
    book = AddressBook()
    assert found(book, (1, BASE, 5)) == [NOTHING]
    book.map(1, 0, BASE, PAGE_BYTES, 1)
    assert len(book.resolve(samples_of([])).model) == 0


def test_addresses_and_processes_at_the_edge() -> None:
    book = AddressBook()
    top = 2**64 - PAGE_BYTES - 1
    book.map(2**32 - 1, 3, top, PAGE_BYTES, 0)
    book.map(0, 4, 0, 1, 0)
    rows = [
        (2**32 - 1, 2**64 - 4, 0),
        (2**32 - 1, 2**64 - 1, 0),
        (2**32 - 1, top - 1, 0),
        (0, 0, 2**64 - 2),
        (0, 1, 0),
        (5, 0, 0),
    ]
    assert found(book, *rows) == [(3, 0, PAGE_BYTES - 3), *[NOTHING] * 2, (4, 0, 0), NOTHING, NOTHING]


@pytest.mark.parametrize(
    ("pid", "model", "address", "nbytes", "time_ns"),
    [(-1, 0, 0, 1, 0), (2**32, 0, 0, 1, 0), (1, -1, 0, 1, 0), (1, 2**31, 0, 1, 0), (1, 0, -1, 1, 0), (1, 0, 0, 0, 0),
     (1, 0, 2**64 - 1, 2, 0), (1, 0, 0, 2**60, 0), (1, 0, 0, 1, -1), (1, 0, 0, 1, 2**64)],
)  # fmt: skip
def test_numbers_that_no_mapping_has_are_refused(pid: int, model: int, address: int, nbytes: int, time_ns: int) -> None:
    book = AddressBook()
    with pytest.raises(ValueError, match="mapping"):
        book.map(pid, model, address, nbytes, time_ns)
    assert len(book) == 0


def test_five_million_samples_a_second() -> None:
    """A tenth of that is asked for here, so that a busy machine does not fail: a search in Python has a hundredth."""
    book, random = AddressBook(), np.random.default_rng(0)
    for pid in range(50):
        for turn in range(4):  # each maps again, so that times are searched too
            book.map(pid, turn, BASE, 500 * PAGE_BYTES, turn * 100)
    samples = np.zeros(200_000, SAMPLE)
    samples["pid"] = random.integers(0, 60, len(samples))
    samples["addr"] = BASE + random.integers(0, 600 * PAGE_BYTES, len(samples))
    samples["time"] = random.integers(0, 400, len(samples))
    book.resolve(samples[:1])
    begin = time.perf_counter()
    resolved = book.resolve(samples)
    took = time.perf_counter() - begin
    inside = (samples["pid"] < 50) & (samples["addr"] < BASE + 500 * PAGE_BYTES)
    assert np.array_equal(resolved.model, np.where(inside, samples["time"].astype(np.int32) // 100, -1))
    assert len(samples) / took > 5e5, f"{len(samples) / took / 1e6:.1f} million samples/s"
