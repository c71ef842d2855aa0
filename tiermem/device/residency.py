"""Residency: which weights have a replica on one device, who holds it, and which go when others need the room.

Owns the replicas, and through an arena, a copier and its staging the memory that they and their copies take. Never
writes a weight back, never has the device's work wait for anything but the copies that it needs, and never changes what
somebody holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from heapq import heapify, heappop
from itertools import count

from tiermem.device.arena import Arena, Block, Chunk, pending, whole
from tiermem.device.backend import Device, Event
from tiermem.device.copier import Copier
from tiermem.device.headroom import Headroom
from tiermem.device.holding import Holding
from tiermem.device.replica import Replica, Weight
from tiermem.device.staging import Staging
from tiermem.errors import Closed, DeviceFull, DeviceLost, TiermemError, own
from tiermem.units import format_bytes

__all__ = ["Holding", "Replica", "Residency", "Weight"]


class Residency:
    """Replicas of weights on `device`, never more than `budget_bytes` of them. May be used from any thread.

    Weights that together take no more than the budget, each rounded up to 512 bytes, always fit where nobody holds any,
    if need be in a piece of memory of their own. Beside what is held they may not, as each lies in one piece. A device
    that has less memory than the budget says lowers the budget, for as long as that is so.

    `on_change`, where it is set, is called, without a lock, after replicas came or went.
    """

    def __init__(
        self,
        device: Device,
        budget_bytes: int | None = None,
        *,
        reserve_bytes: int = 512 << 20,
        staging_bytes: int = 64 << 20,
        chunk_bytes: int = 256 << 20,
        worth: Callable[[Replica], float] | None = None,
    ) -> None:
        """`budget_bytes`: None takes what the device has free, less `reserve_bytes`, which are left alone for the
        engine: while the device has less free than that, the budget is lowered by what lacks. Of replicas that nobody
        holds the one of least `worth` goes first, by default the one whose last hold ended longest ago; `worth` is
        asked under a lock, so that it must not use the residency. Raises ConfigError, DeviceFull, DeviceLost."""
        self.device = device
        self.on_change: Callable[[], None] | None = None
        if budget_bytes is None:
            budget_bytes = max(0, device.free_bytes() - reserve_bytes)
        self._staging = Staging(device, staging_bytes)
        self._copier = Copier(device, self._staging)
        self._copier.end_with(self)
        self._arena = Arena(device, budget_bytes, chunk_bytes)
        self._worth = worth or (lambda replica: replica.used)
        self._headroom = Headroom(device, self._arena, reserve_bytes)
        self._replicas = dict[Hashable, Replica]()
        # Those that failed and are still held; nobody else gets them.
        self._forgotten = set[Replica]()
        self._held_bytes = 0
        self._clock = count(1)
        self._lock = threading.Lock()
        self._changed = self._closed = False
        self._lost: DeviceLost | None = None

    @property
    def used_bytes(self) -> int:
        """Of all replicas, each in whole multiples of 512 bytes."""
        return self._arena.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` ever was."""
        return self._arena.peak_bytes

    @property
    def budget_bytes(self) -> int:
        """What is in effect now."""
        return self._arena.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        """Memory that was taken from the device."""
        return self._arena.reserved_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory pinned for copies."""
        return self._staging.nbytes

    @property
    def copied_bytes(self) -> int:
        """Enqueued to be copied without an error, so far."""
        return self._copier.copied_bytes

    def hold(self, weights: Sequence[Weight]) -> Holding:
        """Replicas of all these weights, to stay until the holding is released; what is absent is copied, once for
        equal keys. Drops what nobody holds, the least worth first, until they fit. The copies are on their way then:
        `Holding.wait`.

        Raises DeviceFull, which names the bytes asked for and the budget, DeviceLost, Closed; nothing is held then.
        """
        with self._changing():
            self._heed()
            kept = {w.key: r for w in weights if (r := self._present(w.key)) is not None}
            absent = {w.key: w for w in weights if w.key not in kept}
            for replica in kept.values():
                self._grip(replica)
            try:
                made = self._made(list(absent.values()), self._victims(), ahead=False)
            except BaseException:
                for replica in kept.values():
                    self._loose(replica)
                raise
            for replica in made:
                self._grip(replica)
            for replica in kept.values():
                self._copier.hasten(replica.ticket)
            replicas = [self._replicas[w.key] for w in weights]
            return Holding(self.device, replicas, sum(r.nbytes for r in made), self._on_failure, self._on_release)

    def prefetch(self, weights: Iterable[Weight]) -> None:
        """Have weights copied for whoever holds them next: in turn, as many as fit beside what somebody holds. Drops as
        `hold` does, but none of these. Raises DeviceLost, Closed."""
        wanted = list(weights)
        with self._changing():
            self._heed()
            victims, kept = self._victims(), list[Replica]()
            try:
                for weight in wanted:
                    replica = self._present(weight.key) or self._made([weight], victims, ahead=True)[0]
                    self._grip(replica)
                    kept.append(replica)
            except DeviceFull:
                return
            finally:
                for replica in kept:
                    self._loose(replica)

    def has(self, key: Hashable) -> bool:
        """Whether a weight has a replica: copied, or on its way and not failed so far."""
        with self._lock:
            replica = self._replicas.get(key)
            return replica is not None and self._lost is None and not replica.failed

    def drop(self, keys: Iterable[Hashable]) -> int:
        """Give up those replicas that nobody holds; returns their bytes."""
        wanted = dict.fromkeys(keys)
        with self._changing(closed_too=True):
            given = [r for key in wanted if (r := self._replicas.get(key)) is not None and not r.holds]
            for replica in given:
                self._forget(replica)
            return sum(replica.nbytes for replica in given)

    def shrink(self, nbytes: int) -> int:
        """Give memory back to the device, for the engine, and lower the budget for good: drops replicas that nobody
        holds until so many bytes, in whole chunks, are free of any, or as many as can be. Returns the bytes given. The
        host waits for work that was enqueued on them. Raises DeviceLost."""
        with self._changing(closed_too=True):
            before = self._arena.reserved_bytes
            self._vacate(nbytes)
            self._settle()
            self._arena.shrink(self._arena.budget_bytes - before + nbytes)
            self._headroom.wanted_bytes = self._arena.budget_bytes
            return before - self._arena.reserved_bytes

    def check(self) -> None:
        """Raises AssertionError unless replicas are where they say, and nothing is lost or counted twice."""
        with self._lock:
            self._arena.check()
            if self._closed:
                return
            replicas = [*self._replicas.values(), *self._forgotten]
            assert len({id(replica.block) for replica in replicas}) == len(replicas), "two replicas in one block"
            assert sum(whole(replica.nbytes) for replica in replicas) == self._arena.used_bytes, "a block is nobody's"
            assert all(replica.holds > 0 for replica in self._forgotten), "a failed replica is kept for nobody"
            assert all(replica.holds >= 0 for replica in replicas), "more releases than holds"
            held = sum(whole(replica.nbytes) for replica in replicas if replica.holds)
            assert held == self._held_bytes, "held bytes"
            assert all(replica.weight.key == key for key, replica in self._replicas.items()), "a replica of another"

    def close(self) -> None:
        """Give all up, once copies and the work that was marked by releases are done; held replicas keep their memory
        until their views go. What is asked for later raises Closed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for replica in [r for r in self._replicas.values() if not r.holds]:
                self._forget(replica)
            self._replicas.clear()
            self._forgotten.clear()
        self._copier.close()
        with suppress(RuntimeError):
            self._arena.settle()
        self._arena.close()
        self._staging.close()
        self._tell()

    # --- what is held --------------------------------------------------------------------------------------------

    def _grip(self, replica: Replica) -> None:
        if not replica.holds:
            self._held_bytes += whole(replica.nbytes)
        replica.holds += 1

    def _loose(self, replica: Replica) -> None:
        replica.holds -= 1
        replica.used = next(self._clock)
        if not replica.holds:
            self._held_bytes -= whole(replica.nbytes)
            if replica in self._forgotten:
                self._forgotten.remove(replica)
                self._arena.free(replica.block)

    def _on_failure(self, replica: Replica, error: TiermemError) -> None:
        with self._lock:
            if isinstance(error, DeviceLost):
                self._lost = copy(error)
            if self._replicas.get(replica.weight.key) is replica:
                self._forget(replica)
        self._tell()

    def _on_release(self, holding: Holding, after: Iterable[Event]) -> None:
        with self._lock:
            if holding.released:
                return
            holding.released = True
            if self._closed:
                return
            for replica in holding.distinct:
                replica.block.after = (*pending(replica.block.after), *after)
                self._loose(replica)

    def _present(self, key: Hashable) -> Replica | None:
        """The replica of a weight, if it did not fail. Raises DeviceLost."""
        replica = self._replicas.get(key)
        if replica is None or not replica.failed:
            return replica
        self._forget(replica)
        if isinstance(replica.ticket.error, DeviceLost):
            raise own(replica.ticket.error)
        return None

    def _forget(self, replica: Replica) -> None:
        """Give it to nobody any more; its memory returns when nobody holds it."""
        del self._replicas[replica.weight.key]
        self._changed = True
        self._copier.cancel(replica.ticket)
        if replica.holds:
            self._forgotten.add(replica)
        else:
            self._arena.free(replica.block)

    # --- room ----------------------------------------------------------------------------------------------------

    def _made(self, weights: Sequence[Weight], victims: Iterator[Replica], ahead: bool) -> list[Replica]:
        """Replicas of weights that have none, with their copies on their way; or none of them. Raises DeviceFull."""
        self._check_room(weights)
        sizes, before = [weight.nbytes for weight in weights], self._arena.budget_bytes
        try:
            blocks = self._blocks(sizes, victims)
        except DeviceFull:
            if ahead or not self._in_one_piece(sum(map(whole, sizes))):
                raise
            blocks = self._blocks(sizes, victims)
        finally:
            if self._arena.budget_bytes < before:
                self._headroom.was_lowered()
        made = [
            Replica(weight, block, self._copier.fill(block, weight.source, ahead), used=next(self._clock))
            for weight, block in zip(weights, blocks, strict=True)
        ]
        self._replicas |= {replica.weight.key: replica for replica in made}
        self._changed |= bool(made)
        return made

    def _check_room(self, weights: Sequence[Weight]) -> None:
        """Raises DeviceFull where weights do not fit beside what is held, before anything is dropped for them."""
        asked = sum(whole(weight.nbytes) for weight in weights)
        if self._held_bytes + asked > self._arena.budget_bytes:
            self._headroom.recover()
        least, budget = self._held_bytes + asked, self._arena.budget_bytes
        if least > budget:
            what = f"{len(weights)} weights" if len(weights) > 1 else weights[0].name
            raise DeviceFull(
                f"{what} of {format_bytes(asked)} do not fit on {self.device.name} beside "
                f"{format_bytes(self._held_bytes)} that are held: the budget is {format_bytes(budget)}; release some, "
                f"or give it a budget of at least {least} bytes",
                least - budget,
            )

    def _in_one_piece(self, nbytes: int) -> bool:
        """When nothing is left to be dropped, free room may lie in pieces, in chunks that are too small: give these
        back and take one that is large enough. Returns whether there were any. The device may be waited for."""
        self._settle()
        given = self._arena.trim()
        if given:
            self._headroom.recover()
            with suppress(DeviceFull):
                self._arena.free(self._arena.allocate(nbytes))
        return bool(given)

    def _blocks(self, sizes: Sequence[int], victims: Iterator[Replica]) -> list[Block]:
        """One for each size, or none; drops victims until they fit."""
        blocks = dict[int, Block]()
        try:
            for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
                blocks[i] = self._block(sizes[i], victims)
        except BaseException:
            for block in blocks.values():
                self._arena.free(block)
            raise
        return [blocks[i] for i in range(len(sizes))]

    def _block(self, nbytes: int, victims: Iterator[Replica]) -> Block:
        arena = self._arena
        while True:
            while arena.used_bytes + whole(nbytes) > arena.budget_bytes and (victim := next(victims, None)):
                self._forget(victim)
            try:
                return arena.allocate(nbytes)
            except DeviceFull:
                victim = next(victims, None)
                if victim is None:
                    raise
                self._forget(victim)

    def _victims(self) -> Iterator[Replica]:
        """Those that nobody holds, the least worth first, as of when the first one is needed."""
        unheld = [(self._worth(replica), replica.used, replica) for replica in self._replicas.values()]
        heapify(unheld)
        while unheld:
            replica = heappop(unheld)[-1]
            if not replica.holds and self._replicas.get(replica.weight.key) is replica:
                yield replica

    def _vacate(self, nbytes: int) -> None:
        """Drop replicas until chunks of so many bytes have no blocks: all of a chunk of which nothing is held, those
        chunks first whose best replica is of the least worth."""
        of_chunk = dict[Chunk, list[Replica]]()
        for replica in (*self._replicas.values(), *self._forgotten):
            if replica.block.chunk is not None:
                of_chunk.setdefault(replica.block.chunk, []).append(replica)
        vacant = self._arena.reserved_bytes - sum(chunk.nbytes for chunk in of_chunk)
        loose = [replicas for replicas in of_chunk.values() if not any(replica.holds for replica in replicas)]
        loose.sort(key=lambda replicas: max(map(self._worth, replicas)), reverse=True)
        while vacant < nbytes and loose:
            replicas = loose.pop()
            assert replicas[0].block.chunk is not None
            vacant += replicas[0].block.chunk.nbytes
            for replica in replicas:
                self._forget(replica)

    def _heed(self) -> None:
        """Leave the engine its memory."""
        lacking = self._headroom.lacking_bytes()
        if lacking:
            self._vacate(lacking - self._headroom.unreserved_bytes)
            self._arena.shrink(lacking)

    def _settle(self) -> None:
        try:
            self._arena.settle()
        except RuntimeError as error:
            raise self.device.explain(error, f"waiting for work on {self.device.name}") from error

    # --- one at a time -------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, closed_too: bool = False) -> Iterator[None]:
        """The lock; what came or went is told when it is free again."""
        try:
            with self._lock:
                if self._lost is not None:
                    raise own(self._lost) from self._lost.__cause__
                if self._closed and not closed_too:
                    raise Closed(f"the residency on {self.device.name} is closed; make a new one")
                try:
                    yield
                except DeviceLost as error:
                    # Without the frames through which it is raised: they hold what is on the device.
                    self._lost = copy(error)
                    raise
        finally:
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, False
        if changed and self.on_change is not None:
            self.on_change()
