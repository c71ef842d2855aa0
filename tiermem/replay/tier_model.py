"""Tier model: how fast the tiers of a replay are taken to be. A model: nothing was measured, nor is it by a replay.

Weights are streamed, so that what reading them costs is bandwidth: one page after another, each as fast as its tier
gives it, less what moves take of the tier meanwhile. Latency is what a policy is told: that of a queue with one server
and constant service times (M/D/1; Pollaczek-Khinchine), whose service time is the idle latency, which makes it
idle * (1 + u / (2 (1 - u))) at utilisation u. Beyond 95 % it grows in proportion to what is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tiermem.errors import ConfigError
from tiermem.tier import Speed, Tier, Tiers
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes, parse_bytes

SPEEDS = {"dram": (90e-9, 100e9), "cxl": (250e-9, 25e9)}
"""Kind -> idle latency in seconds and bandwidth in bytes/s: eight channels of DDR4 or half as many of DDR5; a CXL 1.1
expander on eight lanes of PCIe 5, as published for such devices (170 to 400 ns, 20 to 30 GB/s)."""

EXAMPLE = "dram=1/4,cxl=rest"
_BUSY = 0.95
_MOVES = 0.9
"""Part of a tier's bandwidth that moves take at most."""

_SPEC = re.compile(
    r"(?P<kind>[a-z]+)=(?P<size>[^:]+)(?::(?P<latency>[\d.]+)ns)?(?::(?P<bandwidth>[\d.]+)GB/s)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class TierModel:
    """One memory tier. `capacity_bytes`, in whole pages."""

    kind: str
    capacity_bytes: int
    idle_latency_s: float
    bandwidth_bytes_s: float

    def read_s(self, nbytes: int, moves_bytes_s: float) -> float:
        """Seconds to read `nbytes` while so many bytes a second are moved out of it or into it."""
        return nbytes / (self.bandwidth_bytes_s - min(moves_bytes_s, _MOVES * self.bandwidth_bytes_s))

    def latency_s(self, bytes_s: float) -> float:
        """Of a read while so many bytes a second are read and written."""
        asked = bytes_s / self.bandwidth_bytes_s
        busy = min(asked, _BUSY)
        return self.idle_latency_s * (1 + busy / (2 * (1 - busy))) * max(1.0, asked / _BUSY)


def parse_tier_models(texts: Sequence[str], nbytes: int) -> tuple[TierModel, ...]:
    """The memory tiers of `dram=1/4,cxl=rest`, the fastest first, for models of `nbytes`.

    A size is bytes (8GiB), a part of `nbytes` (1/4) or `rest`, room for all of it; behind it latency and bandwidth may
    stand: `dram=8GiB:90ns:100GB/s`. Raises ConfigError where that cannot be read, or cannot hold the models.
    """
    models = tuple(_parse(part.strip(), nbytes) for text in texts for part in text.split(","))
    kinds = [model.kind for model in models]
    if kinds not in (["dram"], ["dram", "cxl"]):
        raise ConfigError(f"--tier {','.join(texts)}: write one dram and at most one cxl behind it, as {EXAMPLE}")
    room = sum(model.capacity_bytes for model in models)
    if room < nbytes:
        raise ConfigError(
            f"--tier {','.join(texts)}: {format_bytes(room)} cannot hold the {format_bytes(nbytes)} of the trace's "
            "models, and a replay has no disk; give cxl=rest"
        )
    return models


def _parse(text: str, nbytes: int) -> TierModel:
    match = _SPEC.fullmatch(text)
    if match is None or match["kind"] not in SPEEDS:
        raise ConfigError(f"--tier {text!r} is no tier; write for example {EXAMPLE} or dram=8GiB:90ns:100GB/s")
    size, (latency_s, bandwidth) = match["size"], SPEEDS[match["kind"]]
    try:
        capacity = int(Fraction(size) * nbytes) if "/" in size else nbytes if size == "rest" else parse_bytes(size)
        if match["latency"]:
            latency_s = float(match["latency"]) * 1e-9
        if match["bandwidth"]:
            bandwidth = float(match["bandwidth"]) * 1e9
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--tier {text!r}: write a size (8GiB), a part of all bytes (1/4) or rest, then latency and "
                          "bandwidth (90ns, 100GB/s)") from None  # fmt: skip
    capacity = capacity // PAGE_BYTES * PAGE_BYTES
    if capacity <= 0 or latency_s <= 0 or bandwidth <= 0:
        raise ConfigError(f"--tier {text!r}: size, latency and bandwidth must be above 0, the size at least a page")
    return TierModel(match["kind"], capacity, latency_s, bandwidth)


def tiers_of(models: Sequence[TierModel]) -> Tiers:
    """The pool's own tiers, empty and idle, with a disk behind them as policies expect it."""
    tiers = [Tier(number, model.kind, model.capacity_bytes) for number, model in enumerate(models)]
    for tier, model in zip(tiers, models, strict=True):
        tier.speed = Speed(model.idle_latency_s, model.idle_latency_s, model.bandwidth_bytes_s)
    return Tiers((*tiers, Tier(len(tiers), "disk", None)))
