"""The copier: bytes arrive whole and in order, what is in use stays, and nobody waits who need not."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import until
from tests.unit.test_device_backend import Line, Runtime, SlowDevice, slow_device
from tiermem.device import Arena, Block, Copier, Staging, open_device
from tiermem.errors import Closed, Refused

SLOT = 1024
"""Bytes of a slot of the staging here; it has eight."""


@dataclass
class Slow:
    """A slow device with an arena of 1 MiB, and its copier."""

    device: SlowDevice
    arena: Arena
    staging: Staging
    copier: Copier

    @property
    def side(self) -> Line:
        stream = self.copier.stream
        assert isinstance(stream, Line)
        return stream

    def block(self, nbytes: int) -> Block:
        block = self.arena.allocate(nbytes)
        block.view.fill_(0xEE)
        return block


@contextmanager
def slow_copier() -> Iterator[Slow]:
    with slow_device() as device:
        staging = Staging(device, 8 * SLOT)
        with Copier(device, staging) as copier:
            yield Slow(device, Arena(device, 1 << 20), staging, copier)
            for line in device.module.lines:
                line.gate.set()


@pytest.fixture
def slow() -> Iterator[Slow]:
    with slow_copier() as slow:
        yield slow


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.mark.parametrize("skew", [0, 1, 511])
@pytest.mark.parametrize(
    "nbytes", [0, 1, 3, 511, 512, 513, SLOT - 1, SLOT, SLOT + 1, 8 * SLOT, 8 * SLOT + 1, 100_003, 1 << 20]
)
def test_all_bytes_arrive_and_no_others(nbytes: int, skew: int) -> None:
    device = open_device("cpu")
    arena = Arena(device, 2 << 20)
    block = arena.allocate(nbytes + 20)
    block.view.fill_(0xEE)
    source = memoryview(noise(nbytes + skew))[skew:]
    with Copier(device, Staging(device, 8 * SLOT)) as copier:
        ticket = copier.copy(source, block, 7)
        ticket.wait(device.current_stream())
        assert bytes(block.view.numpy()) == b"\xee" * 7 + bytes(source) + b"\xee" * 13
        ticket.result()
        assert ticket.done()
        assert ticket.error is None
        assert copier.copied_bytes == nbytes


def test_what_is_not_copied(slow: Slow) -> None:
    block = slow.block(10)
    for nbytes, offset in ((11, 0), (1, 10), (1, -1), (0, 11)):
        with pytest.raises(Refused, match="do not fit into a block of 10 bytes"):
            slow.copier.copy(memoryview(bytes(nbytes)), block, offset)
    with pytest.raises(Refused, match="make them contiguous"):
        slow.copier.copy(memoryview(bytes(10))[::2], block)
    matrix = np.arange(10, dtype=np.uint8).reshape(2, 5)
    slow.copier.copy(memoryview(matrix), block).result()
    slow.copier.copy(memoryview(np.empty((0, 3))), block).result()
    assert block.view.tolist() == list(range(10))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 5 * SLOT), min_size=1, max_size=30),
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.003]), min_size=1),
    direct=st.booleans(),
)
def test_many_in_flight_on_a_slow_device(sizes: list[int], delays: list[float], direct: bool) -> None:
    with slow_device() as device:
        arena, staging = Arena(device, 1 << 20), Staging(device, 8 * SLOT)
        with Copier(device, staging) as copier:
            delay(copier, delays)
            sources = [memoryview(noise(nbytes, seed)) for seed, nbytes in enumerate(sizes)]
            if direct:
                vars(device.module)["cudart"] = Runtime
                for source in sources[::2]:
                    device.register(source)
            blocks = [arena.allocate(nbytes) for nbytes in sizes]
            tickets = [copier.copy(*pair) for pair in zip(sources, blocks, strict=True)]
            for ticket in reversed(tickets):
                ticket.result()
            for source, block in zip(sources, blocks, strict=True):
                assert bytes(block.view.numpy()) == source
        assert not copier._in_flight


def delay(copier: Copier, delays: list[float]) -> None:
    """Have the copies of the side stream last as long as the list says, again and again."""
    line = copier.stream
    assert isinstance(line, Line)
    enqueue, pause = line.enqueue, threading.Event()
    count = 0

    def slowly(what: str, work: object) -> None:
        nonlocal count
        count += 1
        seconds = delays[count % len(delays)] if what == "copy" else 0.0
        enqueue(what, lambda: (pause.wait(seconds) if seconds else None, work()))  # type: ignore[operator]

    line.enqueue = slowly  # type: ignore[method-assign]


def test_staging_is_bounded_and_its_bytes_stay_until_they_were_read(slow: Slow) -> None:
    slow.side.gate.clear()
    source = noise(20 * SLOT)
    block = slow.block(20 * SLOT)
    ticket = slow.copier.copy(memoryview(source), block)
    until(lambda: slow.device.copies == 8)
    threading.Event().wait(0.02)
    assert slow.device.copies == 8, "a slot was filled while the device had not read it"
    assert not ticket.done()
    assert block.view.eq(0xEE).all()
    slow.side.gate.set()
    ticket.result()
    assert bytes(block.view.numpy()) == source


def test_a_stream_waits_for_its_copy_and_the_host_for_none(slow: Slow) -> None:
    slow.side.gate.clear()
    block = slow.block(SLOT)
    seen: list[int] = []
    compute = slow.device.module.compute
    compute.enqueue("before", lambda: seen.append(0))
    ticket = slow.copier.copy(memoryview(b"\x05" * SLOT), block)
    ticket.wait(slow.device.current_stream())
    compute.enqueue("after", lambda: seen.append(int(block.view[SLOT - 1])))
    until(lambda: seen == [0])
    assert not ticket.done()
    slow.side.gate.set()
    until(lambda: seen == [0, 5])
    assert compute.log == ["record", "before", "wait_event", "after"], "the arena's mark, and what is named here"
    assert slow.device.module.calls == ["set_device 0"]


def test_bytes_in_use_are_overwritten_only_when_the_use_has_ended(slow: Slow) -> None:
    compute = slow.device.module.compute
    first = slow.block(1 << 20)
    slow.copier.copy(memoryview(b"\x01" * (1 << 20)), first).result()
    compute.gate.clear()
    read: list[int] = []
    view = first.view
    compute.enqueue("compute", lambda: read.append(int(view.sum())))
    event = slow.device.event()
    event.record(slow.device.current_stream())
    slow.arena.free(first, after=event)
    second = slow.arena.allocate(1 << 20)
    ticket = slow.copier.copy(memoryview(b"\x02" * SLOT), second)
    threading.Event().wait(0.02)
    assert not ticket.done()
    assert view.eq(1).all()
    compute.gate.set()
    ticket.result()
    assert read == [1 << 20]
    assert second.view[:SLOT].eq(2).all()


def test_a_block_that_is_freed_under_its_copy_goes_to_the_next_copy_whole(slow: Slow) -> None:
    slow.side.gate.clear()
    first = slow.arena.allocate(1 << 20)
    lost = slow.copier.copy(memoryview(b"\x01" * (4 * SLOT)), first)
    slow.arena.free(first)
    second = slow.arena.allocate(1 << 20)
    ticket = slow.copier.copy(memoryview(b"\x02" * (4 * SLOT)), second)
    slow.side.gate.set()
    ticket.result()
    assert lost.done()
    assert second.view[: 4 * SLOT].eq(2).all()


def test_chunks_that_are_given_back_live_until_the_copy_into_them_is_done(slow: Slow) -> None:
    slow.side.gate.clear()
    block = slow.arena.allocate(SLOT)
    memory = weakref.ref(block.view.untyped_storage())
    ticket = slow.copier.copy(memoryview(noise(SLOT)), block)
    slow.arena.free(block)
    ticket.wait(slow.device.module.compute)
    until(lambda: slow.arena.trim() == 1 << 20)
    assert memory() is not None
    slow.side.gate.set()
    until(lambda: memory() is None)


def test_a_source_is_kept_as_long_as_the_device_reads_it(slow: Slow) -> None:
    class Owner(np.ndarray):  # type: ignore[type-arg]
        """An array that can be watched."""

    vars(slow.device.module)["cudart"] = Runtime
    block = slow.block(4 * SLOT)
    slow.side.gate.clear()
    watched = []
    for number in range(3):
        source = np.frombuffer(noise(4 * SLOT), np.uint8).copy().view(Owner)
        watched.append(weakref.ref(source))
        registration = slow.device.register(source.data) if number == 1 else None
        ticket = slow.copier.copy(source.data, block)
        if number == 1:
            assert registration is not None
            ticket.wait(slow.device.module.compute)
            registration.close()
            del registration
        elif number == 2:
            slow.device.faults[slow.device.copies] = RuntimeError("fails at once")
        del source
    assert watched[1]() is not None, "the device reads it by itself"
    slow.side.gate.set()
    until(lambda: all(source() is None for source in watched))


def test_closing_ends_what_was_asked_for(slow: Slow) -> None:
    block = slow.block(8 * SLOT)
    delay(slow.copier, [0.002])
    tickets = [slow.copier.copy(memoryview(bytes([i]) * SLOT), block, i * SLOT) for i in range(8)]
    slow.copier.close()
    assert all(ticket.done() for ticket in tickets)
    assert bytes(block.view.numpy()) == b"".join(bytes([i]) * SLOT for i in range(8))
    slow.copier.close()
    with pytest.raises(Closed, match="make a new one"):
        slow.copier.copy(memoryview(b""), block)


def test_copies_are_enqueued_in_the_order_of_asking_from_any_thread(slow: Slow) -> None:
    block = slow.block(SLOT)

    def ask() -> None:
        for number in range(50):
            slow.copier.copy(memoryview(bytes([number]) * SLOT), block)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    slow.copier.copy(memoryview(b"\xff" * SLOT), block).result()
    assert block.view.eq(0xFF).all()
    assert slow.device.copies == 201


def test_copying_into_a_block_that_was_made_in_inference() -> None:
    device = open_device("cpu")
    with Copier(device, Staging(device, 8 * SLOT)) as copier:
        with torch.inference_mode():
            block = Arena(device, SLOT).allocate(3)
            ticket = copier.copy(memoryview(b"abc"), block)
        ticket.result()
    assert bytes(block.view.numpy()) == b"abc"


def test_nothing_synchronises_the_device_in_steady_state(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of three layers' blocks, ten layers, five passes: only events order copies and computes."""
    waits: list[str] = []
    genuine = type(slow.device.event()).synchronize

    def synchronize(event: object) -> None:
        waits.append(threading.current_thread().name)
        genuine(event)  # type: ignore[arg-type]

    monkeypatch.setattr(type(slow.device.event()), "synchronize", synchronize)
    compute = slow.device.module.compute
    delay(slow.copier, [0.0005])
    layers = [memoryview(noise(3 * SLOT, seed)) for seed in range(10)]
    sums = [int(np.frombuffer(layer, np.uint8).sum(dtype=np.int64)) for layer in layers]
    got: list[int] = []
    arena = Arena(slow.device, 9 * SLOT, 3 * SLOT)
    for _ in range(5):
        resident: list[tuple[Block, object]] = []
        for number in range(len(layers) + 2):
            if number < len(layers):
                block = arena.allocate(3 * SLOT)
                resident.append((block, slow.copier.copy(layers[number], block)))
            if number >= 2:
                block, ticket = resident.pop(0)
                ticket.wait(slow.device.current_stream())  # type: ignore[attr-defined]
                view = block.view
                compute.enqueue("compute", lambda view=view: got.append(int(view.sum())))  # type: ignore[misc]
                event = slow.device.event()
                event.record(compute)
                arena.free(block, after=event)
                arena.check()
    until(lambda: len(got) == 50)
    assert got == sums * 5
    assert slow.device.module.calls == ["set_device 0"]
    assert set(compute.log) == {"record", "wait_event", "compute"}
    assert set(waits) <= {"tiermem-copier-slow:0"}, "only the copier's thread waits, for its own slots"
    assert arena.peak_bytes <= 9 * SLOT
