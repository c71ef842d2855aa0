"""Traces made by hand, and policies that do one thing: what the tests of replay share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tiermem.errors import PolicyError
from tiermem.policy import Move, Plan, Request, View, check_plan, fill_fastest
from tiermem.replay.simulate import Setting
from tiermem.replay.tier_model import parse_tier_models
from tiermem.replay.trace import Builder, Trace
from tiermem.types import PAGE_BYTES


def trace(visits: Iterable[tuple[float, Sequence[int]]], pages: int = 4, end_s: float = 10.0, models: int = 1,
          shifts_s: tuple[float, ...] = ()) -> Trace:  # fmt: skip
    """Models of `pages` pages each, one layer of two pages after another; visits of (time, pages), which count on."""
    builder = Builder()
    order = np.arange(pages)
    for number in range(models):
        builder.add_model(f"m{number}", order // 2, order, np.zeros(pages))
    for at_s, touched in visits:
        builder.add_visits(np.array([at_s]), np.array([len(touched)]), np.array(touched))
    return builder.finish({"kind": "hand"}, end_s, shifts_s)


def setting(of: Trace, fast: int, quota_pages_s: int = 1000, sampling: str = "exact", seed: int = 0) -> Setting:
    """DRAM of `fast` pages, and CXL for everything."""
    tiers = parse_tier_models((f"dram={fast * PAGE_BYTES}B,cxl=rest",), of.nbytes)
    return Setting(tiers, quota_pages_s * PAGE_BYTES, sampling, seed)


class Asked:
    """A runner of a function; `view -> plan`."""

    name, warnings, cpu_s = "asked", [], 0.0  # type: ignore[var-annotated]

    def __init__(self, plan: Callable[[View], Plan], period_s: float = 1.0, guard_s: float = 0.0) -> None:
        self._plan, self.period_s, self.guard_s = plan, period_s, guard_s
        self.views: list[View] = []

    def plan(self, view: View) -> Plan:
        self.views.append(view)
        try:
            return check_plan(view, self._plan(view))
        except ZeroDivisionError as error:
            raise PolicyError(str(error)) from error

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        return fill_fastest(request)

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        pass


def swap_at(*times_s: float, out: int, into: int) -> Callable[[View], Plan]:
    """At these times, demote one page and promote another for it."""
    return lambda view: [Move(out, 1, 0, 1, "out"), Move(into, 1, 1, 0, "in")] if view.now_s in times_s else []
