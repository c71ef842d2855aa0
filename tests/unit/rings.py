"""Rings that a test fills: samples and records as bytes, and an opener that refuses what the test says."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

from tiermem import samples
from tiermem._native.perf import Count, Event
from tiermem.errors import NativeError
from tiermem.sampler.events import NamedEvent

PLAIN = samples.IP | samples.TID | samples.TIME | samples.ADDR | samples.CPU | samples.PERIOD
USER, KERNEL = 2, 1


def sample(pid: int, addr: int, *, misc: int = USER, time_ns: int = 1) -> bytes:
    """A record of layout PLAIN: PERF_RECORD_SAMPLE."""
    body = struct.pack("<QIIQQIIQ", 0x400000, pid, pid, time_ns, addr, 0, 0, 1)
    return struct.pack("<IHH", 9, misc, 8 + len(body)) + body


def record(kind: int, *words: int) -> bytes:
    body = struct.pack(f"<{len(words)}Q", *words)
    return struct.pack("<IHH", kind, 0, 8 + len(body)) + body


class FakeRing:
    """A ring of bytes that the test puts in. `fd` is a real descriptor, for epoll."""

    def __init__(self, event: Event, pid: int, cpu: int, leader: FakeRing | None, aux_nbytes: int) -> None:
        self.event, self.pid, self.cpu, self.leader, self.aux_nbytes = event, pid, cpu, leader, aux_nbytes
        self.fd = os.eventfd(0)
        self.enabled = not event.disabled
        self.content, self.aux, self.lost = b"", b"", 0

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def count(self) -> Count:
        return Count(1, 0, self.lost)

    def read(self, buffer: bytearray) -> int:
        return self._take("content", buffer)

    def read_aux(self, buffer: bytearray) -> int:
        return self._take("aux", buffer)

    def _take(self, which: str, buffer: bytearray) -> int:
        content = getattr(self, which)
        buffer[: len(content)] = content
        setattr(self, which, b"")
        return len(content)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class FakePmu:
    """Opens fake rings, and refuses those for which `refuse` names an errno."""

    def __init__(self) -> None:
        self.rings: list[FakeRing] = []
        self.refuse: Callable[[FakeRing], int] = lambda ring: 0

    def __call__(
        self, event: Event, pid: int, cpu: int, *, leader: Any = None, nbytes: int, aux_nbytes: int = 0
    ) -> Any:
        ring = FakeRing(event, pid, cpu, leader, aux_nbytes)
        if number := self.refuse(ring):
            ring.close()
            raise NativeError("refused", number)
        self.rings.append(ring)
        return ring

    @property
    def alive(self) -> list[FakeRing]:
        return [ring for ring in self.rings if ring.fd >= 0]


def plain(period_step: int = 0, **fields: Any) -> NamedEvent:
    return NamedEvent("plain", "test", Event(1, 5, sample_type=PLAIN, monotonic=True, period=1009),
                      period_step=period_step, **fields)  # fmt: skip
