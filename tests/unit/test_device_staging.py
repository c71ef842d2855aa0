"""Staging: a slot is filled again only when the copy that reads it is done."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from tests.unit.test_device_backend import TOO_MUCH, slow_device
from tiermem.device import ALIGN, Staging, open_device
from tiermem.device.staging import Slot
from tiermem.errors import Closed, ConfigError, DeviceFull


def test_slots_are_of_bounded_size_aligned_and_apart() -> None:
    staging = Staging(open_device("cpu"), 100_000)
    slots = [staging.take() for _ in range(8)]
    assert staging.nbytes == 8 * staging.slot_bytes == 98_304
    addresses = sorted(slot.address for slot in slots)
    assert [address % ALIGN for address in addresses] == [addresses[0] % ALIGN] * 8
    assert [b - a for a, b in pairwise(addresses)] == [staging.slot_bytes] * 7
    assert all(slot.memory.numel() == staging.slot_bytes for slot in slots)
    assert staging.take() is slots[0]


def test_what_is_too_small_too_large_or_closed() -> None:
    device = open_device("cpu")
    with pytest.raises(ConfigError, match=r"takes 4\.0 KiB or more"):
        Staging(device, 8 * ALIGN - 1)
    with pytest.raises(DeviceFull, match="host memory pinned for cpu"):
        Staging(device, TOO_MUCH)
    staging = Staging(device, 8 * ALIGN)
    staging.close()
    assert staging.nbytes == 0
    with pytest.raises(Closed, match="make a new one"):
        staging.take()


def test_a_slot_is_not_handed_out_before_its_copy_has_read_it() -> None:
    with slow_device() as device:
        staging = Staging(device, 8 * ALIGN)
        stream = device.stream()
        slots = [staging.take() for _ in range(8)]
        stream.gate.clear()
        for slot in slots:
            slot.event.record(stream)
        taken: list[Slot] = []
        thread = threading.Thread(target=lambda: taken.append(staging.take()))
        thread.start()
        thread.join(0.05)
        assert not taken, "the device still reads the first slot"
        stream.gate.set()
        thread.join(10)
        assert taken == slots[:1]


def test_a_slot_of_which_the_device_does_not_tell_keeps_its_turn() -> None:
    with slow_device() as device:
        staging = Staging(device, 8 * ALIGN)
        first = staging.take()
        for _ in range(7):
            staging.take()
        first.event.fault = RuntimeError("do not know")
        with pytest.raises(RuntimeError, match="do not know"):
            staging.take()
        first.event.fault = None
        assert staging.take() is first
