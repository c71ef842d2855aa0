"""A device that answers and yet does nothing that it is given: how torch_npu goes on after an error in its queue."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.test_device_backend import SlowDevice, slow_device
from tiermem.device import Arena, Copier, Staging, backend
from tiermem.errors import CopyFailed, DeviceFull, DeviceLost

MIB = 1 << 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_STALL_S", 0.02)
    monkeypatch.setattr(backend, "_ANSWER_S", 0.2)


def halt(device: SlowDevice) -> None:
    """Have no stream do anything more, new ones neither."""
    genuine = device.module.Stream

    def still() -> Any:
        line = genuine()
        line.gate.clear()
        return line

    for line in device.module.lines:
        line.gate.clear()
    vars(device.module)["Stream"] = still


def test_a_slow_device_is_waited_for() -> None:
    with slow_device() as device:
        compute, event = device.module.compute, device.event()
        compute.gate.clear()
        event.record(compute)
        opener = threading.Timer(0.3, compute.gate.set)
        opener.start()
        event.synchronize()
        assert event.query()
        opener.join()


def test_a_device_that_does_nothing_is_lost_for_good() -> None:
    with slow_device() as device:
        event = device.event()
        halt(device)
        event.record(device.module.compute)
        with pytest.raises(DeviceLost, match="slow:0 does nothing more that it is given"):
            event.synchronize()
        asked = time.monotonic()
        for ask in (event.query, event.synchronize, device.free_bytes, device.capacity_bytes):
            with pytest.raises(DeviceLost):
                ask()
        for take in (device.empty, device.pinned):
            with pytest.raises(DeviceLost):
                take(1)
        assert time.monotonic() - asked < 0.2, "it is asked no more"


def test_an_error_is_asked_about() -> None:
    with slow_device() as device:
        assert isinstance(device.explain(RuntimeError("once"), "copy"), CopyFailed)
        halt(device)
        device._probe = None  # it is one of those that were made before
        fault = RuntimeError("The Inner error is reported as above")
        meant = device.explain(fault, "copy")
        assert isinstance(meant, DeviceLost)
        assert meant.__cause__ is fault


def test_a_copier_of_a_halted_device_ends() -> None:
    with slow_device() as device:
        arena, staging = Arena(device, MIB), Staging(device, MIB)
        copier = Copier(device, staging)
        block = arena.allocate(MIB)
        copier.copy(memoryview(bytes(MIB)), block).result()
        halt(device)
        for _ in range(3):
            with pytest.raises(DeviceLost):
                copier.copy(memoryview(bytes(MIB)), block).result()
        copier.close()
        staging.close()


def test_a_null_pointer_is_no_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    with slow_device() as device:
        monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(data_ptr=lambda: 0))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: emptied.append("host"))
        with pytest.raises(DeviceFull, match=r"host memory pinned for slow:0 cannot be had.*null pointer"):
            backend.Device.pinned(device, 4096)
    assert emptied == ["host"], "torch would give the same again"


@pytest.mark.parametrize("trouble", ["none", "stopped", "lost"])
def test_pinned_memory_goes_only_where_that_is_safe(trouble: str) -> None:
    with slow_device() as device:
        held = [device.pinned(4096)]
        pinned = weakref.ref(held[0])
        device.module.lost = trouble == "lost"
        compute = device.module.compute
        device.unpin(held, [compute], stopped=trouble == "stopped")
        assert ("record" in compute.log) == (trouble == "none"), "torch marks the memory there when it is freed"
        gc.collect()
        assert held == []
        assert (pinned() is None) == (trouble == "none")


def test_memory_that_cannot_be_given_back_says_why() -> None:
    def broken() -> None:
        raise RuntimeError("aclrtFree, error code is 507010")

    with slow_device() as device:
        vars(device.module)["empty_cache"] = broken
        with pytest.raises(CopyFailed, match="giving memory of slow:0 back failed: aclrtFree"):
            device.release_cached()
        device.module.lost = True
        with pytest.raises(DeviceLost):
            device.release_cached()
