"""`python -m tests.bench.heat`: what heat costs: bytes a page, a snapshot of a million pages, windows taken in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from tiermem.heat import Heat, snapshot
from tiermem.observations import Bits, Counts, Rung

PAGES, RUNS = 1_000_000, 9
SNAPSHOT_S, MODELS, PAGE_BYTES = 20e-3, 30, 48
"""Targets; that of the snapshot is for so many models at most: beyond, it is the models that cost, not their pages."""

_random = np.random.default_rng(1)


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _filled(pages: int, counted: bool) -> Heat:
    heat = Heat(pages)
    everything = np.arange(pages, dtype=np.int32)
    for turn in range(4):
        heat.add_bits(Bits(Rung.PRESENT, turn * 0.1, turn * 0.1 + 0.1, everything, _random.random(pages) < 0.3))
    if counted:
        heat.add_counts(Counts(Rung.PERF, 0.3, 0.4, everything, _random.integers(0, 9, pages, np.uint32), 10007))
    return heat


def _snapshots(models: int, counted: bool) -> float:
    heats = [_filled(PAGES // models, counted) for _ in range(models)]
    columns = snapshot(heats, 1.0)
    assert len(columns) == PAGES // models * models
    assert columns.known.all(), "a snapshot that is timed must hold what was taken in"
    assert (columns.rung == (Rung.PERF if counted else Rung.PRESENT)).all()
    return _seconds(lambda: snapshot(heats, 1.0))


def main() -> int:
    heat = _filled(PAGES, True)
    per_page = heat.nbytes / PAGES
    print(f"{PAGES} pages: {per_page:.1f} bytes a page (at most {PAGE_BYTES})")
    worst = 0.0
    for models in (1, 30, 3000):
        for counted in (False, True):
            took = _snapshots(models, counted)
            target = ""
            if models <= MODELS:
                worst, target = max(worst, took), f" (at most {SNAPSHOT_S * 1e3:.0f})"
            by = "bits and counts" if counted else "bits"
            print(f"snapshot, {models} models, {by}: {took * 1e3:.1f} ms, median of {RUNS}{target}")
    for name, pages in (
        ("a run of 1/8", np.arange(PAGES // 8, dtype=np.int32)),
        ("every 8th", np.arange(0, PAGES, 8, dtype=np.int32)),
    ):
        bits = Bits(Rung.PRESENT, 1.0, 1.1, pages, _random.random(len(pages)) < 0.3)
        took = _seconds(lambda bits=bits: heat.add_bits(bits))  # type: ignore[misc]
        print(f"add_bits, {name} of the pages: {len(pages) / took / 1e6:.1f} million pages/s")
    return 0 if worst <= SNAPSHOT_S and per_page <= PAGE_BYTES else 6


if __name__ == "__main__":
    raise SystemExit(main())
