"""Arena: the device memory that is ours: a few large allocations, and blocks that are cut from them.

Owns which bytes are free, and which events must pass before they are written to again. Never copies, and waits only in
`settle`.
First fit by address, neighbours joined when they are freed: Knuth, The Art of Computer Programming 1, 2.5.
"""

from __future__ import annotations

import threading
from bisect import bisect
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tiermem.device.backend import ALIGN, Device, Event
from tiermem.errors import Closed, DeviceFull, Refused
from tiermem.units import format_bytes

if TYPE_CHECKING:
    import torch


@dataclass(eq=False, slots=True)
class Block:
    """`view`: its bytes, uint8 [nbytes] on the device, aligned to ALIGN. `after`: events that end the bytes' former
    use, and must have passed before they are written to; a copier sees to it. Whoever uses the bytes adds his own."""

    view: torch.Tensor
    nbytes: int
    after: tuple[Event, ...]
    chunk: Chunk | None
    start: int

    @property
    def end(self) -> int:
        """Start of what follows it in its chunk."""
        return self.start + whole(self.nbytes)


@dataclass(slots=True)
class _Range:
    """Free bytes of a chunk, from `start` to `end`."""

    start: int
    end: int
    after: tuple[Event, ...] = ()


class Chunk:
    """One allocation of an arena, and its free ranges by address."""

    def __init__(self, memory: torch.Tensor, after: Event) -> None:
        """`after`: when what used the memory before has ended."""
        self.memory = memory
        self.nbytes = memory.numel()
        self.free = [_Range(0, self.nbytes, (after,))]

    @property
    def idle(self) -> bool:
        """Whether no block is in it, and nothing on the device uses it any more."""
        return [(free.start, free.end) for free in self.free] == [(0, self.nbytes)] and not pending(self.free[0].after)

    def take(self, nbytes: int) -> Block | None:
        """A block from the first range that has room."""
        for i, free in enumerate(self.free):
            if free.end - free.start >= whole(nbytes):
                block = Block(self.memory[free.start :][:nbytes], nbytes, pending(free.after), self, free.start)
                free.start = block.end
                if free.start == free.end:
                    del self.free[i]
                return block
        return None

    def give(self, block: Block, after: Iterable[Event]) -> None:
        """Put a block's bytes back, joined with what is free beside them."""
        freed = _Range(block.start, block.end, pending(after))
        first = last = bisect(self.free, freed.start, key=lambda free: free.start)
        if first and self.free[first - 1].end == freed.start:
            first -= 1
        if last < len(self.free) and self.free[last].start == freed.end:
            last += 1
        joined = [*self.free[first:last], freed]
        self.free[first:last] = [
            _Range(
                min(free.start for free in joined),
                max(free.end for free in joined),
                pending(event for free in joined for event in free.after),
            )
        ]


