"""Processes on simulated devices: imports, lost devices, failed copies, two processes on one device."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.npu.apart import Apart
from tests.npu.conftest import CAPACITY, Run
from tests.npu.torch_jobs import failed_copy, hold, lost, refused_copy, refused_pinned
from tests.sim_acl.control import DMA_FAILED, LOST_HEARTBEAT

HELD = 512 << 20
Begin = Callable[..., Apart]


def test_import_torch_brings_the_backend(run: Run) -> None:
    ran = run("available")
    assert ran.status == 0, ran.errors
    assert (ran.told["npu"], ran.told["count"]) == (True, 2)


def test_autoload_can_be_switched_off(run: Run) -> None:
    ran = run("available", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert ran.status == 0, ran.errors
    assert not ran.told["npu"]


def test_a_host_without_devices(run: Run) -> None:
    ran = run("available", SIM_ACL_DEVICES="0")
    assert ran.status == 0, ran.errors
    assert (ran.told["npu"], ran.told["count"]) == (False, 0)


def test_a_host_without_cann(run: Run) -> None:
    ran = run("imported", LD_LIBRARY_PATH="")
    assert ran.status == 0, ran.errors
    kind, text = ran.told["torch"]
    assert kind == "RuntimeError"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text


def test_a_lost_device_is_a_runtime_error_with_its_code(apart: Begin) -> None:
    told = apart(lost).hear()
    assert set(told) == {"query", "wait", "stream", "device", "memory", "empty", "copy", "to_host"}
    for name, (kinds, text) in told.items():
        assert kinds[0] == "RuntimeError", name
        assert f"error code is {LOST_HEARTBEAT}" in text, name


def test_a_failed_copy_is_told_by_its_event_and_its_stream(apart: Begin) -> None:
    told = apart(failed_copy, TASK_QUEUE_ENABLE="0").hear()
    assert (told.pop("copy"), told.pop("record"), told.pop("other")) == (None, None, None)
    assert set(told) == {"wait", "query", "stream", "again"}
    for name, (kinds, text) in told.items():
        assert kinds[0] == "RuntimeError", name
        assert f"error code is {DMA_FAILED}" in text, name


def test_a_refused_copy_stops_all_that_is_asynchronous_and_says_so_once(apart: Begin) -> None:
    """Of torch_npu, in its default mode: who goes on computes with whatever lies on the device."""
    told = apart(refused_copy).hear()
    kinds, text = told["first"]
    assert kinds[0] == "RuntimeError"
    assert "The Inner error is reported as above" in text
    assert (told["copies"], told["record"]) == (None, None)
    assert (told["calls"], told["passed"], told["arrived"]) == ([], False, False)


def test_without_its_task_queue_a_refused_copy_is_one_failure(apart: Begin) -> None:
    told = apart(refused_copy, TASK_QUEUE_ENABLE="0").hear()
    assert f"error code is {DMA_FAILED}" in told["first"][1]
    assert (told["copies"], told["record"]) == (None, None)
    assert (told["passed"], told["arrived"]) == (True, True)


def test_pinned_memory_that_is_not_to_be_had_is_a_null_pointer(apart: Begin) -> None:
    """Of torch_npu: it raises nothing, and gives the same again for the same size. One must look at the address."""
    assert apart(refused_pinned).hear() == [False, False, True]


def test_the_host_cannot_touch_device_memory(run: Run) -> None:
    ran = run("touch")
    assert (ran.status, ran.told) == (-signal.SIGSEGV, "about to touch"), ran.errors


def test_two_processes_share_one_device(apart: Begin, tmp_path: Path) -> None:
    board = {"SIM_ACL_BOARD": str(tmp_path / "board")}
    first = apart(hold, **board)
    assert first.hear()["free"] <= CAPACITY - HELD
    with pytest.raises(AssertionError, match="OutOfMemoryError"):
        apart(hold, **board).hear()
    first.kill()
    assert apart(hold, **board).hear()["held"] == HELD
