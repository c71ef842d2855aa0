"""Simulation: one policy against one trace, in simulated time. The policy, its view and its heat are the pool's own.

Every `period_s` the policy is asked; its plan is carried out while the touches of that period happen. Whoever fails is
replaced by hold, as in a pool. There is no disk: all models are in memory, and nothing is ever evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError, PolicyError
from tiermem.heat import Heat, snapshot
from tiermem.policy import PAGE_DTYPES, Models, Pages, Request, View, fill_fastest
from tiermem.replay.accounts import Accounts
from tiermem.replay.observe import Observer
from tiermem.replay.residency import Moved, Residency
from tiermem.replay.result import Result, Ticks, convergence_s, ratio
from tiermem.replay.tier_model import TierModel, tiers_of
from tiermem.replay.trace import Trace
from tiermem.types import PAGE_BYTES

if TYPE_CHECKING:
    from tiermem.runner import Runner


@dataclass(frozen=True, slots=True)
class Setting:
    """What all policies of a comparison have alike. `quota_bytes_s` may be moved a second; `sampling`: exact or
    present."""

    tiers: tuple[TierModel, ...]
    quota_bytes_s: int
    sampling: str = "exact"
    seed: int = 0


_MAX_TICKS = 5_000_000

HOLD_PERIOD_S = 1.0
"""Ticks of a replay without a policy."""


class Simulation:
    """One replay. `runner` None: nothing is ever moved, and `placed` says where the pages are."""

    def __init__(
        self, trace: Trace, setting: Setting, runner: Runner | None, placed: npt.NDArray[np.int8] | None = None
    ) -> None:
        self._trace, self._setting, self._runner = trace, setting, runner
        self.period_s = runner.period_s if runner else HOLD_PERIOD_S
        self._failure = ""
        self._plan_s: list[float] = []
        self._tiers = tiers_of(setting.tiers)
        self._heat = Heat(trace.pages)
        self._observer = Observer(trace, setting.sampling, setting.seed)
        self._columns = self._fixed_columns()
        self._bounds = np.searchsorted(trace.model, np.arange(len(trace.names) + 1)).tolist()
        self._model_bytes = np.diff(self._bounds) * PAGE_BYTES
        self._opens = np.zeros(len(trace.names), np.int64)
        self._readers = np.zeros(len(trace.names), np.int64)
        self._last_open_s = np.full(len(trace.names), np.nan)
        self._used = self._quota_bytes = 0
        tier = self._place() if placed is None else placed.astype(np.int8)
        self.residency = Residency(tier, self._tiers)
        self._accounts = Accounts(trace.pages, setting.tiers)

    def _fixed_columns(self) -> dict[str, npt.NDArray[np.generic]]:
        trace, pages = self._trace, self._trace.pages
        fixed: dict[str, npt.NDArray[np.generic]] = {
            "id": np.arange(pages), "model": trace.model, "segment": trace.segment, "layer": trace.segment,
            "order": trace.order, "tensor_class": trace.tensor_class, "replicas": np.zeros(pages, np.uint8),
            "pinned": np.zeros(pages, np.bool_),
        }  # fmt: skip
        for column in fixed.values():
            column.flags.writeable = False
        return fixed

    def _place(self) -> npt.NDArray[np.int8]:
        """Models come into an empty pool one after another, as the trace lists them."""
        trace, tier = self._trace, np.empty(self._trace.pages, np.int8)
        for number, (first, last) in enumerate(pairwise(self._bounds)):
            rows = slice(first, last)
            columns = (trace.segment[rows], trace.segment[rows], trace.order[rows], trace.tensor_class[rows])
            request = Request(0.0, trace.names[number], tuple(t.view() for t in self._tiers), *columns)
            tier[rows] = self._placed(request)
            for memory in self._tiers.memory:
                memory.count(int((tier[rows] == memory.id).sum()) * PAGE_BYTES)
        return tier

    def _placed(self, request: Request) -> npt.NDArray[np.int8]:
        if self._runner and not self._failure:
            try:
                return self._runner.place(request)
            except PolicyError as error:
                self._failure = str(error)
        return fill_fastest(request)

    def run(self) -> Result:
        """Replay the whole trace. Raises ConfigError where that would take for ever."""
        trace = self._trace
        if trace.end_s / self.period_s > _MAX_TICKS:
            raise ConfigError(
                f"{trace.end_s:.0f} s of trace are more than {_MAX_TICKS} periods of {self.period_s} s; cut the trace, "
                "or give the policy a longer period_s"
            )
        edges = np.arange(0.0, trace.end_s, self.period_s)
        cuts = np.append(np.searchsorted(trace.visit_s, edges), len(trace.visit_s)).tolist()
        rows = []
        for tick, now_s in enumerate(edges.tolist()):
            end_s = min(now_s + self.period_s, trace.end_s)
            moved = self._act(now_s)
            rows.append(self._read(cuts[tick], cuts[tick + 1], now_s, end_s, moved))
        reads, hits, moved_pages = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        ticks = Ticks(edges, reads, hits, moved_pages)
        accounts, shift_s = self._accounts, trace.shifts_s[-1] if trace.shifts_s else None
        return Result(
            policy=self._runner.name if self._runner else "",
            hit_ratio=ratio(int(hits.sum()), int(reads.sum())),
            slowdown=ratio(accounts.spent_s, accounts.fast_s),
            moved_bytes=accounts.moved * PAGE_BYTES,
            promoted_bytes=accounts.promoted * PAGE_BYTES,
            useful_bytes=accounts.useful * PAGE_BYTES,
            ping_pongs=self.residency.ping_pongs,
            convergence_s=None if shift_s is None else convergence_s(ticks, shift_s, trace.end_s),
            ticks=len(self._plan_s),
            policy_s=float(np.mean(self._plan_s or [0.0])),
            policy_max_s=max(self._plan_s, default=0.0),
            failure=self._failure,
            refused=dict(self.residency.refused),
            timeline=ticks,
        )

    def _act(self, now_s: float) -> Moved:
        """Ask the policy and do what it says."""
        self._take_uses(now_s)
        self._quota_bytes += int(self._setting.quota_bytes_s * self.period_s)
        plan = []
        if self._runner and not self._failure:
            view = self._view(now_s)
            before_s = self._runner.cpu_s
            try:
                plan = self._runner.plan(view)
            except PolicyError as error:
                self._failure = str(error)
            self._plan_s.append(self._runner.cpu_s - before_s)
        guard_s = self._runner.guard_s if self._runner else 0.0
        moved = self.residency.execute(plan, now_s, self.period_s, self._quota_bytes, guard_s)
        self._quota_bytes %= PAGE_BYTES  # parts of a page add up: else short periods would lose them each time
        return moved

    def _take_uses(self, now_s: float) -> None:
        trace = self._trace
        last = int(np.searchsorted(trace.use_s, now_s, side="right"))
        uses = slice(self._used, last)
        columns = (trace.use_s[uses].tolist(), trace.use_model[uses].tolist(), trace.use_change[uses].tolist())
        for at_s, model, change in zip(*columns, strict=True):
            self._readers[model] += change
            if change > 0:
                self._opens[model] += 1
                self._last_open_s[model] = at_s
                self._heat.add_declared(np.arange(*self._bounds[model : model + 2]), at_s)  # as a pool does
        self._used = last

    def _view(self, now_s: float) -> View:
        trace = self._trace
        heat = snapshot((self._heat,), now_s)
        columns = self._columns | {
            "tier": self.residency.tier.copy(),
            "leased": (self._readers > 0)[trace.model],
            "last_used_s": np.nan_to_num(self._last_open_s)[trace.model],
        }
        models = Models(
            trace.names, self._model_bytes.copy(), self._opens.copy(), self._last_open_s.copy(),
            np.bincount(trace.model, np.nan_to_num(heat.rate), len(trace.names)).astype(np.float64, copy=False),
        )  # fmt: skip
        for array in (*columns.values(), models.nbytes, models.opens, models.last_open_s, models.rate):
            array.flags.writeable = False
        for name in PAGE_DTYPES.keys() - columns.keys():
            columns[name] = getattr(heat, name)
        loads = (*(self._accounts.bytes_s / [t.bandwidth_bytes_s for t in self._setting.tiers]).tolist(), 0.0)
        tiers = tuple(tier.view(load) for tier, load in zip(self._tiers, loads, strict=True))
        return View(now_s, tiers, models, Pages(**columns), 0, self._quota_bytes, self.period_s)

    def _read(self, begin: int, end: int, now_s: float, end_s: float, moved: Moved) -> tuple[int, int, int]:
        """The touches of visits [begin, end): pages read, of these from the fastest tier; pages moved meanwhile."""
        trace = self._trace
        first, last = int(trace.first[begin]), int(trace.first[end])
        counts = np.bincount(trace.page[first:last], minlength=trace.pages)
        late = self._reads_after(moved, begin, end)
        hits = self._accounts.take(counts, late, self.residency.tier, moved, end_s - now_s)
        for tier, model, load in zip(self._tiers.memory, self._setting.tiers, self._accounts.bytes_s, strict=True):
            tier.speed.latency_s = model.latency_s(float(load))
        self._observer.observe(self._heat, begin, end, now_s, end_s, counts)
        return last - first, hits, len(moved)

    def _reads_after(self, moved: Moved, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Touches of each moved page since it arrived."""
        late = np.zeros(len(moved), np.int64)
        if not len(moved) or begin == end:
            return late
        trace, row = self._trace, np.full(self._trace.pages, -1, np.int32)
        row[moved.page] = np.arange(len(moved))
        base = trace.first[begin]
        rows = row[trace.page[base : trace.first[end]]]
        touches = np.flatnonzero(rows >= 0)
        rows = rows[touches]
        visit = np.searchsorted(trace.first, base + touches, side="right") - 1
        return np.bincount(rows[trace.visit_s[visit] >= moved.at_s[rows]], minlength=len(moved))