class Arena:
    """Never holds more than `budget_bytes` of the device. May be used from any thread.

    `used_bytes` are those of its blocks, in multiples of ALIGN, and `peak_bytes` the most that they ever were;
    `reserved_bytes` are those of its chunks.
    """

    def __init__(self, device: Device, budget_bytes: int, chunk_bytes: int = 256 << 20) -> None:
        self.device = device
        self.budget_bytes = budget_bytes // ALIGN * ALIGN
        self.chunk_bytes = whole(chunk_bytes)
        self.used_bytes = self.peak_bytes = self.reserved_bytes = 0
        self._chunks = list[Chunk]()
        self._blocks = set[Block]()
        self._lock = threading.Lock()
        self._closed = False

    def allocate(self, nbytes: int) -> Block:
        """A block of so many bytes, with any content.

        Raises DeviceFull, where `lacking_bytes` is what the largest piece that could be had is short of; a block that
        exceeds `budget_bytes` never can. Where it is the device that has no more, the budget is lowered to what is
        reserved. Raises DeviceLost, Refused for a negative size, Closed.
        """
        with self._lock:
            self._check_open()
            block = self._taken(nbytes)
            self._blocks.add(block)
            self.used_bytes += block.end - block.start
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            return block

    def free(self, block: Block, after: Event | None = None) -> None:
        """Take a block back. When `after` passes, an event that is not recorded again, nothing on the device may use it
        any more, other than copies of the copier that will write there next. The block has no view then.

        Raises Refused for a block that is not of this arena or was freed, Closed.
        """
        with self._lock:
            self._check_open()
            if block not in self._blocks:
                raise Refused(f"a block of {format_bytes(block.nbytes)} was freed before, or is of another arena")
            self._blocks.remove(block)
            self.used_bytes -= block.end - block.start
            if block.chunk is not None:
                # What came before the block may not have passed yet either.
                block.chunk.give(block, (*block.after, after) if after else block.after)
            # Whoever goes on using it finds out, and does not keep the memory of a chunk that is given back.
            block.chunk = None
            del block.view

    def settle(self) -> None:
        """Return when nothing on the device uses free bytes any more, so that chunks without blocks can be given back.
        Raises RuntimeError, as torch does."""
        with self._lock:
            awaited = {event for chunk in self._chunks for free in chunk.free for event in free.after}
        for event in awaited:
            event.synchronize()

    def grow(self, nbytes: int) -> None:
        """Raise the budget by `nbytes`, rounded down to whole multiples of ALIGN."""
        with self._lock:
            self.budget_bytes += nbytes // ALIGN * ALIGN

    def trim(self) -> int:
        """Give chunks without blocks back to the device; returns their bytes. The device may be waited for."""
        with self._lock:
            given = self._drop(self.reserved_bytes)
        if given:
            self.device.release_cached()
        return given

    def shrink(self, nbytes: int) -> int:
        """Lower the budget by `nbytes`, or as far as chunks have no blocks, and give back what exceeds it; returns by
        how much it was lowered. What was not reserved goes first. The device may be waited for."""
        with self._lock:
            before = self.budget_bytes
            wanted = max(0, before - whole(nbytes))
            given = self._drop(self.reserved_bytes - wanted)
            self.budget_bytes = max(wanted, self.reserved_bytes)
            lowered = before - self.budget_bytes
        if given:
            self.device.release_cached()
        return lowered

    def close(self) -> None:
        """Give all memory up; it returns with the last view of a block. Copiers were closed before."""
        with self._lock:
            self._closed = True
            self._chunks.clear()
            self._blocks.clear()
            self.used_bytes = self.reserved_bytes = 0

    def check(self) -> None:
        """Blocks and free ranges fill the chunks without gap or overlap, and the sums are theirs."""
        with self._lock:
            assert self.used_bytes == sum(block.end - block.start for block in self._blocks), "used bytes"
            assert self.reserved_bytes == sum(chunk.nbytes for chunk in self._chunks), "reserved bytes"
            assert self.used_bytes <= self.reserved_bytes <= self.budget_bytes, "more than the budget"
            assert self.used_bytes <= self.peak_bytes, "a peak below what is used"
            for chunk in self._chunks:
                blocks = [(block.start, block.end) for block in self._blocks if block.chunk is chunk]
                free = [(free.start, free.end) for free in chunk.free]
                end = 0
                for first, last in sorted(blocks + free):
                    assert first == end < last, f"a gap or an overlap at {end}"
                    end = last
                assert end == chunk.nbytes, f"a chunk ends at {end}, not at {chunk.nbytes}"
                assert all(a[1] != b[0] for a, b in pairwise(free)), "free neighbours are apart"

    def _taken(self, nbytes: int) -> Block:
        if nbytes < 0:
            raise Refused(f"a block cannot have {nbytes} bytes")
        if nbytes == 0:
            return Block(self.device.empty(0), 0, (), None, 0)
        for chunk in self._chunks:
            if (block := chunk.take(nbytes)) is not None:
                return block
        block = self._grown(whole(nbytes)).take(nbytes)
        assert block is not None, "a new chunk has room"
        return block

    def _grown(self, nbytes: int) -> Chunk:
        """A new chunk with room for `nbytes`, for which idle ones that are too small go. Raises DeviceFull."""
        idle = sum(chunk.nbytes for chunk in self._chunks if chunk.idle)
        if nbytes > self.budget_bytes - self.reserved_bytes + idle:
            raise self._full(nbytes, idle)
        self._drop(self.reserved_bytes + nbytes - self.budget_bytes)
        rest = self.budget_bytes - self.reserved_bytes
        # What would be left of the budget, if it is less than a chunk, would fit few blocks.
        wanted = max(nbytes, self.chunk_bytes if rest >= 2 * self.chunk_bytes else rest)
        chunk = Chunk(self._memory(wanted, nbytes), self._reached())
        self._chunks.append(chunk)
        self.reserved_bytes += chunk.nbytes
        return chunk

    def _memory(self, wanted: int, least: int) -> torch.Tensor:
        """So many bytes of the device, or the least that will do."""
        if wanted > least:
            with suppress(DeviceFull):
                return self.device.empty(wanted)
        try:
            return self.device.empty(least)
        except DeviceFull:
            self.budget_bytes = self.reserved_bytes
            raise

    def _reached(self) -> Event:
        """Where the current stream is: torch hands out memory that only this stream is known to have left alone."""
        event = self.device.event()
        try:
            event.record(self.device.current_stream())
        except RuntimeError as error:
            raise self.device.explain(error, f"an allocation on {self.device.name}") from error
        return event

    def _drop(self, nbytes: int) -> int:
        """Give idle chunks up, the newest first, until it is so many bytes; returns how many it was."""
        given = 0
        for chunk in [chunk for chunk in reversed(self._chunks) if chunk.idle]:
            if given >= nbytes:
                break
            self._chunks.remove(chunk)
            given += chunk.nbytes
        self.reserved_bytes -= given
        return given

    def _full(self, nbytes: int, idle: int) -> DeviceFull:
        largest = max((free.end - free.start for chunk in self._chunks for free in chunk.free), default=0)
        lacking = nbytes - max(largest, self.budget_bytes - self.reserved_bytes + idle)
        where = f"the arena on {self.device.name}"
        if nbytes > self.budget_bytes:
            return DeviceFull(
                f"a block of {format_bytes(nbytes)} does not fit into {where}, whose budget is "
                f"{format_bytes(self.budget_bytes)}; give it a budget of at least {nbytes} bytes",
                lacking,
            )
        return DeviceFull(
            f"{where} has no {format_bytes(nbytes)} in one piece: {format_bytes(self.used_bytes)} of "
            f"{format_bytes(self.budget_bytes)} are used; drop replicas, or raise the budget",
            lacking,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the arena on {self.device.name} is closed; make a new one")


def whole(nbytes: int) -> int:
    """What a block of so many bytes takes: rounded up to ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


def pending(events: Iterable[Event]) -> tuple[Event, ...]:
    """Those that have not passed, or of which the device does not tell."""
    return tuple(event for event in dict.fromkeys(events) if not _passed(event))


def _passed(event: Event) -> bool:
    try:
        return event.query()
    except RuntimeError:
        return False
