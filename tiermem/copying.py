"""Copying: a runner's policy of memory tiers, asked which pages one device should hold copies of. Never acts."""

from __future__ import annotations

from tiermem.policy import Plan, View, as_copies, as_memory, check_plan
from tiermem.runner import Runner


class Copying:
    """A runner's policy for the view of a device: one hbm tier, and one tier of host memory that holds every page."""

    def __init__(self, runner: Runner) -> None:
        self.name, self.period_s = runner.name, runner.period_s
        self._runner = runner

    @property
    def cpu_s(self) -> float:
        """Of the runner."""
        return self._runner.cpu_s

    def plan(self, view: View) -> Plan:
        """Copies and drops, possible as of this view. Raises PolicyError as the runner does."""
        device = next(tier.id for tier in view.tiers if tier.kind == "hbm")
        return check_plan(view, as_copies(self._runner.plan(as_memory(view, device)), device))
