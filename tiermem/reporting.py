"""Reporting: the task of a client's agent. Samples this process's page tables as the pool ordered, and reports it.

Owns the sampling and what the pool has not been told yet; used by the agent's thread alone. Never decides how often.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tiermem._native import Range
from tiermem.errors import TiermemError
from tiermem.rpc import messages as m
from tiermem.sampler.client import ClientSampling, Order
from tiermem.sampler.mappings import Window
from tiermem.types import PAGE_BYTES

_PAUSE_S = 0.1
"""A new mapping is reported a moment later, out of the way of who opens many models."""


class Reporting:
    """`send` delivers a report, or raises."""

    def __init__(self, send: Callable[[m.ReportRequest], None]) -> None:
        self._send = send
        self._sampling = ClientSampling()
        self._rung = "off"
        self._not_before_s = 0.0
        self._mapped: dict[str, m.MappedReport] = {}
        self._unsent: dict[str, m.MappedReport] = {}
        self._untrackable: dict[str, int] = {}
        self._untold: set[str] = set()
        self._refused = ""

    def add(self, lease_id: str, mapping: Range, since_s: float) -> None:
        """A model was mapped here."""
        if not self._unsent:  # later ones do not put it off again
            self._not_before_s = time.monotonic() + _PAUSE_S
        self._mapped[lease_id] = self._unsent[lease_id] = m.MappedReport(lease_id, mapping.address, since_s)
        self._sampling.add(lease_id, mapping, mapping.nbytes // PAGE_BYTES)

    def remove(self, lease_id: str) -> None:
        """The mapping is gone."""
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

    @property
    def pause_s(self) -> float | None:
        pause_s = 0.0 if self._unsent else self._sampling.pause_s
        return None if pause_s is None else max(pause_s, self._not_before_s - time.monotonic())

    def run(self) -> None:
        report = self._sampling.tick(time.monotonic())
        windows: tuple[m.WindowReport, ...] = ()
        costs = 0.0, 0.0, 0.0
        if report is not None:
            windows, costs = tuple(map(_on_wire, report.windows)), (report.agent_s, report.fault_s, report.client_s)
            self._refused = report.refused
            changed = {key: len(pages) for key, pages in report.untrackable.items() if key in self._mapped}
            self._untrackable |= changed
            self._untold |= changed.keys()
        elif not self._unsent:
            return
        mapped = tuple(self._unsent.values())
        untrackable = tuple(m.UntrackableReport(key, self._untrackable[key]) for key in sorted(self._untold))
        try:
            self._send(m.ReportRequest(self._rung, mapped, windows, untrackable, *costs, self._refused))
        except TiermemError:
            self._not_before_s = time.monotonic() + _PAUSE_S
            raise
        self._unsent.clear()
        self._untold.clear()


def _on_wire(window: Window) -> m.WindowReport:
    bits = window.bits
    pages, touched = bits.pages.astype("<i4").tobytes(), np.packbits(bits.touched, bitorder="little").tobytes()
    return m.WindowReport(window.key, bits.begin_s, bits.end_s, pages, touched)
