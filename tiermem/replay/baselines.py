"""Baselines: what a policy is compared with. Placements that nobody could or would choose, and the oracle.

all-fast      a fast tier that is large enough
all-slow      nothing in the fast tier
interleave    page after page over the tiers in proportion to their capacity
best-static   the pages that the trace touches most, known beforehand, and never moved
oracle        see tiermem.replay.oracle
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tiermem.replay.oracle import oracle_hits
from tiermem.replay.result import Result, ratio
from tiermem.replay.simulate import Setting, Simulation
from tiermem.replay.trace import Trace
from tiermem.types import PAGE_BYTES

NAMES = ("all-fast", "all-slow", "interleave", "best-static", "oracle")


def oracle(trace: Trace, setting: Setting) -> Result:
    """Its slowdown is that of its hits and misses, moves being free."""
    fast, slow = setting.tiers[0], setting.tiers[-1]
    hits = int(oracle_hits(trace, _places(setting)).sum())
    spent_s = fast.read_s(hits, 0.0) + slow.read_s(trace.touches - hits, 0.0)
    return Result("oracle", ratio(hits, trace.touches), ratio(spent_s, fast.read_s(trace.touches, 0.0)))


def static_baselines(trace: Trace, setting: Setting) -> Iterator[Result]:
    """Those that move nothing, in the order of NAMES."""
    roomy = replace(setting, tiers=tuple(replace(tier, capacity_bytes=trace.nbytes) for tier in setting.tiers))
    slow = len(setting.tiers) - 1
    for name, under, placed in (
        ("all-fast", roomy, np.zeros(trace.pages, np.int8)),
        ("all-slow", roomy, np.full(trace.pages, slow, np.int8)),
        ("interleave", setting, _interleaved(trace.pages, setting)),
        ("best-static", setting, _most_touched(trace, setting)),
    ):
        yield replace(Simulation(trace, under, None, placed).run(), policy=name, convergence_s=None)


def _places(setting: Setting) -> int:
    return setting.tiers[0].capacity_bytes // PAGE_BYTES


def _interleaved(pages: int, setting: Setting) -> npt.NDArray[np.int8]:
    fast = np.diff(np.arange(pages + 1) * min(_places(setting), pages) // pages)
    return np.where(fast > 0, 0, len(setting.tiers) - 1).astype(np.int8)


def _most_touched(trace: Trace, setting: Setting) -> npt.NDArray[np.int8]:
    placed = np.full(trace.pages, len(setting.tiers) - 1, np.int8)
    touches = np.bincount(trace.page, minlength=trace.pages)
    placed[np.argsort(-touches, kind="stable")[: _places(setting)]] = 0
    return placed
