"""Devices of a replay: which pages have a copy on each, and what serving requests from them copies. Times nothing.

Each visit of the trace is a request: one forward pass of one model on one device. It goes to the device that has most
of the model; among equals, none having any of it too, to the one whose last request is oldest. What the device lacks is
copied from host memory while the model passes over it; then the device's policy is asked what it is to hold. Of the
pages that just passed it may keep any, as far as there is room; others that it wants are copied now.

A page never leaves host memory, so dropping its copy moves nothing. Each device has a policy of its own, which sees the
copies of that device, and what was read there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError, PolicyError
from tiermem.heat import Heat, snapshot
from tiermem.observations import Counts, Rung
from tiermem.policy import PAGE_DTYPES, Models, Pages, Plan, TierView, View
from tiermem.replay.oracle import oracle_hits
from tiermem.replay.result import ratio
from tiermem.replay.trace import Trace
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes, parse_bytes

HBM, DRAM, DISK = range(3)
"""Tiers of a device's view; the disk is there because policies expect it last."""

EXAMPLE = "10:24GiB"
_MAX_DEVICES = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """So many devices, which hold copies of `places` pages each."""

    devices: int
    places: int


def parse_devices(text: str, nbytes: int) -> Setting:
    """Of `10:24GiB`, each device's memory being bytes or a part of `nbytes`, those of all models (`10:4/300`).

    Raises ConfigError where that cannot be read, or no page fits.
    """
    number, _, size = text.partition(":")
    try:
        capacity = int(Fraction(size) * nbytes) if "/" in size else parse_bytes(size)
        setting = Setting(int(number), capacity // PAGE_BYTES)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--devices {text!r}: write how many, and how much each of them holds: {EXAMPLE}, or a part "
                          "of all bytes, as 10:4/300") from None  # fmt: skip
    if not 0 < setting.devices <= _MAX_DEVICES or setting.places <= 0:
        raise ConfigError(f"--devices {text!r}: 1 to {_MAX_DEVICES} devices of {format_bytes(PAGE_BYTES)} or more each")
    return setting


@dataclass(frozen=True)
class Served:
    """One row of the table. Ratios are NaN where there is nothing to divide by.

    hit_ratio      bytes read that had a copy on the device when the request came, of all that were read
    oracle_share   of what the oracle would have read so
    copied_bytes   from host memory to devices: what requests lacked, and what policies wanted besides
    busiest        part of the requests that the device with most of them had
    policy_s       CPU time of a plan in the mean
    failure        why no policy was asked any more; empty: all were
    """

    policy: str
    hit_ratio: float
    copied_bytes: int
    oracle_share: float = math.nan
    busiest: float = math.nan
    plans: int = 0
    policy_s: float = 0.0
    failure: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON: NaN becomes None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def baselines(trace: Trace, setting: Setting) -> tuple[Served, Served]:
    """best-static: the pages that the trace touches most, known beforehand, on any device, and never dropped. oracle:
    Belady's MIN (tiermem.replay.oracle) on one device as large as all together, which bounds any choice of devices too.
    Neither pays for the copies that it begins with."""
    places = setting.devices * setting.places
    most = int(np.sort(np.bincount(trace.page, minlength=trace.pages))[::-1][:places].sum())
    best = int(oracle_hits(trace, places).sum())
    static, oracle = (
        Served(name, ratio(hits, trace.touches), (trace.touches - hits) * PAGE_BYTES)
        for name, hits in (("best-static", most), ("oracle", best))
    )
    return static, oracle


class Asked(Protocol):
    """A device's policy: what answers views with copies and drops. See tiermem.runner.Runner."""

    name: str
    period_s: float

    @property
    def cpu_s(self) -> float: ...

    def plan(self, view: View) -> Plan: ...


