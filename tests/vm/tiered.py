"""Tiered: a real daemon with a DRAM and a CXL tier, what it says of its pages, and whether it keeps its quota."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.daemon import Daemon
from tests.vm.reader import DEADLINE_S
from tiermem.client import Client
from tiermem.errors import ConfigError
from tiermem.units import parse_bytes

POLICIES = Path(__file__).parent / "policies"
RANDOM_MOVES, ALL_SLOW, ALTERNATING = (
    str(POLICIES / f"{name}.py") for name in ("random_moves", "all_slow", "alternating")
)

BATCH_BYTES = 64 << 20
"""What may be moved at once, ahead of the quota."""


class Tiered(Daemon):
    """Tiers `dram` of `dram` bytes and `cxl` of `cxl` bytes on node 1; `quota` bytes a second may move.

    Clients are sampled harder than by default and policies have more time, as all is slow under emulation.
    """

    def __init__(
        self, *options: str, dram: str, cxl: str = "256MiB", quota: str = "48MiB", prefix: Sequence[str] = ()
    ) -> None:
        self.quota_bytes_s = parse_bytes(quota)
        self._readings: list[tuple[float, float, int]] = []
        super().__init__(start=False, prefix=prefix)
        self.flags = [
            "--tier", f"dram={dram}", "--tier", f"cxl={cxl}@node1", "--policy", "hold", "--quota", quota,
            "--sample-epoch", "50ms", "--sample-budget", "20%", "--policy-budget", "5s", *options,
        ]  # fmt: skip
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self, *options: str) -> None:
        """As Daemon's, with the patience that emulation needs."""
        if self.child is not None:
            self.child.__exit__()
        self._readings.clear()
        self.__dict__.pop("control", None)
        self.child = self.spawn(*options)
        self.ready = self.child.line(DEADLINE_S)
        assert self.ready.startswith(f"serving {self.address}")

    @cached_property
    def control(self) -> Client:
        """A client of this process, for as long as this daemon runs."""
        return self.client()

    def __enter__(self) -> Tiered:
        return self

    def close(self) -> None:
        if "control" in self.__dict__:
            self.control.close()
        super().close()

    def migration(self) -> dict[str, Any]:
        """Status of the migrator. Each look is remembered for `check_quota`."""
        begin = time.monotonic()
        found: dict[str, Any] = self.control.status()["migration"]
        self._readings.append((begin, time.monotonic(), found["moved_bytes"]))
        return found

    @property
    def moved_pages(self) -> int:
        return sum(self.migration()["moved_pages"].values())

    @property
    def refused(self) -> dict[str, int]:
        """Pages that were not moved, by cause."""
        return dict(self.migration()["refused"])

    def check_quota(self) -> None:
        """Between no two looks was more moved than the quota and one batch allow."""
        allowed = float("inf")
        for begin, end, moved in self._readings:
            allowed = min(allowed, moved - self.quota_bytes_s * begin + BATCH_BYTES)
            assert moved - self.quota_bytes_s * end <= allowed, f"more than the quota: {self._readings}"

    def set_policy(self, name: str) -> None:
        """As a client's. A daemon gives a file ten seconds to be imported, which is little on a guest that is busy."""
        for attempts_left in reversed(range(5)):
            try:
                self.control.set_policy(name)
                return
            except ConfigError as error:
                if "took longer" not in str(error) or not attempts_left:
                    raise

    def hold(self) -> None:
        """Move nothing from now on; returns when the last move is done."""
        self.set_policy("hold")
        before = -1
        while (now := self.moved_pages) != before:
            before = now
            time.sleep(1.0)

    def tiers(self, model: str) -> list[str]:
        """The tier of each page of a model, as the daemon says."""
        heat = self.control.heat(model)
        return [heat.tiers[tier] for tier in heat.tier]

    def nodes(self, model: str) -> list[list[int]]:
        """The nodes that each page may lie on by what the daemon says of it."""
        nodes = {tier["name"]: list(tier["nodes"]) for tier in self.control.status()["tiers"]}
        return [nodes[tier] for tier in self.tiers(model)]

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Return when the condition is true; fail with `what` and the migrator's status after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}; {self.migration()}"
            time.sleep(0.3)  # each look takes CPU time from what it waits for

    def wait_for(self, model: str, wanted: Mapping[int, str], timeout_s: float) -> None:
        """Return when the pages of these numbers are in these tiers."""
        tiers = self.tiers(model)

        def there() -> bool:
            tiers[:] = self.tiers(model)
            self.migration()
            return all(tiers[page] == tier for page, tier in wanted.items())

        try:
            self.wait(there, f"pages of {model} moved", timeout_s)
        except AssertionError as error:
            rates = np.round(self.control.heat(model).columns.rate, 2).tolist()
            raise AssertionError(f"{error}; tiers {tiers}; rates {rates}") from None
