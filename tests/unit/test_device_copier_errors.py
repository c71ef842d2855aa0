"""Copies that fail: their own tickets tell it, others go on, and nothing is let go of too early or kept too long."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from tests.conftest import until
from tests.unit.test_device_backend import Runtime, slow_device
from tests.unit.test_device_copier import SLOT, Slow, noise, slow_copier
from tiermem.device import ALIGN, Arena, Copier, Staging
from tiermem.errors import CopyFailed, DeviceLost


@pytest.fixture
def slow() -> Iterator[Slow]:
    with slow_copier() as slow:
        yield slow


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_a_failed_copy_is_told_by_its_own_ticket(slow: Slow, piece: int) -> None:
    slow.device.faults[3 + piece] = RuntimeError("bus error\nstack")
    sources = [memoryview(noise(3 * SLOT, seed)) for seed in range(3)]
    blocks = [slow.block(3 * SLOT) for _ in sources]
    good, bad, last = (slow.copier.copy(*pair) for pair in zip(sources, blocks, strict=True))
    for _ in range(2):
        with pytest.raises(CopyFailed, match=r"copy of 3\.0 KiB to slow:0 failed: bus error; the device still answers"):
            bad.result()
    with pytest.raises(CopyFailed):
        bad.wait(slow.device.module.compute)
    assert bad.done()
    assert isinstance(bad.error, CopyFailed)
    assert isinstance(bad.error.__cause__, RuntimeError)
    for ticket, source, block in ((good, sources[0], blocks[0]), (last, sources[2], blocks[2])):
        ticket.result()
        assert ticket.error is None
        assert bytes(block.view.numpy()) == source
    assert "wait_event" not in slow.device.module.compute.log
    assert slow.copier.copied_bytes == 6 * SLOT
    slow.copier.copy(sources[1], blocks[1]).result()
    assert bytes(blocks[1].view.numpy()) == sources[1]


def test_a_copy_that_fails_on_the_device_is_told_when_it_is_asked_for(slow: Slow) -> None:
    block = slow.block(SLOT)
    for ask in ("done", "result"):
        ticket = slow.copier.copy(memoryview(noise(SLOT)), block)
        ticket.wait(slow.device.module.compute)
        ticket._event.fault = RuntimeError("uncorrectable")  # type: ignore[attr-defined]
        if ask == "done":
            assert ticket.done()
        with pytest.raises(CopyFailed, match="uncorrectable"):
            ticket.result()
        ticket._event.fault = None  # type: ignore[attr-defined]
        assert isinstance(ticket.error, CopyFailed), "what failed stays so"


def test_a_mark_that_fails_fails_its_copy_and_nothing_is_let_go_of_too_early(slow: Slow) -> None:
    slow.side.gate.clear()
    vars(slow.device.module)["cudart"] = Runtime
    source = np.frombuffer(noise(SLOT), np.uint8).copy()
    registration = slow.device.register(source.data)
    assert registration is not None
    genuine, marks = slow.side.enqueue, 0

    def enqueue(what: str, work: object) -> None:
        nonlocal marks
        marks += what == "record"
        if what == "record" and marks == 1:
            raise RuntimeError("no more events")
        genuine(what, work)  # type: ignore[arg-type]

    slow.side.enqueue = enqueue  # type: ignore[method-assign]
    block = slow.block(SLOT)
    memory = weakref.ref(block.view.untyped_storage())
    with pytest.raises(CopyFailed, match="no more events"):
        slow.copier.copy(source.data, block).result()
    slow.arena.free(block)
    until(lambda: slow.arena.trim() == 1 << 20)
    assert memory() is not None, "the device still writes there"
    slow.copier.copy(source.data, slow.arena.allocate(SLOT)).wait(slow.device.module.compute)
    assert memory() is not None
    slow.side.gate.set()
    until(lambda: memory() is None)


def test_a_lost_device_is_told_by_all_tickets_and_closing_returns(slow: Slow) -> None:
    slow.device.faults = {number: RuntimeError("gone") for number in range(100)}
    slow.device.module.lost = True
    block = slow.block(SLOT)
    tickets = [slow.copier.copy(memoryview(noise(SLOT)), block) for _ in range(3)]
    for ticket in tickets:
        with pytest.raises(DeviceLost, match="its replicas are gone"):
            ticket.result()
    slow.copier.close()


def test_a_device_that_the_thread_cannot_use_is_told_by_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_device() as device:

        def unable() -> None:
            raise RuntimeError("no context")

        monkeypatch.setattr(device, "use", unable)
        with Copier(device, Staging(device, 8 * SLOT)) as copier:
            ticket = copier.copy(memoryview(b"1"), Arena(device, ALIGN).allocate(1))
            with pytest.raises(CopyFailed, match="no context"):
                ticket.result()


def test_a_failed_copy_does_not_keep_its_source(slow: Slow) -> None:
    class Owner(np.ndarray):  # type: ignore[type-arg]
        """An array that can be watched."""

    source = np.frombuffer(noise(SLOT), np.uint8).copy().view(Owner)
    watched = weakref.ref(source)
    slow.device.faults[0] = RuntimeError("fails at once")
    ticket = slow.copier.copy(source.data, slow.block(SLOT))
    with pytest.raises(CopyFailed):
        ticket.result()
    del source
    until(lambda: watched() is None)
