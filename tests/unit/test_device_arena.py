"""The arena: blocks do not overlap, the budget holds, and bytes that a device still uses are neither given away nor
forgotten."""

from __future__ import annotations

import random
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_device_backend import SlowDevice, refuse, slow_device
from tiermem.device import ALIGN, Arena, Block, Device, open_device
from tiermem.errors import Closed, CopyFailed, DeviceFull, Refused

KIB = 1024


class Counting(Device):
    """cpu, which counts the bytes that it gave and that are still held. `room`: how many it has."""

    def __init__(self, room: int = 1 << 40) -> None:
        super().__init__(torch.device("cpu"), torch.cpu)
        self.held_bytes = 0
        self.room = room
        self.asked: list[int] = []
        self.releases = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        self.asked.append(nbytes)
        if self.held_bytes + nbytes > self.room:
            raise DeviceFull("no room", nbytes)
        memory = super().empty(nbytes)
        self.held_bytes += nbytes
        # Of the storage, which views of any kind keep alive.
        weakref.finalize(memory.untyped_storage(), self._returned, nbytes)
        return memory

    def _returned(self, nbytes: int) -> None:
        self.held_bytes -= nbytes

    def release_cached(self) -> None:
        self.releases += 1


SIZES = st.one_of(st.integers(0, 3 * ALIGN), st.integers(1, 40).map(lambda n: n * KIB), st.integers(0, 70_000))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES),
        st.tuples(st.just("free"), st.integers(0, 1000)),
        st.tuples(st.just("trim"), st.just(0)),
        st.tuples(st.just("shrink"), st.integers(0, 20_000)),
    ),
    max_size=60,
)


