"""Residency without room: budgets that are lowered and rise again, memory in pieces, and memory given back."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.unit.test_device_arena import Counting
from tests.unit.test_device_residency import (
    KIB,
    present,
    residency_on,
    right,
    slow_residency,
    use,
    weight,
)
from tiermem.device import Residency
from tiermem.device import headroom as headroom_module
from tiermem.errors import DeviceFull


def test_an_engine_that_takes_memory_lowers_the_budget_until_it_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom_module, "_LOOK_S", 0.0)
    monkeypatch.setattr(headroom_module, "_AGAIN_S", 0.0)
    device = Counting()
    free = [1 << 30]
    monkeypatch.setattr(device, "free_bytes", lambda: free[0])
    with residency_on(device, 32 * KIB, reserve_bytes=1 << 20) as residency:
        use(residency, *map(weight, range(16)))
        held = residency.hold([weight(17)])
        assert (residency.reserved_bytes, residency.budget_bytes) == (24 * KIB, 32 * KIB)
        free[0] = (1 << 20) - 4 * KIB
        residency.prefetch([])
        assert (residency.reserved_bytes, residency.budget_bytes) == (24 * KIB, 28 * KIB), "not taken, first gone"
        free[0] = (1 << 20) - 9 * KIB
        residency.prefetch([])
        assert residency.reserved_bytes == device.held_bytes == 16 * KIB
        assert len(present(residency, range(16))) == 8, "a whole chunk, and no more"
        for _ in range(5):
            residency.prefetch([])
        assert residency.reserved_bytes == residency.budget_bytes == 8 * KIB
        assert right(held)
        free[0] = 1 << 30
        residency.prefetch([])
        assert residency.budget_bytes == 32 * KIB
        use(residency, *map(weight, range(16)))


def test_a_device_without_memory_in_spite_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas go first, and only what cannot be helped fails."""
    monkeypatch.setattr(headroom_module, "_LOOK_S", 0.0)
    device = Counting(room=16 * KIB)
    with residency_on(device, 64 * KIB) as residency:
        use(residency, *map(weight, range(16)))
        held = residency.hold([weight(20, 8 * KIB)])
        assert residency.budget_bytes == 16 * KIB
        assert right(held)
        with pytest.raises(DeviceFull):
            residency.hold([weight(21, 9 * KIB)])
        residency.check()
        assert residency.used_bytes <= 16 * KIB
        device.room = 64 * KIB
        more = residency.hold([weight(21, 20 * KIB)])
        assert right(more), "when it is needed, the device is asked again"
        assert right(held)
        assert residency.budget_bytes == 64 * KIB


def test_a_budget_that_was_lowered_rises_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom_module, "_LOOK_S", 0.0)
    device = Counting(room=8 * KIB)
    with residency_on(device, 64 * KIB) as residency:
        assert right(residency.hold([weight(0)]))
        with pytest.raises(DeviceFull):
            residency.hold([weight(1, 20 * KIB)])
        residency.prefetch([])
        assert residency.budget_bytes == 8 * KIB, "the device is not asked for memory in vain each time"
        monkeypatch.setattr(headroom_module, "_AGAIN_S", 0.0)
        residency.prefetch([])
        assert residency.budget_bytes == 64 * KIB


def test_a_device_that_says_no_once_is_asked_for_one_piece() -> None:
    device = Counting()
    with residency_on(device, 20 * KIB) as residency:
        use(residency, weight(0))
        genuine, refusals = device.empty, [12 * KIB, 10 * KIB]

        def empty(nbytes: int) -> torch.Tensor:
            if nbytes in refusals:
                refusals.remove(nbytes)
                raise DeviceFull("no room", nbytes)
            return genuine(nbytes)

        device.empty = empty  # type: ignore[method-assign]
        assert right(residency.hold([weight(1, 10 * KIB), weight(2, 10 * KIB)]))
        assert not refusals


def test_pieces_that_are_still_in_use_are_waited_for_where_they_must_be_one() -> None:
    with slow_residency(16 * KIB) as (device, residency):
        holding = residency.hold([weight(0, 6 * KIB), weight(1, 6 * KIB)])
        holding.result()
        device.module.compute.gate.clear()
        holding.release()
        held: list[bool] = []
        thread = threading.Thread(target=lambda: held.append(right(residency.hold([weight(2, 12 * KIB)]))))
        thread.start()
        thread.join(0.03)
        assert not held
        device.module.compute.gate.set()
        thread.join(10)
        assert held == [True]


def test_memory_is_given_back_for_good() -> None:
    device = Counting()
    with residency_on(device, 32 * KIB) as residency:
        use(residency, *map(weight, range(32)))
        held = residency.hold([weight(0)])
        use(residency, *map(weight, range(8, 16)))
        assert residency.shrink(10 * KIB) == 16 * KIB
        assert residency.reserved_bytes == device.held_bytes == 16 * KIB
        assert set(range(8, 16)) <= set(present(residency, range(32))), "the chunk that was used last stays"
        assert residency.budget_bytes == 22 * KIB
        assert residency.shrink(1 << 30) == 8 * KIB
        assert residency.reserved_bytes == residency.budget_bytes == 8 * KIB
        assert right(held)
        held.release()
        assert residency.shrink(1) == 8 * KIB
        with pytest.raises(DeviceFull, match="the budget is"):
            residency.hold([weight(1, 8 * KIB)])


def test_giving_back_waits_for_work_that_uses_it() -> None:
    with slow_residency(8 * KIB) as (device, residency):
        use(residency, weight(0))
        device.module.compute.gate.clear()
        holding = residency.hold([weight(0)])
        holding.wait()
        holding.release()
        given: list[int] = []
        thread = threading.Thread(target=lambda: given.append(residency.shrink(KIB)))
        thread.start()
        thread.join(0.03)
        assert not given
        device.module.compute.gate.set()
        thread.join(10)
        assert given == [8 * KIB]


def test_a_budget_that_the_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Counting()
    monkeypatch.setattr(device, "free_bytes", lambda: 10 * KIB)
    residency = Residency(device, reserve_bytes=4 * KIB, staging_bytes=8 * KIB)
    assert residency.budget_bytes == 6 * KIB
    residency.close()
    residency = Residency(device, reserve_bytes=40 * KIB, staging_bytes=8 * KIB)
    with pytest.raises(DeviceFull, match="at least 1024 bytes"):
        residency.hold([weight(0)])
    residency.close()
