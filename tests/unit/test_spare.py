"""Spare memory: filled in the background up to its target and to what is free, never beyond."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.conftest import until
from tiermem.segment import Backing, open_backing
from tiermem.spare import Spare
from tiermem.types import PAGE_BYTES

MIB = 1 << 20


@pytest.fixture
def backing() -> Iterator[Backing]:
    made = open_backing("memfd", None, 256 * MIB)
    yield made
    made.close(keep=False)


class Room:
    """What is free, and how often it was asked for."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        return self.free


@pytest.mark.parametrize(
    ("target", "free", "filled"),
    [
        (66 * MIB, 1 << 40, 66 * MIB),
        (66 * MIB + 5, 1 << 40, 66 * MIB),
        (64 * MIB, 40 * MIB, 40 * MIB),
        (64 * MIB, 3 * MIB, 2 * MIB),
        (64 * MIB, MIB, 0),
        (64 * MIB, 0, 0),
        (MIB, 1 << 40, 0),
        (0, 1 << 40, 0),
    ],
)
def test_it_fills_up_to_its_target_and_to_what_is_free(backing: Backing, target: int, free: int, filled: int) -> None:
    room = Room(free)
    spare = Spare(backing, target, room)
    until(lambda: spare.nbytes == filled)
    assert spare.target_bytes == target // PAGE_BYTES * PAGE_BYTES
    if spare.target_bytes:
        before = room.asked
        spare.refill()
        until(lambda: room.asked > before)
    spare.close()
    assert (spare.fill_s > 0) == (filled > 0)


def test_it_fills_again_when_it_is_told_to_look(backing: Backing) -> None:
    room = Room(8 * MIB)
    spare = Spare(backing, 64 * MIB, room)
    until(lambda: spare.nbytes == 8 * MIB)
    assert spare.stock.take(6 * MIB) == 6 * MIB
    room.free = 20 * MIB
    spare.refill()
    until(lambda: spare.nbytes == 20 * MIB)
    spare.close()


def test_closing_ends_a_filling_that_has_far_to_go(backing: Backing) -> None:
    entered = threading.Event()

    def room() -> int:
        entered.set()
        return 1 << 40

    spare = Spare(backing, 1 << 40, room)
    assert entered.wait(5)
    spare.close()
    assert not spare._thread.is_alive()


@pytest.mark.root
def test_a_full_backing_costs_a_warning_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    backing = open_backing("tmpfs", None, 8 * MIB)
    spare = Spare(backing, 64 * MIB, lambda: 64 * MIB)
    until(lambda: "spare memory stays at" in caplog.text)
    spare.stock.fill(4 * MIB)
    assert spare.nbytes == 4 * MIB
    spare.close()
    backing.close(keep=False)
