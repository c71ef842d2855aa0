"""Sampling inside a client: carries out the pool's order by looking at the page tables of this process, tick by tick.

Owns which mappings are sampled and when; decides nothing about heat. Does nothing in a forked child.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Mapping as MappingOf
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiermem import _native
from tiermem.errors import ConfigError, TiermemError
from tiermem.sampler.accessed import AccessedSampler
from tiermem.sampler.budget import Budget, Spent
from tiermem.sampler.mappings import Found, Mapping, Window
from tiermem.sampler.present import PresentSampler
from tiermem.types import PAGE_BYTES

_STATUS = Path("/proc/self/status")
_PINNED_EVERY_S = 1.0
_PINNED = re.compile(rb"^VmPin:\s+(\d+) kB", re.MULTILINE)
_SAMPLERS: dict[str, type[PresentSampler] | type[AccessedSampler]] = {
    "present": PresentSampler,
    "accessed": AccessedSampler,
}
_PINNED_UNKNOWN = (
    "{} bytes of this process are pinned, and nobody told which (VmPin in /proc/self/status): a device may read any "
    "page unseen; name them by mark_pinned"
)
_COW = "copy-on-write mappings are not sampled, their pages may hold writes; open models with writable=False"


@dataclass(frozen=True, slots=True)
class Order:
    """What the pool wants: `present`, `accessed` or `off`; a window's length while the client is busy; the part of the
    client's CPU time that sampling may take. Raises ConfigError."""

    rung: str
    epoch_s: float = 0.1
    budget: float = 0.01

    def __post_init__(self) -> None:
        if self.rung != "off" and self.rung not in _SAMPLERS:
            raise ConfigError(f"a client samples by present, accessed or off, not by {self.rung!r}")
        if not (0 < self.epoch_s < 3600 and 0 < self.budget <= 1):
            raise ConfigError(
                f"an epoch of {self.epoch_s} s with a budget of {self.budget}: must be positive, at most 1"
            )


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one tick.

    `untrackable`: page numbers that cannot be sampled, int32, for mappings where that changed. `refused` says why
    nothing, or not all, can be sampled; it stands until another report says otherwise. CPU seconds are since the last
    report: of the agent's sampling, of the page faults it made, of the client without the agent.
    """

    epoch: int
    windows: tuple[Window, ...]
    untrackable: MappingOf[str, npt.NDArray[np.int32]]
    refused: str
    agent_s: float
    fault_s: float
    client_s: float


@dataclass(slots=True)
class Member:
    """A mapping in the hands of ClientSampling. Keeps no memory mapped. `mapping` is None for a copy-on-write range."""

    range: _native.RangeReference
    mapping: Mapping | None
    pages: int
    untrackable: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))


def member_of(key: str, range_: _native.Range, pages: int) -> Member:
    """For whoever maps a model, before it hands it on: its page number p is at the range's start + p * 2 MiB.

    Raises Refused where pages exceed the range.
    """
    return Member(range_.reference(), None if range_.cow else Mapping(key, range_, pages), pages)


class _Meter:
    """What was spent since the last epoch, for the budget, and since the last report."""

    def __init__(self) -> None:
        self.tick_client_s = 0.0
        self._seen_cpu_s = time.process_time()
        self._began_s: float | None = None
        self._found = Found(())
        self._agent_s = self._client_s = 0.0
        self._report = [0.0, 0.0, 0.0]

    def count_client(self) -> None:
        """The process's CPU time since the last tick, less the agent's."""
        cpu_s = time.process_time()
        self.tick_client_s = max(cpu_s - self._seen_cpu_s, 0.0)
        self._seen_cpu_s = cpu_s
        self._client_s += self.tick_client_s
        self._report[2] += self.tick_client_s

    def count_agent(self, agent_s: float) -> None:
        self._seen_cpu_s += agent_s
        self._agent_s += agent_s
        self._report[0] += agent_s

    def found(self, began_s: float, found: Found) -> None:
        """Turns that began then were taken; what was counted until now is of those before."""
        self._began_s, self._found = began_s, found
        self._agent_s = self._client_s = 0.0
        self._report[1] += found.fault_s

    def forget(self) -> None:
        self._began_s = None

    def spent(self, now_s: float) -> Spent | None:
        """What the last turns cost, all together."""
        if self._began_s is None:
            return None
        found, wall_s = self._found, now_s - self._began_s
        return Spent(self._agent_s, found.turn_s, found.fault_s, found.pages, found.turns, self._client_s, wall_s)

    def reported(self) -> tuple[float, float, float]:
        """CPU seconds since the last report: agent, faults, client."""
        agent_s, fault_s, client_s = self._report
        self._report = [0.0, 0.0, 0.0]
        return agent_s, fault_s, client_s


class ClientSampling:
    """All mappings of one client. Thread-safe; ticks belong to the agent's thread, whose CPU time they measure."""

    def __init__(self, status: Path = _STATUS) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards everything below
        self._status = status
        self._members: dict[str, Member] = {}
        self._unknown_pinned = 0  # bytes
        self._pinned_read_s = -math.inf
        self._order = Order("off")
        self._sampler: PresentSampler | AccessedSampler | None = None
        self._budget = Budget()
        self._epoch = 0
        self._turns = 1
        self._refused, self._told_refused = "", ""
        self._ticked_s: float | None = None
        self._meter = _Meter()

    def add(self, key: str, member: Member) -> None:
        """Sample a model until it is unmapped. A copy-on-write range is never sampled, which is told."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._members[key] = member
            self._refused = self._note() or self._refused

    def remove(self, key: str) -> None:
        """Forget a mapping that is gone; unknown keys are none."""
        with self._lock:
            self._members.pop(key, None)

    def mark_pinned(self, key: str, pages: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """These pages were registered with a device: it reads them without this process's page tables."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            member = self._members.get(key)
            self._pinned_read_s = -math.inf
            if member is not None and member.mapping is not None:
                member.mapping.mark(np.asarray(pages, np.int64), _native.PINNED)

    def configure(self, order: Order) -> None:
        """Carry out this order from now on. What is refused is told by the next report."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if order == self._order and not self._refused:
                return
            if order.rung != self._order.rung or self._sampler is None:
                self._start(order.rung)
            self._order, self._turns = order, 1
            self._budget = Budget(order.budget, order.epoch_s)
            self._meter.forget()

    @property
    def pause_s(self) -> float | None:
        """Seconds until the next tick is due; 0 if there is something to tell, None if there is nothing to do."""
        if os.getpid() != self._pid:
            return None
        with self._lock:
            if self._refused != self._told_refused:
                return 0.0
            if self._sampler is None or not any(member.mapping for member in self._members.values()):
                return None
            return self._budget.pause_s

    def tick(self, now_s: float, gather_s: float = 0.0) -> Report | None:
        """Sample, if it is time to; None if there is nothing to tell. `now_s`: CLOCK_MONOTONIC.

        With `gather_s` turns are taken for about so long, without Python in between; `wake` ends that.
        """
        if os.getpid() != self._pid:
            return None
        with self._lock:
            begin = time.thread_time()
            self._meter.count_client()
            self._members = {key: member for key, member in self._members.items() if not member.range.closed}
            windows, untrackable = self._sample(now_s, gather_s) if self._sampler is not None else ((), {})
            self._meter.count_agent(time.thread_time() - begin)
            if not (windows or untrackable or self._refused != self._told_refused):
                return None
            self._told_refused = self._refused
            return Report(self._epoch, windows, untrackable, self._refused, *self._meter.reported())

    def wake(self) -> None:
        """Have a tick that gathers return soon; takes no lock."""
        sampler = self._sampler
        if sampler is not None:
            sampler.wake()

    def charge(self, agent_s: float) -> None:
        """The agent's thread also used so many CPU seconds for what sampling needs: telling the pool."""
        with self._lock:
            self._meter.count_agent(agent_s)

    def _start(self, rung: str) -> None:
        if self._sampler is not None:
            self._sampler.close()
        self._sampler, self._refused, self._ticked_s, self._pinned_read_s = None, "", None, -math.inf
        for member in self._members.values():
            if member.mapping is not None:
                member.mapping.mark(slice(None), _native.HELD, on=False)
        if rung == "off":
            return
        try:
            self._sampler = _SAMPLERS[rung]()
        except TiermemError as error:
            self._refused = str(error)
        else:
            self._refused = self._note()

    def _sample(self, now_s: float, gather_s: float) -> tuple[tuple[Window, ...], dict[str, npt.NDArray[np.int32]]]:
        assert self._sampler is not None
        last_s, self._ticked_s = self._ticked_s, now_s
        if last_s is not None and self._budget.is_idle(self._meter.tick_client_s, now_s - last_s):
            return (), {}
        mappings = [member.mapping for member in self._members.values() if member.mapping is not None]
        self._read_pinned(now_s)
        if self._unknown_pinned:
            self._refused = _PINNED_UNKNOWN.format(self._unknown_pinned)
            return (), self._untrackable(all_=True)
        # More turns from tick to tick, until they fill the time: the first ones tell what to expect.
        pause_s = max(self._budget.pause_s, self._order.epoch_s)
        self._turns = max(1, min(2 * self._turns, round(gather_s / pause_s)))
        quota = self._budget.pages(sum(mapping.pages for mapping in mappings), self._meter.spent(now_s), self._turns)
        try:
            found = self._sampler.sample(mappings, now_s, quota, self._turns, self._budget.pause_s)
        except TiermemError as error:
            self._sampler.close()
            self._sampler, self._refused = None, str(error)
            return (), {}
        self._epoch += found.turns
        self._meter.found(now_s, found)
        self._refused = self._note()
        return found.windows, self._untrackable()

    def _note(self) -> str:
        """Why not all can be sampled, where anything is."""
        if self._sampler is None:
            return ""
        notes = []
        mappings = [member.mapping for member in self._members.values()]
        if any((mapping.mask & _native.HELD).any() for mapping in mappings if mapping is not None):
            notes.append(self._sampler.note)
        if None in mappings:
            notes.append(_COW)
        return "; ".join(notes)

    def _untrackable(self, all_: bool = False) -> dict[str, npt.NDArray[np.int32]]:
        changed = {}
        for key, member in self._members.items():
            every = all_ or member.mapping is None
            pages = np.arange(member.pages, dtype=np.int32) if every else member.mapping.untrackable()  # type: ignore[union-attr]
            if not np.array_equal(pages, member.untrackable):
                member.untrackable = changed[key] = pages
        return changed

    def _read_pinned(self, now_s: float) -> None:
        """How much is pinned beyond what we know of; once a second, because the kernel takes long to say."""
        if now_s < self._pinned_read_s + _PINNED_EVERY_S:
            return
        self._pinned_read_s = now_s
        try:
            found = _PINNED.search(self._status.read_bytes())
        except OSError:
            found = None
        mappings = (member.mapping for member in self._members.values())
        known = sum(int((of.mask & _native.PINNED > 0).sum()) for of in mappings if of is not None) * PAGE_BYTES
        self._unknown_pinned = max(int(found[1]) * 1024 - known, 0) if found else 0