@given(steps=STEPS, budget=st.integers(0, 200_000), chunk=st.sampled_from([1, 4 * KIB, 16 * KIB, 64 * KIB]))
def test_any_order_of_calls(steps: list[tuple[str, int]], budget: int, chunk: int) -> None:
    device = Counting()
    arena = Arena(device, budget, chunk)
    blocks: list[tuple[Block, int]] = []
    peak = 0
    for number, (step, amount) in enumerate(steps):
        if step == "allocate":
            blocks += allocated(arena, amount, number % 251, blocks)
        elif step == "free" and blocks:
            block, paint = blocks.pop(amount % len(blocks))
            assert block.view.eq(paint).all(), "somebody wrote into it"
            arena.free(block)
        elif step == "trim":
            before = arena.reserved_bytes
            assert arena.trim() == before - arena.reserved_bytes
        elif step == "shrink":
            before = arena.budget_bytes
            lowered = arena.shrink(amount)
            assert arena.budget_bytes == before - lowered
            assert lowered < amount + ALIGN
        arena.check()
        used = sum(-(-block.nbytes // ALIGN) * ALIGN for block, _ in blocks)
        peak = max(peak, used)
        assert (arena.used_bytes, arena.peak_bytes) == (used, peak)
        assert arena.reserved_bytes == device.held_bytes <= arena.budget_bytes <= budget
    for block, paint in blocks:
        assert block.view.eq(paint).all()
        arena.free(block)
    arena.check()
    arena.trim()
    assert arena.used_bytes == arena.reserved_bytes == 0
    if arena.budget_bytes:
        assert arena.allocate(arena.budget_bytes).nbytes == arena.budget_bytes, "the budget is there again as one piece"


def allocated(arena: Arena, nbytes: int, paint: int, blocks: list[tuple[Block, int]]) -> list[tuple[Block, int]]:
    try:
        block = arena.allocate(nbytes)
    except DeviceFull:
        held = sum(-(-held.nbytes // ALIGN) * ALIGN for held, _ in blocks)
        assert held or nbytes > arena.budget_bytes, "an arena without blocks has room for all that its budget allows"
        return []
    assert block.nbytes == block.view.numel() == nbytes
    assert block.view.data_ptr() % ALIGN == 0
    start, end = block.view.data_ptr(), block.view.data_ptr() + nbytes
    for held, _ in blocks:
        first = held.view.data_ptr()
        assert not nbytes or not held.nbytes or end <= first or first + held.nbytes <= start, "two blocks overlap"
    block.view.fill_(paint)
    return [(block, paint)]


def test_few_allocations_and_the_last_takes_what_would_be_too_little() -> None:
    device = Counting()
    arena = Arena(device, 100 * KIB, 30 * KIB)
    for _ in range(20):
        arena.allocate(5 * KIB)
    assert device.asked == [30 * KIB, 30 * KIB, 40 * KIB]
    assert device.releases == 0
    with pytest.raises(DeviceFull, match=r"no 512 B in one piece: 100\.0 KiB of 100\.0 KiB are used") as caught:
        arena.allocate(1)
    assert caught.value.lacking_bytes == ALIGN


def test_first_fit_and_joining() -> None:
    arena = Arena(Counting(), 8 * KIB)
    blocks = [arena.allocate(KIB) for _ in range(8)]
    places = [block.view.data_ptr() for block in blocks]
    for number in (6, 2, 4):
        arena.free(blocks[number])
        arena.check()
    again = arena.allocate(KIB)
    assert again.view.data_ptr() == places[2]
    with pytest.raises(DeviceFull) as caught:
        arena.allocate(3 * KIB)
    assert caught.value.lacking_bytes == 2 * KIB
    arena.free(blocks[5])
    assert arena.allocate(3 * KIB).view.data_ptr() == places[4]
    arena.check()


def test_a_budget_that_is_smaller_than_one_block_is_told_the_least() -> None:
    device = Counting()
    arena = Arena(device, 10_000)
    assert arena.budget_bytes == 9728, "whole multiples of the alignment"
    with pytest.raises(DeviceFull, match="give it a budget of at least 10240 bytes") as caught:
        arena.allocate(9729)
    assert caught.value.lacking_bytes == 512
    assert device.asked == []
    with pytest.raises(Refused, match="-1 bytes"):
        arena.allocate(-1)
    assert arena.allocate(0).view.numel() == 0
    arena.check()


def test_a_block_larger_than_a_chunk_and_idle_chunks_in_its_way() -> None:
    device = Counting()
    arena = Arena(device, 100 * KIB, 10 * KIB)
    small = [arena.allocate(10 * KIB) for _ in range(9)]
    for block in small:
        arena.free(block)
    assert arena.reserved_bytes == 90 * KIB
    large = arena.allocate(75 * KIB)
    arena.check()
    assert arena.reserved_bytes == device.held_bytes <= 100 * KIB
    assert large.view.numel() == 75 * KIB


def test_out_of_memory_while_growing_takes_what_is_needed_or_nothing() -> None:
    device = Counting(room=14 * KIB)
    arena = Arena(device, 1 << 20, 10 * KIB)
    arena.allocate(9 * KIB)
    block = arena.allocate(4 * KIB)
    assert device.asked == [10 * KIB, 10 * KIB, 4 * KIB]
    with pytest.raises(DeviceFull, match="no room"):
        arena.allocate(2 * KIB)
    arena.check()
    arena.free(block)
    arena.allocate(2 * KIB)
    arena.check()


def test_out_of_memory_of_torch_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(open_device("cpu"), 1 << 20)
    refuse(monkeypatch, above_bytes=1000)
    with pytest.raises(DeviceFull, match=r"2\.0 KiB of memory of cpu cannot be had"):
        arena.allocate(2000)
    arena.check()
    assert arena.reserved_bytes == 0


def test_backing_off() -> None:
    device = Counting()
    arena = Arena(device, 100 * KIB, 10 * KIB)
    blocks = [arena.allocate(10 * KIB) for _ in range(4)]
    assert arena.shrink(50 * KIB) == 50 * KIB, "what was not reserved"
    assert (arena.budget_bytes, arena.reserved_bytes, device.releases) == (50 * KIB, 40 * KIB, 0)
    for block in blocks[1:3]:
        arena.free(block)
    assert arena.shrink(20 * KIB) == 20 * KIB
    assert (arena.budget_bytes, arena.reserved_bytes, device.releases) == (30 * KIB, 30 * KIB, 1)
    assert arena.shrink(25 * KIB) == 10 * KIB, "two chunks have blocks"
    assert arena.reserved_bytes == device.held_bytes == 20 * KIB
    assert arena.shrink(1) == 0
    with pytest.raises(DeviceFull):
        arena.allocate(1)
    arena.check()


def test_trimming_is_what_releases_memory_and_all_else_leaves_the_device_alone() -> None:
    with slow_device() as device:
        arena = Arena(device, 1 << 20, 10 * KIB)
        for _ in range(10):
            blocks = [arena.allocate(5 * KIB) for _ in range(10)]
            for block in blocks:
                arena.free(block)
        settle(device)
        assert device.module.calls == []
        assert set(device.module.compute.log) == {"record"}
        assert arena.trim() == 50 * KIB
        assert device.module.calls == ["empty_cache"]
        assert arena.trim() == 0
        assert device.module.calls == ["empty_cache"]


def settle(device: SlowDevice) -> None:
    """Return when the compute stream has done what was enqueued."""
    done = threading.Event()
    device.module.compute.enqueue("settle", done.set)
    assert done.wait(10)
    device.module.compute.log.remove("settle")


def test_bytes_in_use_by_a_stream_go_on_with_the_event_that_ends_it() -> None:
    with slow_device() as device:
        arena = Arena(device, 4 * KIB)
        blocks = [arena.allocate(KIB) for _ in range(4)]
        settle(device)
        device.module.compute.gate.clear()
        first, second = device.event(), device.event()
        for event in (first, second):
            event.record(device.current_stream())
        arena.free(blocks[0], after=first)
        arena.free(blocks[1], after=second)
        arena.free(blocks[3])
        whole = arena.allocate(2 * KIB)
        assert set(whole.after) == {first, second}
        assert arena.allocate(KIB).after == ()
        arena.free(whole)
        assert set(arena.allocate(KIB).after) == {first, second}, "nobody wrote there, so that they still count"
        device.module.compute.gate.set()
        settle(device)
        assert arena.allocate(KIB).after == ()


def test_memory_is_kept_until_the_device_has_left_it() -> None:
    with slow_device() as device:
        arena = Arena(device, 4 * KIB)
        block = arena.allocate(4 * KIB)
        device.module.compute.gate.clear()
        event = device.event()
        event.record(device.current_stream())
        arena.free(block, after=event)
        assert arena.trim() == arena.shrink(KIB) == 0
        event.fault = RuntimeError("do not know")
        device.module.compute.gate.set()
        settle(device)
        assert arena.trim() == 0, "the device does not tell"
        event.fault = None
        assert arena.trim() == 4 * KIB


def test_new_memory_comes_with_the_event_that_ends_its_former_use() -> None:
    with slow_device() as device:
        device.module.compute.gate.clear()
        arena = Arena(device, 4 * KIB)
        (event,) = arena.allocate(KIB).after
        assert not event.query()
        device.module.compute.gate.set()
        settle(device)
        assert event.query()

        def unable(stream: Any) -> None:
            raise RuntimeError("no events")

        arena.trim()
        device.event = lambda: type("Event", (), {"record": staticmethod(unable)})()  # type: ignore[method-assign]
        other = Arena(device, 4 * KIB)
        with pytest.raises(CopyFailed, match="an allocation on slow:0 failed: no events"):
            other.allocate(KIB)
        other.check()
        assert other.reserved_bytes == 0


def test_what_is_not_taken_back() -> None:
    arena, other = Arena(Counting(), 4 * KIB), Arena(Counting(), 4 * KIB)
    block, stranger = arena.allocate(KIB), other.allocate(KIB)
    arena.free(block)
    for wrong in (block, stranger):
        with pytest.raises(Refused, match="freed before, or is of another arena"):
            arena.free(wrong)
    with pytest.raises(AttributeError):
        block.view.fill_(1)
    assert stranger.view.numel() == KIB
    arena.check()
    other.check()


def test_after_the_end_memory_returns_with_the_last_view() -> None:
    device = Counting()
    arena = Arena(device, 4 * KIB)
    block = arena.allocate(KIB)
    arena.close()
    arena.check()
    assert device.held_bytes == 4 * KIB
    with pytest.raises(Closed, match="make a new one"):
        arena.allocate(1)
    with pytest.raises(Closed, match="make a new one"):
        arena.free(block)
    del block
    assert device.held_bytes == 0


def test_from_many_threads() -> None:
    arena = Arena(Counting(), 256 * KIB, 16 * KIB)
    faults: list[BaseException] = []

    def churn(seed: int) -> None:
        order = random.Random(seed)
        try:
            for _ in range(150):
                block = arena.allocate(order.randrange(1, 9000))
                block.view.fill_(seed)
                assert block.view.eq(seed).all()
                arena.free(block)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    arena.check()
    assert arena.used_bytes == 0
