"""Reporting: the task of a client's agent. Samples this process's page tables as the pool ordered, and reports it.

Owns the sampling and what the pool has not been told yet; used by the agent's thread alone. Never decides how often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from tiermem.errors import TiermemError
from tiermem.rpc import messages as m
from tiermem.sampler.client import ClientSampling, Member, Order, Report
from tiermem.sampler.mappings import Window

_PAUSE_S = 0.1
"""A new mapping is reported a moment later, out of the way of who opens many models."""

_GATHER_S = 1.0
"""Turns are taken, and windows kept, for about so long: each report costs the client as much as many turns."""


class Reporting:
    """`send` delivers a report, or raises."""

    def __init__(self, send: Callable[[m.ReportRequest], None]) -> None:
        self._send = send
        self._sampling = ClientSampling()
        self._rung = "off"
        self._not_before_s = self._due_s = self._sent_s = 0.0
        self._windows: list[m.WindowReport] = []
        self._costs = 0.0, 0.0, 0.0
        self._mapped: dict[str, m.MappedReport] = {}
        self._unsent: dict[str, m.MappedReport] = {}
        self._untrackable: dict[str, int] = {}
        self._untold: set[str] = set()
        self._refused = ""

    def add(self, lease_id: str, member: Member, since_s: float) -> None:
        """A model was mapped here; `member` is of who mapped it, so that what waits here keeps nothing mapped."""
        if not self._unsent:  # later ones do not put it off again
            self._not_before_s = time.monotonic() + _PAUSE_S
        self._mapped[lease_id] = self._unsent[lease_id] = m.MappedReport(lease_id, member.range.address, since_s)
        self._sampling.add(lease_id, member)

    def mark_pinned(self, lease_id: str, pages: Sequence[int]) -> None:
        """A device reads these pages of a model that was mapped here."""
        self._sampling.mark_pinned(lease_id, pages)

    def remove(self, lease_id: str) -> None:
        """The mapping is gone."""
        self._sampling.remove(lease_id)
        self._mapped.pop(lease_id, None)
        self._unsent.pop(lease_id, None)
        self._untrackable.pop(lease_id, None)
        self._untold.discard(lease_id)

    def announce(self) -> None:
        """Another pool took the leases over, and knows nothing of what is mapped."""
        self._unsent |= self._mapped
        self._untold |= self._untrackable.keys()

    def obey(self, order: m.SamplingOrder) -> None:
        """Sample so from now on. Raises ConfigError for an order that this version does not know."""
        self._sampling.configure(Order(order.rung, order.epoch_s, order.budget))
        self._rung = order.rung

    def wake(self) -> None:
        """Have `run` return soon; from any thread."""
        self._sampling.wake()

    @property
    def pause_s(self) -> float | None:
        sampling_s, now = self._sampling.pause_s, time.monotonic()
        if self._unsent or sampling_s == 0.0:
            wait_s = 0.0
        elif sampling_s is not None:
            wait_s = self._due_s - now
        elif self._windows:
            wait_s = self._sent_s + _GATHER_S - now
        else:
            return None
        return max(wait_s, self._not_before_s - now, 0.0)

    def run(self) -> None:
        refused = self._refused
        report = self._sampling.tick(time.monotonic(), _GATHER_S)
        self._due_s = time.monotonic() + (self._sampling.pause_s or 0.0)
        if report is not None:
            self._take(report)
        urgent = self._unsent or self._untold or refused != self._refused
        if urgent or (self._windows and time.monotonic() >= self._sent_s + _GATHER_S / 2):
            self._tell()

    def _take(self, report: Report) -> None:
        self._windows += map(_on_wire, report.windows)
        agent_s, fault_s, client_s = self._costs
        self._costs = agent_s + report.agent_s, fault_s + report.fault_s, client_s + report.client_s
        self._refused = report.refused
        changed = {key: len(pages) for key, pages in report.untrackable.items() if key in self._mapped}
        self._untrackable |= changed
        self._untold |= changed.keys()

    def _tell(self) -> None:
        begin_s = time.thread_time()
        windows, self._windows = tuple(self._windows), []  # what does not arrive is no news the next time
        costs, self._costs = self._costs, (0.0, 0.0, 0.0)
        self._sent_s = time.monotonic()
        mapped = tuple(self._unsent.values())
        untrackable = tuple(m.UntrackableReport(key, self._untrackable[key]) for key in sorted(self._untold))
        try:
            self._send(m.ReportRequest(self._rung, mapped, windows, untrackable, *costs, self._refused))
        except TiermemError:
            self._not_before_s = time.monotonic() + _PAUSE_S
            raise
        self._unsent.clear()
        self._untold.clear()
        self._sampling.charge(time.thread_time() - begin_s)


def _on_wire(window: Window) -> m.WindowReport:
    bits = window.bits
    pages, touched = bits.pages.astype("<i4").tobytes(), np.packbits(bits.touched, bitorder="little").tobytes()
    return m.WindowReport(window.key, bits.begin_s, bits.end_s, pages, touched)
