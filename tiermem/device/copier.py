"""Copier: copies from host memory to blocks on a device, several in flight, and a ticket for each.

Owns a side stream and the one thread that fills staging and enqueues copies, in the order in which they were asked for,
those that were asked for ahead last. Never waits for a compute stream, and never has one wait for more than the copies
that it needs.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from tiermem import _native
from tiermem.device.arena import Block
from tiermem.device.backend import Device, Event, Stream, address_of
from tiermem.device.staging import Staging
from tiermem.errors import Closed, Refused, TiermemError, own
from tiermem.units import format_bytes

if TYPE_CHECKING:
    import torch

_LOOK_S = 0.005
"""How often the thread, while it has nothing to enqueue, looks which copies are done."""

_FILL_THREADS = 2

_NEEDED, _AHEAD, _LAST = range(3)


@dataclass(slots=True)
class _Order:
    """`source` gives the bytes. `target`: where to, uint8 on the device; `after`: what must pass before it is written
    to."""

    source: Callable[[], memoryview]
    target: torch.Tensor
    after: tuple[Event, ...]


class Ticket:
    """One copy. Its bytes may be used in a stream that `wait` was called for, and anywhere once it is `done`."""

    def __init__(self, device: Device, doing: str) -> None:
        self._device, self._doing = device, doing
        self._event: Event = device.event()
        self._enqueued = threading.Event()
        self._passed = False
        self._error: TiermemError | None = None
        # Until it begins; the copier's lock guards it.
        self._order: _Order | None = None

    @property
    def error(self) -> TiermemError | None:
        """Why the copy failed, as far as is known now."""
        return self._error

    def wait(self, stream: Stream) -> None:
        """Have what is enqueued later in `stream` start after the copy. The host goes on once the copy is enqueued,
        which takes as long as its bytes take into staging. Raises CopyFailed, DeviceLost where it is known by then."""
        self._enqueued.wait()
        self._told(lambda: self._event.wait(stream))

    def done(self) -> bool:
        """Whether the copy has ended, well or not."""
        if self._enqueued.is_set() and self._error is None and not self._passed:
            with suppress(TiermemError):
                self._passed = bool(self._told(self._event.query))
        return self._passed or self._error is not None

    def result(self) -> None:
        """Return when the copy is done. Raises CopyFailed, DeviceLost."""
        self._enqueued.wait()
        self._told(self._event.synchronize)
        self._passed = True

    def _told(self, question: Any) -> Any:
        if self._error is None:
            try:
                return question()
            except RuntimeError as error:
                self._error = self._device.explain(error, self._doing)
        raise own(self._error) from self._error.__cause__


class Copier:
    """Of one device; may be asked from any thread. `copied_bytes` were enqueued without an error so far."""

    def __init__(self, device: Device, staging: Staging) -> None:
        self.device = device
        self.stream: Stream = device.stream()
        self.copied_bytes = 0
        self._staging = staging
        self._queue = queue.PriorityQueue[tuple[int, int, Ticket | None]]()
        self._numbers = count()
        self._lock = threading.Lock()
        self._closed = False
        # Memory that enqueued copies use must live until they are done, whoever else lets go of it.
        self._in_flight: deque[tuple[Event, list[Any]]] = deque()
        self._unguarded: list[Any] = []
        self._thread = threading.Thread(target=self._run, name=f"tiermem-copier-{device.name}", daemon=True)
        self._thread.start()

    def copy(self, source: memoryview, block: Block, offset: int = 0) -> Ticket:
        """Copy `source`, contiguous host memory that nobody changes, to `offset` of a block, after `block.after`.

        Raises Refused where it is not contiguous or does not fit, Closed; all else is the ticket's.
        """
        flat = _flat(source)
        if not 0 <= offset <= block.nbytes - flat.nbytes:
            raise Refused(f"{flat.nbytes} bytes at offset {offset} do not fit into a block of {block.nbytes} bytes")
        return self._ordered(lambda: flat, block.view[offset:][: flat.nbytes], block.after, _NEEDED)

    def fill(self, block: Block, source: Callable[[], memoryview], ahead: bool = False) -> Ticket:
        """Copy to the whole of a block, after `block.after`, what `source` gives: as many bytes, contiguous host memory
        that nobody changes. It is asked when it is its turn, by the copier's thread: while it takes its time, later
        copies wait too. What it raises is the ticket's.

        With `ahead` the copies that are needed now go first: until it is done, `cancel` it before the block is freed.
        Raises Closed.
        """
        nbytes = block.nbytes

        def given() -> memoryview:
            flat = _flat(source())
            if flat.nbytes != nbytes:
                raise Refused(f"{flat.nbytes} bytes do not fill a block of {nbytes} bytes; give as many")
            return flat

        return self._ordered(given, block.view, block.after, _AHEAD if ahead else _NEEDED)

    def hasten(self, ticket: Ticket) -> None:
        """A copy that was asked for ahead is needed now."""
        with self._lock:
            if ticket._order is not None:
                self._queue.put((_NEEDED, next(self._numbers), ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Do not begin a copy: it has failed then. One that has begun goes on."""
        with self._lock:
            if ticket._order is not None:
                ticket._order = None
                ticket._error = Refused(f"{ticket._doing} was given up before it began")
                ticket._enqueued.set()

    def end_with(self, owner: object) -> None:
        """End the thread, and let go of staging, when `owner`, who alone asks for copies, is collected unclosed."""
        weakref.finalize(owner, self._queue.put, (_LAST, 0, None)).atexit = False

    def close(self) -> None:
        """Return when all copies that were asked for are done; their tickets tell how each ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put((_LAST, 0, None))
        self._thread.join()

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ordered(
        self, source: Callable[[], memoryview], target: torch.Tensor, after: tuple[Event, ...], rank: int
    ) -> Ticket:
        ticket = Ticket(self.device, f"copy of {format_bytes(target.numel())} to {self.device.name}")
        ticket._order = _Order(source, target, after)
        with self._lock:
            if self._closed:
                raise Closed(f"the copier of {self.device.name} is closed; make a new one")
            self._queue.put((rank, next(self._numbers), ticket))
        return ticket

    def _run(self) -> None:
        fault: Exception | None = None
        try:
            self.device.use()
        except RuntimeError as error:
            fault = error
        while True:
            try:
                ticket = self._queue.get(timeout=_LOOK_S if self._in_flight else None)[-1]
            except queue.Empty:
                self._let_go()
                continue
            if ticket is None:
                break
            with self._lock:
                order, ticket._order = ticket._order, None
            # It may have been begun or cancelled before.
            if order is not None:
                self._carry_out(ticket, order, fault)
            del ticket, order
            self._let_go()
        self._finish()
        self._unguarded = []

    def _carry_out(self, ticket: Ticket, order: _Order, fault: Exception | None) -> None:
        failure: Exception | None = None
        try:
            if fault is not None:
                raise fault
            try:
                self._enqueue(order)
            except Exception as error:
                # Behind a copy that failed half-way, too: its first half may be on its way.
                self._mark(ticket._event, isinstance(error, RuntimeError))
                raise
            self._mark(ticket._event)
            self.copied_bytes += order.target.numel()
        except Exception as error:
            failure = _bare(error)
        if failure is not None:
            ticket._error = self.device.explain(failure, ticket._doing)
        ticket._enqueued.set()

    def _enqueue(self, order: _Order) -> None:
        source, target = order.source(), order.target
        for event in order.after:
            self.stream.wait_event(event)
        self._unguarded.append(target)
        direct = self.device.registered(source)
        if direct is not None:
            self._unguarded.append((direct, source))
            self.device.copy(target, direct, self.stream)
            return
        address, step = address_of(source), self._staging.slot_bytes
        for start in range(0, source.nbytes, step):
            part = target[start : start + step]
            slot = self._staging.take()
            _native.copy(slot.address, address + start, part.numel(), _FILL_THREADS)
            try:
                self.device.copy(part, slot.memory[: part.numel()], self.stream)
            finally:
                # Where this fails, too, the slot's next bytes may overtake these; their ticket has failed by then.
                self._staging.mark(slot, self.stream)

    def _mark(self, event: Event, refused: bool = False) -> None:
        """When `event` passes, what was enqueued so far is done. `refused`: the stream did not take a copy; where it
        does not take an event either, nothing more is done there."""
        try:
            event.record(self.stream)
        except RuntimeError:
            if refused:
                self._renew()
            raise
        self._in_flight.append((event, self._unguarded))
        self._unguarded = []

    def _let_go(self) -> None:
        """Let go of what copies that are done have used."""
        try:
            while self._in_flight and self._in_flight[0][0].query():
                self._in_flight.popleft()
        except RuntimeError:
            self._renew()

    def _renew(self) -> None:
        """Go on in another stream: one in which a copy failed may do nothing more, and its events say so for ever."""
        self._finish()
        self._staging.renew()
        with suppress(TiermemError):
            self.stream = self.device.stream()

    def _finish(self) -> None:
        """Return when all copies that were begun have ended: an event tells of a failure only once what was enqueued
        before it does nothing more."""
        for event, _ in self._in_flight:
            with suppress(RuntimeError):
                event.synchronize()
        self._in_flight.clear()


def _flat(source: memoryview) -> memoryview:
    """Its bytes. Raises Refused where they do not lie side by side."""
    if not source.c_contiguous:
        raise Refused(f"{source.nbytes} bytes that do not lie side by side are not copied; make them contiguous")
    return source.cast("B") if source.nbytes else memoryview(b"")


def _bare(error: Exception) -> Exception:
    """The error without the frames through which it was raised, and those before it: they hold the source."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
    return error
