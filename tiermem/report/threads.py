"""Threads: samples summed up by the thread that made the access."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiermem.perfdata import PerfData
from tiermem.recording import Recording
from tiermem.report.places import Places, comm_of


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread. `share` is its part of all samples, `in_models` how many touched a model (of a perf.data file: a
    mapped file), `models` which, the most often touched first."""

    pid: int
    tid: int
    comm: str
    samples: int
    share: float
    in_models: int
    models: tuple[str, ...]


def threads(source: Recording | PerfData) -> list[Thread]:
    """All threads that were sampled, the most often sampled first."""
    places, names, samples = Places(source), source.comms, source.samples
    keys, thread, counts = np.unique(
        samples["pid"].astype(np.uint64) << np.uint64(32) | samples["tid"], return_inverse=True, return_counts=True
    )
    pairs = np.column_stack((thread, places.model))[places.model >= 0]
    touched: dict[int, list[tuple[int, str]]] = {}
    for (number, model), count in zip(
        *(part.tolist() for part in np.unique(pairs, axis=0, return_counts=True)), strict=True
    ):
        touched.setdefault(number, []).append((count, places.models[model]))
    found = []
    for number, (key, count) in enumerate(zip(keys.tolist(), counts.tolist(), strict=True)):
        pid, tid = key >> 32, key & 0xFFFFFFFF
        models = sorted(touched.get(number, ()), key=lambda entry: -entry[0])
        found.append(
            Thread(
                pid, tid, comm_of(names, pid, tid), count, count / len(samples), sum(count for count, _ in models),
                tuple(model for _, model in models),
            )
        )  # fmt: skip
    return sorted(found, key=lambda thread: (-thread.samples, thread.pid, thread.tid))