class Serving:
    """One replay; `policies`: one a device. `held[device, page]`: that device has a copy."""

    def __init__(self, trace: Trace, setting: Setting, policies: Sequence[Asked]) -> None:
        self.held = np.zeros((setting.devices, trace.pages), np.bool_)
        self._trace, self._setting = trace, setting
        self._of_model = np.zeros((setting.devices, len(trace.names)), np.int64)
        self._requests = np.zeros(setting.devices, np.int64)
        self._last_s = np.full(setting.devices, -np.inf)
        self._devices = [_Device(trace, setting.places, policy) for policy in policies]
        self._hits = self._copied = self._plans = 0
        self._failure = ""

    def run(self) -> Served:
        """Serve all requests."""
        trace, before_s = self._trace, sum(device.policy.cpu_s for device in self._devices)
        first = trace.first.tolist()
        for visit, now_s in enumerate(trace.visit_s.tolist()):
            self._serve(trace.page[first[visit] : first[visit + 1]], now_s)
        spent_s = sum(device.policy.cpu_s for device in self._devices) - before_s
        return Served(
            policy=self._devices[0].policy.name,
            hit_ratio=ratio(self._hits, trace.touches),
            copied_bytes=self._copied * PAGE_BYTES,
            busiest=ratio(int(self._requests.max()), len(trace.visit_s)),
            plans=self._plans,
            policy_s=spent_s / max(1, self._plans),
            failure=self._failure,
        )

    def _serve(self, pages: npt.NDArray[np.int32], now_s: float) -> None:
        model = int(self._trace.model[pages[0]])
        number = self._device_for(model)
        held, device = self.held[number], self._devices[number]
        hits = int(held[pages].sum())
        self._hits += hits
        self._copied += len(pages) - hits
        self._requests[number] += 1
        self._last_s[number] = now_s
        device.read(model, pages, now_s)
        if self._failure:
            return
        self._plans += 1
        try:
            plan = device.policy.plan(device.view(held, model, now_s))
        except PolicyError as error:
            self._failure = str(error)
        else:
            self._execute(plan, number, pages)

    def _device_for(self, model: int) -> int:
        most = self._of_model[:, model]
        equals = np.flatnonzero(most == most.max())
        return int(equals[np.argmin(self._last_s[equals])])

    def _execute(self, plan: Plan, number: int, passed: npt.NDArray[np.int32]) -> None:
        """Do the copies and drops of a plan that is possible; the copies of pages that just passed are made already."""
        wanted = np.zeros(self._trace.pages, np.bool_)
        for move in plan:
            rows = slice(move.first, move.first + move.pages)
            models, change = self._trace.model[rows], 1 if move.kind == "copy" else -1
            np.add.at(self._of_model[number], models, change)
            self.held[number, rows] = change > 0
            wanted[rows] |= change > 0
        wanted[passed] = False
        self._copied += int(wanted.sum())

    def check(self) -> None:
        """Raises AssertionError unless copies are counted as they are, and no device has more than it has room for."""
        for number, held in enumerate(self.held):
            counted = np.bincount(self._trace.model[held], minlength=len(self._trace.names))
            assert (counted == self._of_model[number]).all(), f"device {number}: copies are not counted as they are"
            assert counted.sum() <= self._setting.places, f"device {number} holds {counted.sum()} pages"


class _Device:
    """What one device's policy knows: what was read there, and when."""

    def __init__(self, trace: Trace, places: int, policy: Asked) -> None:
        self.policy = policy
        self._trace, self._places = trace, places
        self._heat, self._until_s = Heat(trace.pages), 0.0
        self._opens = np.zeros(len(trace.names), np.int64)
        self._last_open_s = np.full(len(trace.names), np.nan)
        self._model_bytes = np.bincount(trace.model) * PAGE_BYTES
        self._columns = {
            "id": np.arange(trace.pages), "model": trace.model, "segment": trace.segment, "layer": trace.segment,
            "order": trace.order, "tensor_class": trace.tensor_class, "tier": np.full(trace.pages, DRAM, np.int8),
            "pinned": np.zeros(trace.pages, np.bool_),
        }  # fmt: skip

    def read(self, model: int, pages: npt.NDArray[np.int32], now_s: float) -> None:
        """A model passes over these pages of its own."""
        self._opens[model] += 1
        self._last_open_s[model] = now_s
        ones = np.ones(len(pages), np.uint32)
        self._heat.add_counts(Counts(Rung.PERF, self._until_s, now_s, np.sort(pages), ones, 1.0))
        self._until_s = now_s

    def view(self, held: npt.NDArray[np.bool_], model: int, now_s: float) -> View:
        """The pool as this device's policy sees it at the end of a pass of `model`."""
        trace, heat = self._trace, snapshot((self._heat,), now_s)
        columns: dict[str, Any] = self._columns | {
            "replicas": held.astype(np.uint8) << HBM,
            "leased": trace.model == model,
            "last_used_s": np.nan_to_num(self._last_open_s)[trace.model],
        }
        rate = np.bincount(trace.model, np.nan_to_num(heat.rate), len(trace.names)).astype(np.float64, copy=False)
        models = Models(trace.names, self._model_bytes.copy(), self._opens.copy(), self._last_open_s.copy(), rate)
        for array in (*columns.values(), models.nbytes, models.opens, models.last_open_s, models.rate):
            array.flags.writeable = False
        for name in PAGE_DTYPES.keys() - columns.keys():
            columns[name] = getattr(heat, name)
        tiers = (
            TierView(HBM, "hbm", "hbm", self._places * PAGE_BYTES, int(held.sum()) * PAGE_BYTES),
            TierView(DRAM, "dram", "dram", trace.nbytes, trace.nbytes),
            TierView(DISK, "disk", "disk", None, 0),
        )
        return View(now_s, tiers, models, Pages(**columns), period_s=self.policy.period_s)
