"""Residency in trouble: copies that fail, devices without memory, devices that go, work that still uses the bytes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import until
from tests.unit.test_device_backend import Line, SlowDevice, slow_device
from tests.unit.test_device_residency import (
    KIB,
    bytes_of,
    present,
    residency_on,
    right,
    slow_residency,
    use,
    weight,
)
from tiermem.device import Residency, Weight, open_device
from tiermem.device import headroom as headroom_module
from tiermem.errors import CheckpointError, Closed, CopyFailed, DeviceFull, DeviceLost, Refused


def side(residency: Residency) -> Line:
    stream = residency._copier.stream
    assert isinstance(stream, Line)
    return stream


def broken(key: int, error: Exception) -> Weight:
    def source() -> memoryview:
        raise error

    return Weight(key, f"w{key}", KIB, source)


def settle(device: SlowDevice) -> None:
    """Return when the compute stream has done what was enqueued."""
    done = threading.Event()
    device.module.compute.enqueue("settle", done.set)
    assert done.wait(10)


def test_who_forgets_to_close_leaves_no_thread_and_no_memory_behind() -> None:
    residency = Residency(open_device("cpu"), 1 << 20, staging_bytes=64 << 10)
    residency.hold([weight(0)]).release()
    thread, memory = residency._copier._thread, weakref.ref(residency._staging)
    del residency
    gc.collect()
    until(lambda: not thread.is_alive())
    until(lambda: memory() is None)


def test_a_failed_copy_is_told_to_its_holders_and_given_to_nobody_else() -> None:
    with slow_residency(4 * KIB) as (device, residency):
        side(residency).gate.clear()
        device.faults[1] = RuntimeError("bus error")
        first, second = residency.hold([weight(0), weight(1)]), residency.hold([weight(1), weight(2)])
        side(residency).gate.set()
        for holding in (first, second):
            with pytest.raises(CopyFailed, match="bus error"):
                holding.wait()
        assert present(residency, range(3)) == [0, 2]
        third = residency.hold([weight(1)])
        assert third.bytes_copied == KIB
        assert right(third)
        residency.check()
        assert residency.used_bytes == 4 * KIB, "the failed one is held twice"
        first.release()
        second.release()
        assert residency.used_bytes == 3 * KIB
        assert right(residency.hold([weight(0), weight(1), weight(2)]))


def test_a_copy_that_fails_unseen_is_not_there() -> None:
    with slow_residency(4 * KIB) as (device, residency):
        device.faults |= {0: RuntimeError("bus error"), 2: RuntimeError("bus error")}
        residency.prefetch([weight(0), weight(1)])
        until(lambda: device.copies == 2)
        until(lambda: present(residency, range(2)) == [1])
        holding = residency.hold([weight(0), weight(1)])
        assert holding.bytes_copied == KIB
        with pytest.raises(CopyFailed):
            holding.result()
        holding.release()
        use(residency, weight(0), weight(1))


def test_what_is_fetched_ahead_drops_nothing_that_failed_already() -> None:
    with slow_residency(4 * KIB) as (device, residency):
        device.faults[1] = RuntimeError("bus error")
        residency.prefetch(map(weight, range(4)))
        until(lambda: device.copies == 4)
        residency.prefetch(map(weight, (4, 1, 5, 6)))
        residency.check()
        assert present(residency, range(7)) == [1, 4, 5, 6]
        use(residency, weight(1), weight(6))


def test_a_copy_that_fails_on_the_device_leaves_the_next_ones_alone() -> None:
    """Its events say so for ever, and all that is behind it in its stream fails too."""
    with slow_residency(64 * KIB) as (_, residency):
        use(residency, weight(0))
        holding = residency.hold([weight(1)])
        holding.wait()
        failing = side(residency)
        fault = RuntimeError("uncorrectable")
        for slot in residency._staging._slots:
            slot.event.fault = fault  # type: ignore[attr-defined]
        holding.replicas[0].ticket._passed = False
        holding.replicas[0].ticket._event.fault = fault  # type: ignore[attr-defined]
        residency._copier._in_flight.append((holding.replicas[0].ticket._event, []))
        with pytest.raises(CopyFailed, match="uncorrectable"):
            holding.result()
        holding.release()
        assert not residency.has(1)
        until(lambda: not again(residency))
        assert residency._copier.stream is not failing
        use(residency, *map(weight, range(20)))


def again(residency: Residency) -> bool:
    """Whether a copy still fails."""
    holding = residency.hold([weight(99)])
    try:
        holding.result()
    except CopyFailed:
        return True
    finally:
        holding.release()
    return False


@pytest.mark.parametrize("error", [CheckpointError("torn"), Refused("no")])
def test_what_a_source_raises_is_told_as_it_is(error: Exception) -> None:
    with residency_on(open_device("cpu"), 4 * KIB) as residency:
        for wait in ("wait", "result"):
            holding = residency.hold([weight(0), broken(1, error)])
            with pytest.raises(type(error), match=str(error)):
                getattr(holding, wait)()
            holding.release()
            assert present(residency, range(2)) == [0]
            assert residency.used_bytes == KIB
        use(residency, weight(1))


@pytest.mark.parametrize("nbytes", [KIB - 1, KIB + 1, 0])
def test_a_source_of_another_size_is_refused(nbytes: int) -> None:
    with residency_on(open_device("cpu"), 4 * KIB) as residency:
        holding = residency.hold([Weight(0, "w0", KIB, lambda: memoryview(bytes(nbytes)))])
        with pytest.raises(Refused, match=f"{nbytes} bytes do not fill a block of 1024 bytes"):
            holding.result()
        holding.release()
        assert not residency.has(0)


def test_what_is_dropped_on_its_way_does_not_spoil_what_comes_after() -> None:
    with slow_residency(4 * KIB) as (device, residency):
        side(residency).gate.clear()
        residency.prefetch([weight(0, 4 * KIB)])
        until(lambda: device.copies > 0)
        holding = residency.hold([weight(1, 4 * KIB)])
        assert not residency.has(0)
        side(residency).gate.set()
        assert right(holding)


def test_what_is_needed_now_goes_before_what_was_fetched_ahead() -> None:
    with slow_residency(64 * KIB) as (_, residency):
        asked: list[int] = []
        began, go_on = threading.Event(), threading.Event()

        def told(key: int, gate: Callable[[], object]) -> Weight:
            def source() -> memoryview:
                asked.append(key)
                gate()
                return memoryview(bytes_of(key, KIB))

            return Weight(key, f"w{key}", KIB, source)

        def hold_up() -> None:
            began.set()
            go_on.wait(10)

        first = told(0, hold_up)
        residency.prefetch([first, *(told(key, bool) for key in (1, 2, 3, 4))])
        assert began.wait(10)
        holding = residency.hold([told(5, bool), weight(3)])
        residency.drop([2])
        go_on.set()
        assert right(holding)
        until(lambda: len(asked) == 5)
        assert asked == [0, 5, 3, 1, 4], "what was dropped before its turn is not copied"


def test_bytes_stay_until_the_work_that_uses_them_is_done() -> None:
    with slow_residency(KIB) as (device, residency):
        compute = device.module.compute
        holding = residency.hold([weight(0)])
        holding.wait()
        holding.result()
        compute.gate.clear()
        seen: list[bytes] = []
        view = holding.replicas[0].view
        compute.enqueue("compute", lambda: seen.append(bytes(view.numpy())))
        holding.release()
        other = residency.hold([weight(1)])
        other.wait()
        threading.Event().wait(0.02)
        assert not other.done()
        assert bytes(view.numpy()) == bytes_of(0, KIB)
        compute.gate.set()
        assert right(other)
        assert seen == [bytes_of(0, KIB)]


@pytest.mark.parametrize("given", [False, True])
def test_the_work_of_all_holders_counts(given: bool) -> None:
    """Each in its own stream; the last release is not the last use."""
    with slow_residency(KIB) as (device, residency):
        streams = [device.module.Stream(), device.module.Stream()]
        holdings = [residency.hold([weight(0)]) for _ in streams]
        events = []
        for stream, holding in zip(streams, holdings, strict=True):
            holding.wait(stream)
            until(holding.done)
            stream.gate.clear()
            events.append(device.event())
            events[-1].record(stream)
        for holding, event in zip(holdings, events, strict=True):
            holding.release(event if given else None)
        other = residency.hold([weight(1)])
        for stream in reversed(streams):
            threading.Event().wait(0.01)
            assert not other.done()
            stream.gate.set()
        assert right(other)


def test_a_release_without_a_wait_and_steady_use_leave_no_events_behind() -> None:
    with slow_residency(KIB) as (device, residency):
        residency.hold([weight(0)]).release()
        assert "record" not in device.module.compute.log[1:], "the arena's mark is the first"
        for _ in range(20):
            use(residency, weight(0))
            settle(device)
        holding = residency.hold([weight(0)])
        assert len(holding.replicas[0].block.after) <= 1
        assert set(device.module.calls) <= {"set_device 0"}, "nothing concerns the whole device"


def test_a_device_that_cannot_mark_the_end_keeps_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_residency(KIB) as (device, residency):
        holding = residency.hold([weight(0)])
        holding.wait()

        def unable(stream: Any) -> None:
            raise RuntimeError("no events")

        with monkeypatch.context() as patch:
            patch.setattr(device, "event", lambda: type("E", (), {"record": staticmethod(unable)})())
            with pytest.raises(CopyFailed, match="the end of a use of replicas on slow:0 failed: no events"):
                holding.release()
            with pytest.raises(DeviceFull):
                residency.hold([weight(1)])
        holding.release()
        use(residency, weight(1))


def test_a_lost_device_is_told_by_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom_module, "_LOOK_S", 0.0)
    with slow_residency(4 * KIB) as (device, residency):
        use(residency, weight(0))
        held = residency.hold([weight(0)])
        held.wait()
        device.faults = {number: RuntimeError("gone") for number in range(1000)}
        device.module.lost = True
        with pytest.raises(DeviceLost, match="answers no more"):
            residency.hold([weight(1)])
        device.module.lost = False
        for ask in (residency.hold, residency.prefetch):
            with pytest.raises(DeviceLost):
                ask([weight(0)])
        with pytest.raises(DeviceLost):
            residency.shrink(1)
        assert not residency.has(0)
        held.release()
        device.faults = {}


def test_a_device_that_is_lost_during_a_copy() -> None:
    with slow_residency(4 * KIB) as (device, residency):
        device.faults[0] = RuntimeError("gone")

        def source() -> memoryview:
            device.module.lost = True
            return memoryview(bytes(KIB))

        holding = residency.hold([Weight(0, "w0", KIB, source)])
        with pytest.raises(DeviceLost):
            holding.wait()
        holding.release()
        device.module.lost = False
        with pytest.raises(DeviceLost):
            residency.hold([])


def test_closing_waits_for_copies_and_work_and_ends_it_all() -> None:
    with slow_device() as device, residency_on(device, 8 * KIB) as residency:
        held, used = residency.hold([weight(0)]), residency.hold([weight(1)])
        residency.prefetch([weight(2)])
        used.wait()
        held.wait()
        compute = device.module.compute
        compute.gate.clear()
        view = used.replicas[0].view
        sums: list[int] = []
        compute.enqueue("compute", lambda: sums.append(int(view.sum())))
        used.release()
        thread = threading.Thread(target=residency.close)
        thread.start()
        thread.join(0.03)
        assert thread.is_alive()
        compute.gate.set()
        thread.join(10)
        assert sums == [sum(bytes_of(1, KIB))]
        for ask in (residency.hold, residency.prefetch):
            with pytest.raises(Closed, match="make a new one"):
                ask([weight(0)])
        assert not residency.has(0)
        assert residency.drop([0]) == residency.shrink(1) == 0
        assert bytes(held.replicas[0].view.numpy()) == bytes_of(0, KIB), "who holds it has its memory"
        held.release()
        residency.close()


def test_a_residency_that_cannot_pin_memory_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(nbytes: int) -> torch.Tensor:
        raise DeviceFull("nothing to pin", nbytes)

    with slow_device() as device:
        monkeypatch.setattr(device, "pinned", no_memory)
        threads = threading.active_count()
        with pytest.raises(DeviceFull, match="nothing to pin"):
            Residency(device, KIB)
        assert threading.active_count() == threads
