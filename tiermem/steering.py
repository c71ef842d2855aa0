"""Steering: which policy is in charge. Asks it, and falls back to holding where it fails. Never moves anything.

A policy that raises, overruns its budget or plans what cannot be is not asked again until it is set again or its file
changes. Threads may share it; a caller may hold the pool's lock, which it never takes.
"""

from __future__ import annotations

import logging
import os
import threading

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError, PolicyError
from tiermem.policy import Plan, Request, View, fill_fastest
from tiermem.runner import open_runner

HOLD = "hold"
_log = logging.getLogger(__name__)


class Steering:
    """`name` is the policy that was asked for; `failure` says why it is not in charge, and is empty while it is."""

    def __init__(self, name: str, budget_s: float) -> None:
        """Raises ConfigError where there is no such policy."""
        self.name = name
        self.failure = ""
        self.plans = 0
        self.failures = 0
        self._budget_s = budget_s
        self._past_cpu_s = 0.0
        self._unloadable: tuple[int, ...] | None = None  # the state of the file that could not be loaded again
        self._lock = threading.Lock()
        self._runner = open_runner(name, budget_s)

    @property
    def period_s(self) -> float:
        """How often it wants to be asked."""
        return self._runner.period_s

    @property
    def guard_s(self) -> float:
        """How long a page that moved stays where it is, if it came from where it would go."""
        return self._runner.guard_s

    @property
    def sources(self) -> tuple[str, ...]:
        """Where to look for weights that are in no memory here: PEER and DISK, what to try first before the other."""
        return self._runner.sources

    @property
    def warnings(self) -> list[str]:
        return self._runner.warnings

    @property
    def cpu_s(self) -> float:
        """CPU time of all policies so far."""
        return self._past_cpu_s + self._runner.cpu_s

    def plan(self, view: View) -> Plan:
        """What the policy wants; nothing where it failed, now or before."""
        with self._lock:
            if self.failure:
                return []
            self.plans += 1
            try:
                return self._runner.plan(view)
            except PolicyError as error:
                self._fail(error)
                return []

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        """The tier of each new page, -1 where no tier has room."""
        with self._lock:
            if not self.failure:
                try:
                    return self._runner.place(request)
                except PolicyError as error:
                    self._fail(error)
            return fill_fastest(request)

    def set(self, name: str) -> list[str]:
        """Put another policy in charge, or the same one anew; returns what is odd about it.

        Raises ConfigError where it cannot be loaded; then the old one stays.
        """
        runner = open_runner(name, self._budget_s)
        with self._lock:
            old, self._runner = self._runner, runner
            self._past_cpu_s += old.cpu_s
            self.name, self.failure, self._unloadable = name, "", None
        old.close()
        return runner.warnings

    def refresh(self) -> None:
        """Load the policy's file again if it changed."""
        if not self._runner.changed() and self._unloadable is None:
            return
        state = _state_of(self.name)
        if state == self._unloadable:
            return
        try:
            for warning in self.set(self.name):
                _log.warning("policy %s: %s", self.name, warning)
            _log.info("policy %s was loaded again: its file changed", self.name)
        except ConfigError as error:
            with self._lock:
                self._unloadable = state
                self._fail(error)

    def close(self) -> None:
        self._runner.close()

    def _fail(self, error: Exception) -> None:
        self.failure = str(error)
        self.failures += 1
        _log.error("policy %s failed and nothing is moved until it is set again: %s", self.name, error)


def _state_of(name: str) -> tuple[int, ...]:
    """Changes with the file; one that is gone has the state ()."""
    try:
        status = os.stat(name)
    except OSError:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
